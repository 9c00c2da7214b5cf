"""Checks of what comes into a public op: shapes, dtypes and devices always, values where looking costs no sync.

Values of CPU tensors are always checked. On other devices a look would stop the stream, so a label out of range makes
its row NaN there (it is never used as an address), unless checking is on: DPO_FAST_CHECK=1, which also refuses
non-finite inputs on every device.
"""

import math
import numbers
import os
import reprlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int64, torch.int32)
# Beyond, a knob, its inverse or its product with large logits leaves fp32's range, and results are NaN
LEAST, LARGEST = 1e-30, 1e30


def checking() -> bool:
    return os.environ.get("DPO_FAST_CHECK", "0") == "1"


def check_tensor(op: str, name: str, value, shape: tuple, dtypes: tuple, device: torch.device | None = None) -> None:
    """`shape` may hold strings, which match any size and stand in the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"the layout {str(value.layout).removeprefix('torch.')}"
        raise TypeError(f"{op}: {name} must be a dense tensor, got {kind}; give {name}.to_dense(), or pad it")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {name} must have one of the dtypes {expected}, got {str(value.dtype)[6:]}")
    fits = value.ndim == len(shape)
    for have, want in zip(value.shape, shape, strict=False):
        fits = fits and (isinstance(want, str) or have == want)
    if not fits:
        raise ValueError(f"{op}: {name} must have shape ({', '.join(map(str, shape))}), got {tuple(value.shape)}")
    if device is None and value.device.type == "meta":
        raise ValueError(f"{op}: {name} is on the device meta, where tensors have no values; materialise it first")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, the other inputs are on {device}; move it there")
    # A registered op would drop the tangent, in silence
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{op}: {name} has a tangent, but there is no forward-mode derivative; use backward")


def check_transform(
    op: str, logit_softcap: float | None, temperature: float, logit_scale: float = 1.0
) -> tuple[float | None, float, float]:
    """(softcap, temperature, scale) as Python's numbers, which is what registered ops take."""
    temperature, logit_scale = _number(op, "temperature", temperature), _number(op, "logit_scale", logit_scale)
    _check_positive(op, "temperature", temperature, "a positive number")
    if not -LARGEST <= logit_scale <= LARGEST:
        raise ValueError(f"{op}: logit_scale must be finite, and at most {LARGEST:g}, got {logit_scale}")
    if logit_softcap is None:
        return None, temperature, logit_scale
    logit_softcap = _number(op, "logit_softcap", logit_softcap)
    _check_positive(op, "logit_softcap", logit_softcap, "a positive number or None")
    return logit_softcap, temperature, logit_scale


def _check_positive(op: str, name: str, value: float, expected: str) -> None:
    if not LEAST <= value <= LARGEST:
        between = f", from {LEAST:g} to {LARGEST:g}" if 0 < value < math.inf else ""
        raise ValueError(f"{op}: {name} must be {expected}{between}, got {value}")


def _number(op: str, name: str, value) -> float:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{op}: {name} must be a number, got a tensor, which would get no gradient here. Give {name}.item(), or "
            "where it is learned or differs between tokens, scale hidden states or logits by it"
        )
    is_float = isinstance(value, (float, torch.SymFloat))  # the latter is a number that a compiled graph leaves open
    if is_float:
        return value
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    return _as_float(value)


def is_number(value) -> bool:
    """Whether it is a real number of Python or NumPy, or one that a compiled graph leaves open; bool is none."""
    kinds = (float, numbers.Real, torch.SymFloat, torch.SymInt)
    return isinstance(value, kinds) and not isinstance(value, bool)


def _as_float(value) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return math.inf if value > 0 else -math.inf


def check_flag(where: str, name: str, value) -> bool:
    """True or False, or NumPy's. "no", 2 and tensors, which a condition would take for one of them, are refused."""
    if isinstance(value, bool):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () and value.dtype.kind == "b":
        return bool(value)
    raise TypeError(f"{where}: {name} must be True or False, got {describe(value)}")


def describe(value) -> str:
    """What came, short enough for one line."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    return reprlib.repr(value)


def check_count(where: str, name: str, value, least: int, expected: str = "") -> Any:
    """A number of things as Python's int, or as a compiled graph leaves it open. bool is none."""
    is_integer = isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
    if not (is_integer and least <= value < 2**31):
        expected = expected or f"an int of at least {least}"
        raise ValueError(f"{where}: {name} must be {expected}, got {describe(value)}")
    return value if isinstance(value, torch.SymInt) else int(value)


def check_ignore_index(op: str, value, name: str = "ignore_index") -> int:
    is_integer = isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)
    if not (is_integer and -(2**63) <= value < 2**63):
        raise TypeError(f"{op}: {name} must be an int of 64 bits, got {value!r}")
    return int(value)


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


def edge_of(*inputs: Tensor | None) -> Tensor | None:
    """A zero with a path to the inputs that require gradients: it keeps their graph, but not their memory."""
    with torch.enable_grad():
        parts = [x[:0].sum() for x in inputs if x is not None and x.requires_grad]
        total: Any = sum(parts)  # an int where there are no parts
        return total if parts else None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient, op, *_):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: its gradient has no derivative, which a gradient penalty or a Hessian needs; that of "
            "impl='reference' has one"
        )


def without_derivative(op: str, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
    """`gradient`, as a backward returns it. Where the caller means to differentiate it (create_graph=True), that
    raises: autograd sees no graph behind a gradient whose coefficients are constant, and would take it for one.

    inputs: what it depends on, or the `edge_of` that."""
    return _Once.apply(gradient, op, *inputs) if torch.is_grad_enabled() else gradient


def refuse_statistics(op: str, d_stats: Tensor | None, d_logps: Tensor | None) -> Tensor | None:
    """`d_logps`, as a backward is given it; a gradient by way of the statistics raises RuntimeError.

    d_stats: (number of statistics, N), None where none comes. A compiled graph, in which zeros come in any case, cannot
    raise: there the gradient of such tokens is NaN."""
    if d_stats is None or not len(d_stats):
        return d_logps
    # Before torch 2.13 the tracing of a backward does not count as compiling: its tensors tell
    if torch.compiler.is_compiling() or type(d_stats) is not Tensor:
        assert d_logps is not None  # as zeros come
        return d_logps.masked_fill((d_stats != 0).any(0), torch.nan)
    raise RuntimeError(
        f"{op}: a gradient by way of a statistic (entropy, mean_logits or log_sum_sq_probs), which has none. Detach "
        "it; or, for a loss that contains it, use impl='reference', which differentiates all"
    )


def check_finite(op: str, **tensors: Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and not torch.isfinite(value).all():
            bad = value.numel() - int(torch.isfinite(value).sum())
            raise ValueError(f"{op}: {name} holds {bad} non-finite of {value.numel()} values (DPO_FAST_CHECK=1)")
