"""Results as JSON, stamped with device, versions, command and commit; and as aligned text."""

import argparse
import importlib.metadata
import json
import platform
import shlex
import time
from pathlib import Path

import torch

from .provenance import CODE, GIVEN, NoHistory, commit_of, reason_against

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("triton", "transformers", "accelerate", "datasets", "peft", "trl", "liger_kernel", "cut_cross_entropy")
PACKAGES += ("quack_kernels", "flash_attn")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark's command line knows about its results."""
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--allow-dirty", action="store_true", help="measure uncommitted code; the result says so")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")


class Refused(ValueError):
    """The result would not name the code that it measures."""


class Record:
    """Where a benchmark's results go. Made before it measures: a tree that may not be measured is refused then."""

    def __init__(
        self, benchmark: str, argv: list[str], *, save=True, allow_dirty=False, folder: Path = RESULTS, under: str = ""
    ):
        """`under` is the folder's folder for them, the device's name if it is empty."""
        self.saves, self.folder, self.code, self.commit = save, folder / (under or device_name()), CODE[benchmark], None
        kept = [word for word in argv if word != "--allow-dirty"]
        self.command = shlex.join(["python", "-m", f"benchmarks.{benchmark}", *kept])
        if not save:
            return
        try:
            self.commit = commit_of(self.code)
        except NoHistory as reason:
            if not allow_dirty:
                raise Refused(f"the result would name no commit ({reason}): give it in {GIVEN}") from None
        else:
            if self.commit.endswith("-dirty") and not allow_dirty:
                raise Refused("the code that is measured has uncommitted changes (git status): commit them first")

    @classmethod
    def of(
        cls,
        benchmark: str,
        argv: list[str],
        arguments: argparse.Namespace,
        parser: argparse.ArgumentParser,
        *,
        under: str = "",
    ):
        """From a command line; ends the program with status 2 where the result could not be saved."""
        a = arguments
        try:
            return cls(benchmark, argv, save=not a.no_save, allow_dirty=a.allow_dirty, folder=a.out, under=under)
        except Refused as reason:
            parser.error(f"{reason}, or add --no-save or --allow-dirty")

    def save(self, name: str, result: dict, *, complete: bool = True) -> Path | None:
        """Write `result` with its stamp to <folder>/<name>.json, whole or not at all.

        Called after each part of a measurement with complete=False, so that what is killed leaves what it found.
        """
        if not self.saves:
            return None
        clean = self.commit and not self.commit.endswith("-dirty")
        # Another commit is no harm where it has left this code alone
        if clean and commit_of(self.code) != self.commit and reason_against(self.commit, self.code):
            print(f"{name}: the code changed while it was measured; its result is stamped dirty")
            self.commit += "-dirty"
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".tmp")
        whole = {**stamp(), "commit": self.commit, "command": self.command, "complete": complete, **result}
        draft.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
        if complete:
            print(f"written to {path}")
        return path


def stamp() -> dict:
    """Where and with what a result was measured."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except ModuleNotFoundError:
            versions[name] = None
    date = time.strftime("%Y-%m-%d")
    return {"device": device_name(), "threads": torch.get_num_threads(), "versions": versions, "date": date}


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{platform.machine()}"


def text(value) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def line(row: dict, columns: list[str]) -> str:
    """One row by itself, as soon as it is known."""
    return ", ".join(f"{column} {text(row[column])}" for column in columns if row.get(column) is not None)


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as aligned text; floats with four digits."""
    cells = [columns, *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
