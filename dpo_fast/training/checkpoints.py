"""Checkpoints of transformers' Trainer: whether one is whole, which one to go on from, and whether it fits.

Trainer writes the files of a checkpoint one after the other into their place, trainer_state.json last. A process that
is killed meanwhile leaves a folder that looks like a checkpoint and is none; `faults` tells. `check` compares a whole
one with the model that is to go on from it, by names and shapes, without reading weights.
"""

import contextlib
import json
import logging
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from dpo_fast.reference import is_peft_model, left_out_by_peft
from dpo_fast.report.files import read_json, write_text

from .folder import CHECKPOINT, PROGRESS, UNMARKED

logger = logging.getLogger("dpo_fast")

STATE = "trainer_state.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


class Unfit(ValueError):
    """A training cannot go on from a checkpoint; the message is one sentence."""


class Progress(NamedTuple):
    """What Trainer's state does not hold. run: which run has written the checkpoint, "" where that is not known;
    ranks: how many processes wrote it; passes, batches: whole passes over a stream, and batches of the one begun;
    start: a digest of the weights that the run began from, "" where they do not matter."""

    run: str = ""
    ranks: int = 1
    passes: int = 0
    batches: int = 0
    start: str = ""


def write_progress(folder: Path, progress: Progress) -> None:
    write_text(folder / PROGRESS, json.dumps(progress._asdict()) + "\n")


def read_progress(folder: Path) -> Progress | None:
    """None where another trainer has written the checkpoint."""
    found = read_json(folder / PROGRESS)
    return Progress(**found) if isinstance(found, dict) and found.keys() <= set(Progress._fields) else None


@contextlib.contextmanager
def writing(what: str, folder: Path) -> Iterator[None]:
    """Around what is saved to a folder: OSError, in one sentence, where the files cannot be written to their end."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is None:  # of a network
            raise
        text = " ".join(str(error).split())
        there = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
        free = shutil.disk_usage(there).free
        of_torch = re.search(r"inline_container|PytorchStreamWriter|iostream|basic_ios", text)
        if isinstance(error, RuntimeError) and not (of_torch or free < 2**20):
            raise
        full = re.search(r"No space left|[Qq]uota|os error 28", text) or free < 2**20
        limited = re.search(r"unexpected pos|File too large", text)
        reason = "the disk is full" if full else "files may not be as large here" if limited else text.removesuffix(".")
        raise OSError(
            f"{what} could not be written to {str(folder)!r}: {reason}; {free / 2**20:,.0f} MiB are free there"
        ) from error


# --- whole or not --------------------------------------------------------------------------------------------------


def faults(folder: Path) -> list[str]:
    """Why nobody can go on from a folder: files that are missing, or that end too early. Empty for a checkpoint."""
    if not folder.is_dir():
        return ["there is no such directory"]
    found = []
    if not (folder / STATE).is_file():
        found.append(f"{STATE} is missing")
    elif not is_written(folder):
        found.append(f"{STATE} is cut or no state of a training")
    found += _weight_faults(folder)
    found += [f"{path.name} is cut or not of torch.save" for path in _torch_files(folder) if not _is_whole(path)]
    progress = read_progress(folder)
    if progress is not None and progress.ranks > 1:
        names = [f"rng_state_{rank}.pth" for rank in range(progress.ranks)]
        found += [f"{name} is missing" for name in names if not (folder / name).is_file()]
    if is_deepspeed(folder):
        return found + _deepspeed_faults(folder)
    if not (folder / "scheduler.pt").is_file():
        found.append("scheduler.pt is missing")
    if not any((folder / name).exists() for name in ("optimizer.pt", "optimizer.bin", "optimizer_0")):
        found.append("optimizer.pt is missing")
    return found


def is_sharded(folder: Path) -> bool:
    """Whether FSDP's or DeepSpeed's own files hold the weights, which only they can read."""
    return is_deepspeed(folder) or any(folder.glob("pytorch_model_fsdp*"))


def is_deepspeed(folder: Path) -> bool:
    return any(folder.glob("global_step*"))


def is_written(folder: Path) -> bool:
    """Whether the file that is written last is there."""
    state = read_json(folder / STATE)
    return isinstance(state, dict) and isinstance(state.get("global_step"), int)


def _deepspeed_faults(folder: Path) -> list[str]:
    latest = folder / "latest"
    tag = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    return [] if tag and (folder / tag).is_dir() else ["latest, which names DeepSpeed's folder, is missing or wrong"]


def _weight_faults(folder: Path) -> list[str]:
    found = [f"{path.name} is cut" for path in sorted(folder.rglob("*.safetensors")) if _header(path) is None]
    for path in folder.glob("*.index.json"):
        index = read_json(path)
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            found.append(f"{path.name} is cut")
        else:
            found += [
                f"{name} is missing"
                for name in sorted({*index["weight_map"].values()})
                if not (folder / name).is_file()
            ]
    for path in (*folder.glob("pytorch_model_fsdp_*"), *folder.glob("optimizer_*")):
        if path.is_dir() and not (path / ".metadata").is_file():  # which is written when all ranks' parts are
            found.append(f"{path.name}/.metadata is missing")
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file() and not isinstance(read_json(folder / name), dict):
            found.append(f"{name} is cut")
    both = [path.name for names in (WEIGHTS, ADAPTER_WEIGHTS) for path in _present(folder, names)[:1]]
    if len(both) == 2 and not is_sharded(folder):
        found.append(f"it holds {both[0]} and {both[1]}, so one of them is of another run")
    if not found and not is_sharded(folder) and not _weight_files(folder):
        found.append(f"{WEIGHTS[0]} and {ADAPTER_WEIGHTS[0]} are missing")
    return found


def _present(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [folder / name for name in names if (folder / name).is_file()]


def _weight_files(folder: Path) -> list[Path]:
    """Files of weights, of the model or of adapters, also in their sub-folders."""
    names = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.*", "*/adapter_model.*")
    return [path for name in names for path in sorted(folder.glob(name))]


def _torch_files(folder: Path) -> list[Path]:
    names = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state*.pth", "*model*.bin")
    return [path for name in names for path in sorted(folder.rglob(name)) if path.is_file()]


def _is_whole(path: Path) -> bool:
    """Of a file of torch.save: a ZIP archive, whose directory is at its end, or, long ago, a pickle."""
    with path.open("rb") as file:
        start = file.read(2)
    return zipfile.is_zipfile(path) if start == b"PK" else start[:1] == b"\x80"


def _header(path: Path) -> dict[str, tuple[int, ...]] | None:
    """Name -> shape of the tensors in a file of safetensors, None where it ends too early."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        text = file.read(length) if 8 + length <= size else b""
    try:
        entries = json.loads(text)
    except ValueError:
        return None
    entries.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return {name: tuple(entry["shape"]) for name, entry in entries.items()} if 8 + length + end <= size else None


# --- which one -----------------------------------------------------------------------------------------------------


def newest(folder: Path, run: str = "", *, say: bool = False) -> Path | None:
    """The whole checkpoint of most steps in `folder`; `say`: a line names those that are passed over, and why.

    run: of this run, where it is known; checkpoints that another one has left in the folder do not count.
    """
    found = folder.glob("checkpoint-*") if folder.is_dir() else ()
    by_steps = {int(match[1]): path for path in found if path.is_dir() and (match := CHECKPOINT.fullmatch(path.name))}
    passed_over = []
    chosen = None
    for steps in sorted(by_steps, reverse=True):
        path = by_steps[steps]
        progress = read_progress(path)
        if run not in ("", UNMARKED) and progress is not None and progress.run not in ("", UNMARKED, run):
            passed_over.append(f"{path.name} (of an earlier run)")
        elif reasons := faults(path):
            passed_over.append(f"{path.name} ({'; '.join(reasons)})")
        else:
            chosen = path
            break
    if passed_over and say:
        logger.warning("%s: passed over %s", folder, ", ".join(passed_over))
    return chosen


# --- whether it fits -----------------------------------------------------------------------------------------------


def step_of(folder: Path) -> int:
    """Optimizer steps that a whole checkpoint has behind it."""
    return read_json(folder / STATE)["global_step"]


def check(folder: Path, model: nn.Module, unseen: str | None = None, start: str = "") -> None:
    """Raise Unfit unless `folder` is a whole checkpoint of a model like this one. unseen: an adapter of the model
    that is not saved. start: as in `Progress`, of this training."""
    reasons = _kind_faults(folder, model) or faults(folder)
    if not reasons and not is_sharded(folder):
        reasons = _adapter_faults(folder, model, unseen) if is_peft_model(model) else _model_faults(folder, model)
    progress = read_progress(folder)
    if not reasons and start and progress is not None and progress.start not in ("", start):
        what = "an adapter of another model" if is_peft_model(model) else "a run that began from other weights"
        reasons = [f"it is of {what}; build the trainer from the one that the run began with"]
    if reasons:
        more = "; and more" if len(reasons) > 4 else ""
        raise Unfit(
            f"resume_from_checkpoint={str(folder)!r} is not a checkpoint of this training: "
            f"{'; '.join(reasons[:4])}{more}"
        )


def _kind_faults(folder: Path, model: nn.Module) -> list[str]:
    """For something else than a checkpoint of such a model, which may miss more than is worth saying."""
    if not folder.is_dir():
        return ["no such directory"]
    if is_sharded(folder) and (folder / STATE).is_file():
        return []
    needed = [STATE, "adapter_config.json" if is_peft_model(model) else "config.json"]
    if is_peft_model(model) and any(folder.glob("*/adapter_config.json")):
        needed.pop()
    missing = [name for name in needed if not (folder / name).is_file()]
    if not missing:
        return []
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    return [f"it has no {' and no '.join(missing)} (there: {there or 'nothing'})"]


def _model_faults(folder: Path, model: nn.Module) -> list[str]:
    config = read_json(folder / "config.json") or {}
    if config.get("model_type") != model.config.model_type:
        return [f"it holds a {config.get('model_type')!r} model, this trainer a {model.config.model_type!r}"]
    return _differences(shapes_in(folder), saved_shapes(model), optional=_shared_names(model))


def saved_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights of a model as it is saved, which may split or rename what it computes with."""
    empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    revert = getattr(transformers.core_model_loading, "revert_weight_conversion", None)
    if revert is not None and isinstance(model, transformers.PreTrainedModel):
        empty = revert(model, empty)
    return {name: tuple(tensor.shape) for name, tensor in empty.items()}


def shapes_in(folder: Path, weights: tuple[str, ...] = WEIGHTS) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the weights that lie in a folder, in one file or several."""
    single = _present(folder, weights)
    stem = Path(weights[0]).stem
    several = sorted([*folder.glob(f"{stem}-*.safetensors"), *folder.glob(f"{Path(weights[1]).stem}-*.bin")])
    found: dict[str, tuple[int, ...]] = {}
    for path in single[:1] or several:
        found |= (_header(path) or {}) if path.suffix == ".safetensors" else _shapes_of_torch(path)
    return found


def _shapes_of_torch(path: Path) -> dict[str, tuple[int, ...]]:
    held: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: tuple(value.shape) for name, value in held.items() if hasattr(value, "shape")}


def _shared_names(model: nn.Module) -> set[str]:
    """Names of weights that lie in the memory of others, of which one is saved, and of what is not saved at all."""
    seen: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        seen.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), []).append(name)
    shared = {name for names in seen.values() if len(names) > 1 for name in names}
    patterns = [*(getattr(model, "_keys_to_ignore_on_save", None) or ())]
    return shared | {name for name in model.state_dict() if any(re.search(p, name) for p in patterns)}


def _adapter_faults(folder: Path, model: nn.Module, unseen: str | None) -> list[str]:
    import peft

    reasons = []
    if lost := left_out_by_peft(model):
        reasons.append(
            f"{len(lost)} weights that train belong to no adapter ({lost[0]}, ...), so it does not hold them"
        )
    for name, config in model.peft_config.items():
        if name == unseen:
            continue
        inside = folder / name
        part = inside if (inside / "adapter_config.json").is_file() else folder
        theirs = read_json(part / "adapter_config.json") or {}
        ours = config.to_dict()
        for key in ("peft_type", "lora_alpha", "use_rslora", "alpha_pattern"):
            mine = getattr(ours.get(key), "value", ours.get(key))
            if key in theirs and key in ours and theirs[key] != mine:
                reasons.append(f"its adapter {name!r} has {key}={theirs[key]!r}, this one {mine!r}")
        expected = peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        shapes = {key: tuple(value.shape) for key, value in expected.items()}
        found = shapes_in(part, ADAPTER_WEIGHTS)
        embeddings = {key for key in found.keys() - shapes.keys() if re.search(r"embed|lm_head|wte", key)}
        reasons += _differences({key: found[key] for key in found.keys() - embeddings}, shapes, optional=set())
    return reasons


def _differences(found: dict, expected: dict, optional: set[str]) -> list[str]:
    """At most one sentence of each kind."""
    missing = sorted(expected.keys() - found.keys() - optional)
    unknown = sorted(found.keys() - expected.keys() - optional)
    other = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    reasons = []
    if other:
        name = other[0]
        reasons.append(f"{name} has the shape {found[name]} there and {expected[name]} here{_and_more(other)}")
    if missing:
        reasons.append(f"it lacks {missing[0]}{_and_more(missing)}")
    if unknown:
        reasons.append(f"it has {unknown[0]}, which this model has not{_and_more(unknown)}")
    return reasons


def _and_more(names: list[str]) -> str:
    return f" ({len(names) - 1} more)" if len(names) > 1 else ""


_OF_KINDS = ("betas", "momentum", "alpha", "beta1", "rho")  # options that tell one kind of optimizer from another


def check_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    """Raise Unfit where optimizer.pt is of another kind of optimizer, or of other parameters."""
    path = folder / "optimizer.pt"
    if not path.is_file():
        return
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
    ours = optimizer.state_dict()["param_groups"]
    counts = [[len(group["params"]) for group in groups] for groups in (saved, ours)]
    reason = ""
    if counts[0] != counts[1]:
        there, here = (f"{sum(count)} in {len(count)} groups" for count in counts)
        reason = f"of other parameters: {there} there, {here} here"
    elif lacking := [key for key in _OF_KINDS if key in ours[0] and key not in saved[0]]:
        name = type(getattr(optimizer, "optimizer", optimizer)).__name__  # accelerate wraps it
        reason = f"of another optimizer than {name}: it has no {', '.join(lacking)}"
    if reason:
        raise Unfit(f"resume_from_checkpoint={str(folder)!r}: optimizer.pt is {reason}")


# --- weights that are saved under other names ----------------------------------------------------------------------


def is_renamed(folder: Path, model: nn.Module) -> bool:
    """Whether the weights lie there under other names than the model computes with, as those of experts do, which
    Trainer would leave out."""
    if is_peft_model(model) or is_sharded(folder) or not isinstance(model, transformers.PreTrainedModel):
        return False
    return not shapes_in(folder).keys() <= model.state_dict().keys()


def load_renamed(folder: Path, model: Any) -> None:
    """Load such weights as `from_pretrained` does; takes the memory of a second model for a moment."""
    loaded = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())


def loads_renamed(trainer, folder: Path, model: nn.Module) -> bool:
    """Whether a Trainer's weights lie under other names, which have been loaded then."""
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    renamed = not sharded and is_renamed(folder, model)
    if renamed:
        load_renamed(folder, model)
    return renamed
