"""Level 1: token log-probs from logits.

One read of the logits forward, one read and one write backward; no softmax is stored. The ops are registered with
`torch.library`, so `torch.compile` sees them as built in.
"""

import torch
from torch import Tensor

from .call import Call
from .checks import (
    FLOATS,
    INTEGERS,
    check_finite,
    check_flag,
    check_labels,
    check_tensor,
    checking,
    refuse_statistics,
    without_derivative,
)
from .dispatch import free_to_look, implementation
from .oracle import oracle_token_stats
from .softmax import Transform
from .stats import STATS, TokenStats


def logits_token_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each label under softmax(logits), with gradients for `logits`.

    logits: (..., V) bf16, fp16, fp32 (fp64 except in Triton), any strides; a soft-cap `c` makes them `c tanh(x / c)`,
      then they are divided by `temperature`.
    labels: (...) int64 or int32, each in [0, V) or `ignore_index`.
    inplace_backward: the gradient is written over `logits`, which saves a tensor of its size: read them no more after
      the backward. A second backward then raises. Ignored under `torch.compile`, which plans memory itself.

    Returns (...) fp32 (fp64 for fp64 logits), in nats, exactly 0 where ignored and with zero gradient there. A row of
    all -inf gives -inf. On devices other than the CPU a label out of range gives NaN, unless DPO_FAST_CHECK=1.

    Raises TypeError for dtypes, ValueError for shapes, devices, an `impl` that cannot run, and labels out of range.
    """
    op = "logits_token_logps"
    _check(op, logits, labels)
    transform = Transform.make(op, logit_softcap, temperature)
    call = Call.of_logits(op, logits, (), transform, ignore_index, impl)
    return _token_stats(op, logits, labels, call, inplace_backward).logps


def logits_token_stats(
    logits: Tensor,
    labels: Tensor,
    *,
    outputs=STATS,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    impl: str = "auto",
) -> TokenStats:
    """As `logits_token_logps`, and in the same pass the statistics named in `outputs` (see `TokenStats`)."""
    op = "logits_token_stats"
    _check(op, logits, labels)
    transform = Transform.make(op, logit_softcap, temperature)
    call = Call.of_logits(op, logits, outputs, transform, ignore_index, impl)
    return _token_stats(op, logits, labels, call, inplace_backward)


def _check(op: str, logits: Tensor, labels: Tensor) -> None:
    check_tensor(op, "logits", logits, ("...",) * getattr(logits, "ndim", 1), FLOATS)
    if logits.ndim < 1 or logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits must have shape (..., V) with V >= 1, got {tuple(logits.shape)}")
    check_tensor(op, "labels", labels, tuple(logits.shape[:-1]), INTEGERS, logits.device)


def _token_stats(op: str, logits: Tensor, labels: Tensor, call: Call, inplace_backward: bool) -> TokenStats:
    inplace_backward = check_flag(op, "inplace_backward", inplace_backward)
    if inplace_backward and _may_overlap(logits):
        raise ValueError(
            f"{op}: inplace_backward needs logits with memory of their own, got shape {tuple(logits.shape)} with "
            f"strides {logits.stride()}, as of an expanded tensor"
        )
    if call.impl == "reference":
        _check_values(op, logits, labels, call)
        stats = oracle_token_stats(logits, labels, ignore_index=call.ignore_index, **call.transform.oracle)
        return stats.only(call.outputs, torch.promote_types(logits.dtype, torch.float32))

    # An impl of "torch" must be able to follow the compiler, which cannot overwrite what it saved for the backward
    inplace_backward = inplace_backward and not torch.compiler.is_compiling()
    logps, _, extras = _forward(logits, labels, *call.flat(), inplace_backward)
    return TokenStats.of(logps, extras, call.outputs, labels.shape)


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements may lie in one place: unless each dimension steps over all that the smaller ones span."""
    if x.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


def _check_values(op: str, logits: Tensor, labels: Tensor, call: Call) -> None:
    if free_to_look(labels) or checking():
        check_labels(op, labels, logits.shape[-1], call.ignore_index)
    if checking():
        check_finite(op, logits=logits)


@torch.library.custom_op("dpo_fast::logits_token_logps_fwd", mutates_args=())
def _forward(
    logits: Tensor,
    labels: Tensor,
    floats: list[float],
    ints: list[int],
    text: str,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> logps (N,), [row_max, log_sum] (2, N), the statistics asked for, (k, N); all fp32, or fp64 for fp64 logits.
    floats, ints, text: a `Call`, flat."""
    call = Call.unflat(floats, ints, text)
    _check_values("logits_token_logps", logits, labels, call)
    logps, partition, extras = _empty_results(logits, labels, call)
    out = {"logps": logps, "row_max": partition[0], "log_sum": partition[1]}
    out.update(zip(call.outputs, extras.unbind(0), strict=True))
    if labels.numel() == 0:
        return logps, partition, extras
    implementation(call.impl).token_logps_fwd(logits, labels, out, call)
    return logps, partition, extras


def _empty_results(logits: Tensor, labels: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = labels.numel(), torch.promote_types(logits.dtype, torch.float32)
    return (
        logits.new_empty((rows,), dtype=dtype),
        logits.new_empty((2, rows), dtype=dtype),
        logits.new_empty((len(call.outputs), rows), dtype=dtype),
    )


@_forward.register_fake
def _(logits, labels, floats, ints, text, inplace_backward):
    return _empty_results(logits, labels, Call.unflat(floats, ints, text))


@torch.library.custom_op("dpo_fast::logits_token_logps_bwd", mutates_args=())
def _backward(
    logits: Tensor,
    labels: Tensor,
    partition: Tensor,
    d_logps: Tensor,
    floats: list[float],
    ints: list[int],
    text: str,
) -> Tensor:
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_d_logits(logits, d_logits, labels, partition, d_logps, Call.unflat(floats, ints, text))
    return d_logits


@_backward.register_fake
def _(logits, *_):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("dpo_fast::logits_token_logps_bwd_", mutates_args=("logits",))
def _backward_(
    logits: Tensor,
    labels: Tensor,
    partition: Tensor,
    d_logps: Tensor,
    floats: list[float],
    ints: list[int],
    text: str,
) -> None:
    _write_d_logits(logits, logits, labels, partition, d_logps, Call.unflat(floats, ints, text))


def _write_d_logits(logits, d_logits, labels, partition, d_logps, call: Call) -> None:
    if labels.numel() == 0:
        return
    implementation(call.impl).token_logps_bwd(logits, d_logits, labels, *partition, d_logps.contiguous(), call)


def _save(ctx, inputs, output):
    logits, labels, *ctx.call, ctx.inplace = inputs
    ctx.mark_non_differentiable(partition := output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, partition)


def _differentiate(ctx, d_logps, _d_partition, d_stats):
    d_logps = refuse_statistics("logits_token_stats", d_stats, d_logps)
    if d_logps is None:
        return (None,) * 6
    logits, labels, partition = ctx.saved_tensors  # raises if an in-place backward has overwritten the logits
    arguments = (logits, labels, partition, d_logps, *ctx.call)
    if ctx.inplace:
        _backward_(*arguments)
        d_logits = logits.detach()
    else:
        d_logits = _backward(*arguments)
    return without_derivative("logits_token_logps", d_logits, logits), *(None,) * 5


_forward.register_autograd(_differentiate, setup_context=_save)
