"""The folder that a run writes: whether it may, and a marker that says who has begun to."""

import datetime
import json
import logging
import secrets
from pathlib import Path
from typing import NamedTuple

from dpo_fast.report.files import write_text
from dpo_fast.report.record import REPORT, RESULTS, versions

from .sources import BadInput

logger = logging.getLogger("dpo_fast")

MARKER = "dpo_fast_run.json"
UNMARKED = "unmarked"  # a run that was killed before it had a marker, or of another command: any checkpoint counts
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz"}
_OTHERS = ("*config.json", "*.index.json", "tokenizer*", RESULTS, REPORT, "training*.png")


class Marker(NamedTuple):
    """run: marks the checkpoints. begun: when. finished: whether all that
    the command writes is there."""

    written_by: str
    run: str
    command: str | None
    begun: str
    finished: bool = False


def read(out: Path) -> Marker | None:
    """The marker in a folder, None where there is none of ours."""
    try:
        found = json.loads((out / MARKER).read_text(encoding="utf-8"))
        return Marker(*(found[name] for name in Marker._fields))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def check(out: Path, *, reads: dict[str, str | None], overwrite: bool, by: str) -> None:
    """Raise BadInput for a folder whose files are not this command's to replace, unless `overwrite` says so.

    reads: name -> path of what the run reads (or a hub's name); it may not lie where the run writes. by: the command.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(f"output_dir: {str(out)!r} is a file")
    if overwrite or not out.is_dir():
        return
    for name, path in reads.items():
        if path is None or not Path(path).exists():
            continue
        place = Path(path).resolve()
        if place == out.resolve():
            what = "the model's own folder" if name == "model" else f"the folder of {name}"
            raise BadInput(f"output_dir: {str(out)!r} is {what}, which would be overwritten{_OTHERWISE}")
        if place.parent == out.resolve() and place.name.startswith("checkpoint-"):
            raise BadInput(f"output_dir: {name} is a checkpoint in it, which may be overwritten{_OTHERWISE}")
    marker = read(out)
    if marker is not None and marker.written_by == by:
        return
    if kept := sorted(path.name for path in out.iterdir() if _is_of_a_model(path)):
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        whose = f"`{marker.written_by}` has written" if marker else f"`{by}` has not written"
        raise BadInput(f"output_dir: {str(out)!r} holds files that {whose} ({', '.join(kept[:3])}{more}){_OTHERWISE}")


_OTHERWISE = "; choose another folder, or --overwrite to replace what is there"


def _is_of_a_model(path: Path) -> bool:
    return path.is_file() and (path.suffix in _WEIGHTS or any(path.match(pattern) for pattern in _OTHERS))


def begin(out: Path, by: str, command: str | None, resumes: bool) -> str:
    """Mark the folder, and say what is in it of an earlier run; returns the run's name.

    Where a run is taken up again, its marker stays.
    """
    earlier = read(out)
    if resumes:
        marker = earlier or Marker(by, UNMARKED, command, _now())
        _write(out, marker._replace(finished=False))
        return marker.run
    if earlier is not None:
        state = "finished" if earlier.finished else "not finished; --resume_from_checkpoint goes on with it"
        logger.warning("%s holds a run of %s (%s), which this one replaces", out, earlier.begun, state)
    marker = Marker(by, secrets.token_hex(8), command, _now())
    _write(out, marker)
    return marker.run


def finish(out: Path) -> None:
    if (marker := read(out)) is not None:
        _write(out, marker._replace(finished=True))


def _write(out: Path, marker: Marker) -> None:
    write_text(out / MARKER, json.dumps({**marker._asdict(), "versions": versions()}, indent=1) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
