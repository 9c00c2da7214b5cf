"""Token log-probs -> sequence log-probs, chosen and rejected together, in a fixed order of summation."""

import torch
from torch import Tensor

from .checks import check_count, check_tensor
from .dispatch import choose_impl, free_to_look, implementation, readable
from .oracle import oracle_sequence_logps

_VALUES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def sequence_logps(
    token_logps: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    weights: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Sum of (weighted) token log-probs of each sequence: partial sums in fp64, one rounding at the end.

    token_logps: (N,) floating; sequence_ids: (N,) int64 in [0, num_sequences), in any order; weights: (N,) floating,
    not differentiable. Two runs on one device agree to the last bit.

    Returns (num_sequences,) fp32 (fp64 for fp64 input), 0 for a sequence without tokens.
    """
    op = "sequence_logps"
    check_tensor(op, "token_logps", token_logps, ("N",), _VALUES)
    check_tensor(op, "sequence_ids", sequence_ids, tuple(token_logps.shape), (torch.int64,), token_logps.device)
    if weights is not None:
        check_tensor(op, "weights", weights, tuple(token_logps.shape), _VALUES, token_logps.device)
        if readable(weights) and not weights.isfinite().all():
            raise ValueError(f"{op}: weights must be finite, got {int((~weights.isfinite()).sum())} that are not")
    num_sequences = check_count(op, "num_sequences", num_sequences, 0)
    impl = choose_impl(op, impl, token_logps.device, token_logps.dtype)
    return sequence_sums(token_logps, sequence_ids, num_sequences, weights, impl)


def sequence_sums(
    token_logps: Tensor, sequence_ids: Tensor, num_sequences: int, weights: Tensor | None, impl: str
) -> Tensor:
    """`sequence_logps` of what is checked. impl: that runs."""
    dtype = torch.promote_types(token_logps.dtype, torch.float32)
    if impl == "reference":
        _check_ids(sequence_ids, num_sequences)
        return oracle_sequence_logps(token_logps, sequence_ids, num_sequences, weights).to(dtype)
    # Cast here, not in the op: autograd then casts the gradient back
    weights = None if weights is None else weights.detach().to(dtype)
    return _forward(token_logps.to(dtype), sequence_ids, weights, num_sequences, impl)


def _check_ids(ids: Tensor, num_sequences: int) -> None:
    if free_to_look(ids) and ids.numel() and not (0 <= ids.min() and ids.max() < num_sequences):
        raise ValueError(
            f"sequence_logps: sequence_ids must be in [0, {num_sequences}), got values from {ids.min()} to {ids.max()}"
        )


@torch.library.custom_op("dpo_fast::sequence_logps_fwd", mutates_args=())
def _forward(values: Tensor, ids: Tensor, weights: Tensor | None, num_sequences: int, impl: str) -> Tensor:
    _check_ids(ids, num_sequences)
    return implementation(impl).sequence_sums(values, ids, weights, num_sequences)


@_forward.register_fake
def _(values, ids, weights, num_sequences, impl):
    return values.new_empty((num_sequences,))


def _save(ctx, inputs, output):
    _, ids, weights, _, _ = inputs
    ctx.save_for_backward(ids, weights)


def _differentiate(ctx, d_sums):
    ids, weights = ctx.saved_tensors
    d_values = d_sums[ids]
    return d_values if weights is None else d_values * weights, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
