"""What is kept of a training run: a dict of plain values, written as results.json, from which pages are made."""

import dataclasses
import enum
import importlib.metadata
import json
import math
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import dpo_fast
from dpo_fast.text import HIDDEN, is_secret, without_assigned_secrets, without_secrets

RESULTS, REPORT = "results.json", "report.html"
KEPT_PAIRS = 2000  # of an evaluation, in results.json
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "triton")
_SEEDS = ("seed", "data_seed", "full_determinism")


class NoRecord(Exception):
    """A directory holds no record of a run; the message is one sentence."""


def versions() -> dict[str, str]:
    """Name -> version, of what is installed."""
    found = {"dpo_fast": dpo_fast.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def settings(args) -> dict:
    """A training's arguments as plain values, without secrets."""
    return {
        field.name: plain(getattr(args, field.name), field.name) for field in dataclasses.fields(args) if field.init
    }


def changed(args) -> list[str]:
    """Names of the arguments that are not at the default of their class."""
    names = []
    for field in dataclasses.fields(args):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if field.init and default is not dataclasses.MISSING and plain(getattr(args, field.name)) != plain(default):
            names.append(field.name)
    return names


def seeds(args) -> dict:
    return {name: getattr(args, name) for name in _SEEDS if getattr(args, name, None) not in (None, False)}


def plain(value, name: str = ""):
    """`value` as JSON holds it; what is called like a secret is hidden."""
    if isinstance(value, str) and value and is_secret(name):
        return HIDDEN
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry, str(key)) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(entry) for entry in value]
    if isinstance(value, str):
        return without_assigned_secrets(without_secrets(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return getattr(value, "__name__", None) or str(value)


def command_line(words: list[str]) -> str:
    """Words as a shell takes them, without secrets."""
    shown, hide = [], False
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        secret = word.startswith("--") and is_secret(name)
        word = without_assigned_secrets(word)  # of a mapping
        shown.append(HIDDEN if hide else f"--{name}={HIDDEN}" if secret and equals else word)
        hide = secret and not equals
    return without_secrets(shlex.join(shown))


def own_command() -> str | None:
    """The command that runs this script; None where it is no script."""
    script = Path(sys.argv[0] if sys.argv else "")
    if script.suffix != ".py" or script.parent.name.endswith("_launcher"):
        return None
    return command_line(["python", *sys.argv])


def peak_memory(device) -> dict | None:
    """Most memory that this process has used so far: of the accelerator's, or of the host's where there is none."""
    import torch

    kind = getattr(torch, device.type, None)
    if hasattr(kind, "max_memory_allocated"):  # CUDA, ROCm, XPU
        return {"mib": kind.max_memory_allocated(device) / 2**20, "of": kind.get_device_name(device)}
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mib": used / (2**20 if sys.platform == "darwin" else 2**10), "of": "the process, with all that it loaded"}


def load(directory: Path) -> dict:
    """The record in a run's directory; raises NoRecord."""
    path = directory / RESULTS if directory.is_dir() else directory
    if not path.exists():
        raise NoRecord(
            f"{directory} holds no {RESULTS}; dpo-fast train and ReportCallback write it"
            if directory.is_dir() else f"there is no directory {str(directory)!r}"
        )  # fmt: skip
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, json.JSONDecodeError) as error:
        raise NoRecord(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if wrong := _what_is_wrong(found):
        raise NoRecord(f"{path} is not of a training: {wrong}")
    return {"log": [], "before": {}, "after": {}, "settings": {}, "versions": {}, "job": {}, **found}


def _what_is_wrong(found) -> str:
    """Why a page cannot be made of what a file holds; "" if it can."""
    log = found.get("log") if isinstance(found, dict) else None
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        return 'it has no list "log" of what a Trainer logs'
    for name in ("before", "after", "settings", "versions", "job"):
        if not isinstance(found.get(name, {}), dict):
            return f"{name!r} is no object"
    for values in (found, *log, found.get("before", {}), found.get("after", {}), found.get("memory") or {}):
        for name, value in values.items():
            if _is_number_by_name(name) and not _is_number(value):
                return f"{name!r} is no number, but {str(value)[:40]!r}"
    how = (found.get("facts") or {}).get("how", [])
    if not all(isinstance(row, list) and len(row) == 3 for row in how):
        return "'how' holds no rows of three"
    return ""


def _is_number_by_name(name: str) -> bool:
    counted = ("step", "steps", "first_step", "seconds", "training_seconds", "mib")
    return name in counted or name.endswith("loss") or "rewards/" in name


def _is_number(value) -> bool:
    try:
        return math.isfinite(float(value)) or isinstance(value, float)
    except (TypeError, ValueError):
        return False
