"""Execute notebooks and write their outputs back: `python examples/notebooks/execute.py [NOTEBOOK...]`, all by default.

What differs between two runs of the same code (times, versions of Python) is not kept, so a diff shows what changed.
"""

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs, run from the root of the checkout. CellExecutionError where a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    search = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": search, "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, where ipywidgets are not installed
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],  # it would say that it listens on this machine without encryption
    )
    client.execute(cwd=str(ROOT), env=environment)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main(paths: list[Path]) -> None:
    for path in paths or sorted(FOLDER.glob("*.ipynb")):
        started = time.perf_counter()
        nbformat.write(executed(path), path)
        print(f"{path.name}: {time.perf_counter() - started:.0f} s, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
