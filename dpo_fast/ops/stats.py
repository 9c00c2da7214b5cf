"""What one pass over a row of logits can report about it, and the names of the outputs."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

STATS = ("entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@dataclass(frozen=True)
class TokenStats:
    """Per-token results; a field that was not asked for is None. All have the shape of `labels`, 0 where ignored.

    `logps` is differentiable. The others are not: a backward by way of one raises RuntimeError (in a compiled graph its
    gradients are NaN), but with impl="reference". Logits below are after soft-cap, scale and temperature.
    """

    logps: Tensor  # fp32, log softmax(logits)[label], in nats
    entropy: Tensor | None = None  # fp32, -sum p log p, in nats
    mean_logits: Tensor | None = None  # fp32, mean over the vocabulary
    is_top1: Tensor | None = None  # bool, whether the label is the argmax (the first one, on ties)
    log_sum_sq_probs: Tensor | None = None  # fp32, log sum p^2 (WPO, arXiv:2406.11827, equation 2)

    @classmethod
    def of(cls, logps: Tensor, extras: Tensor, outputs: tuple[str, ...], shape=None) -> "TokenStats":
        """logps (N,), extras (k, N) of the `outputs`, as ops return them; in `shape` where it is given."""
        found = dict(zip(outputs, extras.unbind(0), strict=True))
        if "is_top1" in found:
            found["is_top1"] = found["is_top1"] != 0
        found["logps"] = logps
        return cls(**(found if shape is None else {name: value.view(shape) for name, value in found.items()}))

    def only(self, outputs: Iterable[str], dtype: torch.dtype | None = None) -> "TokenStats":
        """`logps` and the `outputs`, floats in `dtype` where it is given."""
        found = {name: getattr(self, name) for name in ("logps", *outputs)}
        if dtype is not None:
            found = {name: x if x.dtype == torch.bool else x.to(dtype) for name, x in found.items()}
        return TokenStats(**found)


def check_outputs(op: str, outputs) -> tuple[str, ...]:
    """`outputs` as a tuple in the order of STATS; `ValueError` for an unknown name."""
    names = None if isinstance(outputs, str) or not isinstance(outputs, Iterable) else list(outputs)
    if names is None or any(name not in (*STATS, "logps") for name in names):
        raise ValueError(f"{op}: outputs must be a sequence of names from {', '.join(STATS)}, got {outputs!r}")
    return tuple(name for name in STATS if name in names)
