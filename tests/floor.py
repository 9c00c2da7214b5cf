"""Print the oldest versions that pyproject.toml declares, as pins for pip: `python tests/floor.py dependencies peft`.

Arguments are the names of extras, and dependencies. Raises ValueError for a requirement without a lower bound.
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # as pip has it, which every new environment holds
    from pip._vendor import tomli as tomllib

# Until 3.7, Triton's interpreter fails in numpy 2.4 and later: "only 0-dimensional arrays can be converted"
TESTS_ALONE_NEED = ["numpy<2.4"]
TRAINER_NEEDS = {"transformers": "5.6"}  # FastDPOTrainer: see training/config.py


def declared() -> dict[str, list[str]]:
    """The requirements by extra, and those of the package under "dependencies"."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {"dependencies": project["dependencies"], **project["optional-dependencies"]}


def pin(requirement: str) -> str:
    """'x>=1.2; marker' -> 'x==1.2; marker'"""
    name_and_bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)(;.*)?", requirement)
    if name_and_bound is None:
        raise ValueError(f"pyproject.toml declares {requirement!r}, which is no lower bound alone")
    name, oldest, marker = name_and_bound.groups()
    oldest = TRAINER_NEEDS.get(name, oldest)
    return f"{name}=={oldest}{marker or ''}"


if __name__ == "__main__":
    groups = declared()
    print("\n".join([*(pin(one) for name in sys.argv[1:] for one in groups[name]), *TESTS_ALONE_NEED]))
