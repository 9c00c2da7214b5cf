"""Checks of what comes into a public op: shapes, dtypes and devices always, values where looking costs no sync.

Values of CPU tensors are always checked. On other devices a look would stop the stream, so a label out of range makes
its row NaN there (it is never used as an address), unless checking is on: DPO_FAST_CHECK=1, which also refuses
non-finite inputs on every device.
"""

import math
import os

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def checking() -> bool:
    return os.environ.get("DPO_FAST_CHECK", "0") == "1"


def check_tensor(op: str, name: str, value, shape: tuple, dtypes: tuple, device: torch.device | None = None) -> None:
    """`shape` may hold strings, which match any size and stand in the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must have one of the dtypes {expected}, got {str(value.dtype)[6:]}")
    fits = value.ndim == len(shape) and all(
        isinstance(want, str) or have == want for have, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} must have shape ({', '.join(map(str, shape))}), got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, the other inputs are on {device}; move it there")


def check_transform(op: str, logit_softcap: float | None, temperature: float, logit_scale: float = 1.0) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{op}: temperature must be a positive number, got {temperature}")
    if logit_softcap is not None and not (math.isfinite(logit_softcap) and logit_softcap > 0):
        raise ValueError(f"{op}: logit_softcap must be a positive number or None, got {logit_softcap}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"{op}: logit_scale must be finite, got {logit_scale}")


def check_labels(op: str, labels: Tensor, vocab: int, ignore_index: int) -> None:
    """Every label is `ignore_index` or in [0, vocab). Looks at the values: call it from an implementation, where
    tensors are real, and on CPU or when checking is on."""
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        first = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{op}: {int(wrong.sum())} of {labels.numel()} labels are outside [0, {vocab}) and not "
            f"ignore_index={ignore_index}; the first is {labels[tuple(first)].item()} at index {first}"
        )


def check_finite(op: str, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and not torch.isfinite(value).all():
            bad = value.numel() - int(torch.isfinite(value).sum())
            raise ValueError(f"{op}: {name} holds {bad} non-finite of {value.numel()} values (DPO_FAST_CHECK=1)")
