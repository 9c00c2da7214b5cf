"""The wheel and the sdist hold what they should and run from a directory that is not the checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("build")

ROOT = Path(__file__).parents[2]
SMOKE = """
import dpo_fast, torch, pathlib
assert {site!r} in dpo_fast.__file__, dpo_fast.__file__
logits = torch.randn(3, 5)
for impl in ("torch", "triton"):
    dpo_fast.logits_token_logps(logits, torch.tensor([0, 1, 2]), impl=impl)
assert list((pathlib.Path(dpo_fast.__file__).parent / "data").glob("*.jsonl")), "no data"
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A wheel and an sdist, built from a copy without the version control's files, as a release is."""
    source = tmp_path_factory.mktemp("source") / "dpo_fast"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".*_cache", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_only_the_package(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dpo_fast"}
    assert "dpo_fast/kernels/token_logps.py" in names and "dpo_fast/kernels/__init__.py" not in names
    assert "dpo_fast/py.typed" in names and any(name.endswith(".jsonl") for name in names)


def test_the_sdist_holds_the_kernels(built):
    names = tarfile.open(built[1]).getnames()
    assert any(name.endswith("/dpo_fast/kernels/token_logps.py") for name in names)
    assert any(name.endswith("/LICENSE") for name in names) and any(name.endswith("/README.md") for name in names)


@pytest.mark.parametrize("kind", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["wheel", "sdist"])
def test_installs_and_runs_elsewhere(built, kind, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    run = subprocess.run([*command, "--target", str(site), str(built[kind])], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    environment = {**os.environ, "PYTHONPATH": str(site), "TRITON_INTERPRET": "1"}
    code = SMOKE.format(site=str(site))
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
