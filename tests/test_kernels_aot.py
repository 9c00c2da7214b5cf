"""Every kernel compiles for GPUs that are not here, without a spill, and reads 16 bytes at a time where it can."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def kernel_names() -> set[str]:
    kernels = Path(__file__).parents[1] / "kernels"
    defined = [line.split("(")[0] for file in kernels.glob("*.py") for line in file.read_text().splitlines()]
    return {n.removeprefix("def ").removesuffix("_kernel") for n in defined if n.startswith("def ") and "_kernel" in n}


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"])
def test_compiled_kernels(target):
    script = Path(__file__).with_name("aot_compile.py")
    run = subprocess.run([sys.executable, str(script), target], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert kernel_names() == {report["kernel"].split()[0] for report in reports}
    spilled = [r for r in reports if r["spills"] or r.get("stack") or r.get("local")]
    assert not spilled, spilled
    narrow = [r for r in reports if r["wide_loads_expected"] and not r["wide_loads"]]
    assert not narrow, narrow
