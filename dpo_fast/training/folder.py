"""The folder that a run writes: whether it may, and a marker that says who has begun to."""

import datetime
import json
import logging
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_fast.report.files import read_json, write_text
from dpo_fast.report.record import REPORT, RESULTS, versions

from .sources import BadInput

logger = logging.getLogger("dpo_fast")

MARKER, PROGRESS = "dpo_fast_run.json", "dpo_fast_progress.json"
UNMARKED = "unmarked"  # a run that was killed before it had a marker, or of another command: any checkpoint counts
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WRITTEN = (RESULTS, REPORT, MARKER, "training*.png")
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz"}
_OTHERS = (*_WRITTEN, "*config.json", "*.index.json", "tokenizer*", "chat_template*", "special_tokens_map.json")
# What may change between a run and its continuation without a word
_MAY_CHANGE = {"output_dir", "overwrite", "resume_from_checkpoint", "max_steps", "num_train_epochs", "samples"}
_MAY_CHANGE |= {"sample_tokens", "report_to", "run_name", "disable_tqdm", "log_level", "use_cpu", "print_example"}
_MAY_CHANGE |= {"dataloader_num_workers", "dataset_num_proc", "save_total_limit", "logging_dir"}
_MAY_CHANGE |= {f"{what}_{how}" for what in ("eval", "save", "logging") for how in ("steps", "strategy")}


class Marker(NamedTuple):
    """run: marks the checkpoints. begun: when. finished: whether all that the command writes is there; steps: how many
    were trained then. source: the checkpoint that the run went on from, where that is of another run. settings: what
    the run was told, as text."""

    written_by: str
    run: str
    command: str | None
    begun: str
    finished: bool = False
    steps: int = 0
    source: str | None = None
    settings: Mapping[str, str] = {}


def read(out: Path) -> Marker | None:
    """The marker in a folder, None where there is none of ours."""
    found = read_json(out / MARKER)
    whole = isinstance(found, dict) and set(Marker._fields) <= found.keys()
    return Marker(*(found[name] for name in Marker._fields)) if whole else None


def check(out: Path, *, reads: dict[str, str | None], overwrite: bool, by: str, resumes: bool = False) -> None:
    """Raise BadInput for a folder whose files are not this command's to replace, unless `overwrite` says so.

    reads: name -> path of what the run reads (or a hub's name); it may not lie where the run writes. by: the command.
    resumes: whether a run in the folder is to go on, also one of another command.
    """
    if out.exists() and not out.is_dir():
        raise BadInput(f"output_dir: {str(out)!r} is a file")
    if overwrite or not out.is_dir():
        return
    for name, path in reads.items():
        if path is not None and Path(path).exists():
            _check_read(out, name, Path(path).resolve())
    marker = read(out)
    if marker is not None and marker.written_by == by:
        return
    kept = sorted(path.name for path in out.iterdir() if _is_of_a_model(path) or not resumes and _is_checkpoint(path))
    if kept:
        more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
        whose = f"`{marker.written_by}` has written" if marker else f"`{by}` has not written"
        raise BadInput(f"output_dir: {str(out)!r} holds files that {whose} ({', '.join(kept[:3])}{more}){_OTHERWISE}")


_OTHERWISE = "; choose another folder, or --overwrite to replace what is there"


def _check_read(out: Path, name: str, place: Path) -> None:
    if place == out.resolve():
        what = "the model's own folder" if name == "model" else f"the folder of {name}"
        raise BadInput(f"output_dir: {str(out)!r} is {what}, which would be overwritten{_OTHERWISE}")
    inside = place.relative_to(out.resolve()).parts if place.is_relative_to(out.resolve()) else ()
    if inside and CHECKPOINT.fullmatch(inside[0]):
        raise BadInput(f"output_dir: {name} is in a checkpoint there, which may be overwritten{_OTHERWISE}")
    if len(inside) == 1 and any(place.match(pattern) for pattern in _WRITTEN):
        raise BadInput(f"output_dir: {name} is {place.name} in it, which would be overwritten{_OTHERWISE}")


def _is_of_a_model(path: Path) -> bool:
    return path.is_file() and (path.suffix in _WEIGHTS or any(path.match(pattern) for pattern in _OTHERS))


def _is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint, with anything in it, that this project has not written."""
    named = path.is_dir() and CHECKPOINT.fullmatch(path.name) is not None
    return named and any(path.iterdir()) and not (path / PROGRESS).is_file()


def begin(
    out: Path, by: str, command: str | None, *, resumes: bool = False, source: Path | None = None, settings=None
) -> str:
    """Mark the folder, and say what is in it of an earlier run; returns the run's name.

    resumes: the marker's run goes on. source: what a run goes on from that is not the newest of the marker's run; the
    run gets a name of its own then. A line names the settings that are others than the run's.
    """
    earlier, new = read(out), settings or {}
    if resumes and source is None:
        marker = earlier or Marker(by, UNMARKED, command, _now(), settings=new)
        changed = [key for key in new if new[key] != marker.settings.get(key, new[key]) and key not in _MAY_CHANGE]
        if changed:
            each = [f"{key} (it was {marker.settings[key]})" for key in changed]
            logger.warning("the run goes on with other settings than it has had: %s", ", ".join(each))
        _write(out, marker._replace(finished=False))
        return marker.run
    if earlier is not None and not resumes:
        state = "finished" if earlier.finished else "not finished; --resume_from_checkpoint goes on with it"
        logger.warning("%s holds a run of %s (%s), which this one replaces", out, earlier.begun, state)
    place = None if source is None else str(source.resolve())
    marker = Marker(by, secrets.token_hex(8), command, _now(), source=place, settings=new)
    _write(out, marker)
    return marker.run


def finish(out: Path, steps: int) -> None:
    if (marker := read(out)) is not None:
        _write(out, marker._replace(finished=True, steps=steps))


def _write(out: Path, marker: Marker) -> None:
    content: dict[str, Any] = {**marker._asdict(), "versions": versions()}
    write_text(out / MARKER, json.dumps(content, indent=1) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
