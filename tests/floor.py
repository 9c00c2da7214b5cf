"""Print the oldest versions that setup.py declares, as pins for pip: `python tests/floor.py install_requires peft`.

Arguments are the names of extras, and install_requires. Raises ValueError for a requirement without a lower bound.
"""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

# Until 3.7, Triton's interpreter fails in numpy 2.4 and later: "only 0-dimensional arrays can be converted"
TESTS_ALONE_NEED = ["numpy<2.4"]


def declared() -> dict[str, list[str]]:
    """The requirements in setup.py by extra. Needs no setuptools, which a new environment has not."""
    found = {}
    sys.modules["setuptools"] = SimpleNamespace(setup=lambda **arguments: found.update(arguments))
    runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))
    return {"install_requires": found["install_requires"], **found["extras_require"]}


def pin(requirement: str) -> str:
    """'x>=1.2; marker' -> 'x==1.2; marker'"""
    name_and_bound = re.fullmatch(r"([\w.-]+)>=([\w.]+)(;.*)?", requirement)
    if name_and_bound is None:
        raise ValueError(f"setup.py declares {requirement!r}, which is no lower bound alone")
    name, oldest, marker = name_and_bound.groups()
    return f"{name}=={oldest}{marker or ''}"


if __name__ == "__main__":
    groups = declared()
    print("\n".join([*(pin(one) for name in sys.argv[1:] for one in groups[name]), *TESTS_ALONE_NEED]))
