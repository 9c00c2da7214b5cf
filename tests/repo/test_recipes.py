"""docs/recipes.md, executed: each change is made in one copy of the package, then each recipe's program runs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = {
    section.partition("\n")[0]: re.findall(r"```python\n# ([^\n]*)\n(.*?)```", section, re.DOTALL)
    for section in TEXT.split("\n## ")[1:]
}
# What each comes to: (new files, lines inserted into files that are there)
SIZE = {
    "A loss": (0, 4),
    "A knob of a loss": (0, 1),
    "A head with a multiplier": (0, 1),
    "An implementation for another device": (1, 1),
    "Another way to group sequences": (1, 0),
    "Another source of reference log-probs": (1, 0),
}


def change(root: Path, where: str, code: str) -> tuple[int, int]:
    """Make one change in `root`; returns (new files, lines inserted)."""
    name, _, how = where.partition(", ")
    file = root / name
    if how == "new":
        assert not file.exists()
        file.write_text(code, encoding="utf-8")
        return 1, 0
    lines, line = file.read_text(encoding="utf-8").split("\n"), how.removeprefix("below: ")
    found = [i for i, text in enumerate(lines) if text.startswith(line)]
    assert len(found) == 1, f"{name}: {len(found)} lines start with {line}"
    # Below a function's or a class's comment line comes what stands two lines apart, as around it
    apart = ["", ""] if code.startswith("@") else []
    at = found[0] + 1
    if lines[at].lstrip().startswith('"""'):
        at = next(i for i in range(at, len(lines)) if lines[i].endswith('"""')) + 1
    lines[at:at] = [*apart, *code.rstrip("\n").split("\n")]
    file.write_text("\n".join(lines), encoding="utf-8")
    return 0, len(code.rstrip("\n").split("\n"))


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """(a copy of the package with all recipes in it, the size of each)."""
    root = tmp_path_factory.mktemp("recipes")
    for name in ("dpo_fast", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, root / name, symlinks=True, ignore=ignored)
    sizes = {}
    for recipe, blocks in RECIPES.items():
        found = [change(root, where, code) for where, code in blocks if where != "run"]
        sizes[recipe] = tuple(map(sum, zip(*found, strict=True)))
    return root, sizes


def test_each_is_as_small_as_it_says(changed):
    assert changed[1] == SIZE


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SIZE)
def test_its_program_runs(changed, recipe):
    (program,) = [code for where, code in RECIPES[recipe] if where == "run"]
    program = f"import dpo_fast\nassert dpo_fast.__file__.startswith({str(changed[0])!r})\n{program}"
    environment = {**os.environ, "PYTHONPATH": str(changed[0])}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=changed[0], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
