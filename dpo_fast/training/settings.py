"""What each key of `FastDPOConfig` may hold: the type that it is declared with, and a range where not all of it makes
sense. transformers declares types, too, but takes "no" for a bool, which is true, and 2.0 for a decay of Adam's."""

import enum
import functools
import json
import math
import numbers
import os
import sys
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dpo_fast.ops.checks import check_flag, describe, is_number

from .keys import PATH_OR_MAPPING, Key, accepted, keys_of, takes

MAX_INT = 2**31 - 1


class Range(NamedTuple):
    low: float
    high: float = math.inf
    above: bool = False  # low itself is none of it
    below: bool = False  # nor high
    infinite: bool = False

    def holds(self, value) -> bool:
        inside = self.low <= value <= self.high and (self.infinite or abs(value) <= sys.float_info.max)
        return inside and not (self.above and value == self.low) and not (self.below and value == self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"{'above' if self.above else 'from'} {self.low:g} {'and below' if self.below else 'to'} {self.high}"
        return f"{'above' if self.above else 'at least'} {self.low:g}"


_ONE, _ZERO, _SHARE = Range(1), Range(0), Range(0, 1, below=True)
RANGES = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "max_length",
            "max_prompt_length",
            "max_completion_length",
            "tokens_per_batch",
            "pad_to_multiple_of",
            "dataset_num_proc",
            "precompute_ref_batch_size",
            "tile_mib",
            "eval_accumulation_steps",
            "torch_empty_cache_steps",
            "dataloader_prefetch_factor",
            "ddp_bucket_cap_mb",
            "ddp_timeout",
        ),
        _ONE,
    ),
    **dict.fromkeys(
        (
            "learning_rate",
            "weight_decay",
            "adam_epsilon",
            "warmup_steps",
            "warmup_ratio",
            "logging_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "eval_delay",
            "neftune_noise_alpha",
            "router_aux_loss_coef",
            "dataloader_num_workers",
        ),
        _ZERO,
    ),
    "max_grad_norm": Range(0, infinite=True),  # infinity: it is reported, and nothing is clipped
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "num_train_epochs": Range(-math.inf),  # where max_steps is given, any
    "max_steps": Range(-1),
    "seed": Range(0, 2**32 - 1),  # of NumPy
    "data_seed": Range(0, 2**63 - 1),
}
NAMES = {"include_num_input_tokens_seen": ("no", "all", "non_padding")}  # which transformers does not declare
CAN_BE_NONE = {"max_grad_norm", "debug"}  # whatever they are declared as
# `Objective` checks the losses, which may be functions. DeepSpeed's settings may be JSON in base64
CHECKED_ELSEWHERE = {"loss_type", "loss_weights", "ld_alpha", "extra_metrics", "deepspeed"}


@functools.cache
def _keys(config: type) -> dict[str, Key]:
    return keys_of(config)


def check(settings, config: type) -> None:
    """Raise TypeError or ValueError for the first field of `settings`, which is a `config`, that does not hold what is
    declared. NumPy's numbers become Python's."""
    for name, key in _keys(config).items():
        if name not in CHECKED_ELSEWHERE:
            value = getattr(settings, name)
            found = _checked(key, value)
            if found is not value:
                setattr(settings, name, found)


def _checked(key: Key, value) -> Any:
    """The value, or TypeError or ValueError, with the key's name."""
    if value is None:
        if type(None) not in key.types and key.name not in CAN_BE_NONE:
            raise TypeError(_sentence(key, value))
        return value
    if takes(key, bool) and not isinstance(value, (str, list)):
        try:
            return check_flag("", key.name, value)
        except TypeError:
            raise TypeError(_sentence(key, value)) from None
    if is_number(value) and (takes(key, float) or takes(key, int)):
        return _number(key, value)
    if isinstance(value, (str, os.PathLike)) and takes(key, str) and not takes(key, dict):
        return _name(key, value)
    if isinstance(value, (list, tuple)) and takes(key, list) and all(isinstance(entry, str) for entry in value):
        return value
    if takes(key, dict) and _is_mapping(key, value):
        return value
    others = [kind for kind in key.types if not (isinstance(kind, type) and issubclass(kind, _BASIC))]
    others = [kind for kind in others if typing.get_origin(kind) not in (list, dict)]
    if any(not isinstance(kind, type) or isinstance(value, kind) for kind in others):
        return value
    if key.name == "accelerator_config" and type(value).__name__ == "AcceleratorConfig":  # what it becomes
        return value
    raise TypeError(_sentence(key, value))


_BASIC = (bool, int, float, str, list, dict, type(None))


def _number(key: Key, value) -> Any:
    if not takes(key, float):
        if not isinstance(value, numbers.Integral):
            raise TypeError(_sentence(key, value))
        value = int(value)
    allowed = RANGES.get(key.name, Range(-math.inf))
    too_large = not takes(key, float) and allowed.high == math.inf and abs(value) > MAX_INT
    if too_large or not allowed.holds(value):
        kind = "a finite number" if takes(key, float) and not allowed.infinite else "a number"
        expected = f"{kind}, " if takes(key, float) else ""
        expected += f"at most {MAX_INT}" if too_large else str(allowed)
        expected = "a finite number" if allowed.low == -math.inf and not too_large else expected
        none = " or None" if type(None) in key.types else ""
        raise ValueError(f"{key.name} must be {expected}{none}, got {describe(value)}")
    return value


def _name(key: Key, value) -> Any:
    names = key.names or NAMES.get(key.name, ())
    if names and getattr(value, "value", value) not in names:
        raise ValueError(f"{key.name} must be one of {', '.join(names)}, got {describe(value)}")
    return value


def _is_mapping(key: Key, value) -> bool:
    """A dict, one as JSON, or where a file may hold it, a path."""
    if not isinstance(value, (str, os.PathLike)):
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if not takes(key, str):
        return False
    if str(value).lstrip().startswith("{"):
        try:
            return isinstance(json.loads(str(value)), dict)
        except json.JSONDecodeError:
            return False
    return key.name in PATH_OR_MAPPING and Path(value).is_file()


def _sentence(key: Key, value) -> str:
    words = accepted(key._replace(names=key.names or NAMES.get(key.name, ())))
    for written, python in (("true or false", "True or False"), ("null", "None"), ("{key: value}", "{'key': value}")):
        words = words.replace(written, python)
    return f"{key.name} must be {words}, got {_shown(value)}"


def _shown(value) -> str:
    if isinstance(value, enum.Enum):
        return repr(value.value)
    return describe(value)


def check_names(name: str, value, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is a list of known names."""
    known = list(known)
    if not isinstance(value, (list, tuple)) or any(entry not in known for entry in value):
        raise ValueError(f"{name} must be a list of {', '.join(known)}, got {describe(value)}")


def check_mapping(name: str, value, kind: type) -> None:
    """Raise TypeError or ValueError for a dict that does not fit the dataclass that is made of it."""
    keys = _keys(kind)
    for entry, given in value.items():
        if entry not in keys:
            raise ValueError(f"{name}: unexpected keyword argument {entry!r}; it has {', '.join(keys)}")
        _checked(keys[entry]._replace(name=f"{name}: {entry}"), given)
