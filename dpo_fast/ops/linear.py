"""Level 2: token log-probs from hidden states and the head. No (N, V) tensor exists, whatever the plan (plan.py)."""

import torch
from torch import Tensor

from .call import Call, Head
from .checks import edge_of
from .head_op import head_forward
from .oracle import oracle_logits, oracle_token_stats
from .softmax import Transform
from .stats import STATS, TokenStats


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    tile_mib: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each label under softmax(hidden weight^T + bias), with every gradient.

    hidden: (N, H), weight: (V, H), both of one floating dtype (under autocast they are taken in its dtype); bias: (V,);
    labels: (N,) int64 or int32, in [0, V) or `ignore_index`.
    low_rank: (down, up) of shapes (N, r), (V, r): adds down up^T to the logits. For a LoRA-adapted head, down is
      scaling * lora_A(hidden) and up is lora_B's weight; both get gradients. Where they are in fp32 and hidden is not,
      their product is, too (not under autocast).
    The logits x become `softcap tanh(x scale / softcap) / temperature`. tile_mib: the budget for the one tile of logits
    that exists at a time (MiB); None: DPO_FAST_TILE_MIB, or what suits the device, see `ops.plan.plan_head`.

    Returns (N,) fp32 in nats, exactly 0 where ignored. Differentiable in hidden, weight, bias, down and up; where the
    head does not train, a backward costs no GEMM (its work is done in the forward, see `frozen`).

    Raises TypeError for dtypes, ValueError for shapes, devices, an `impl` that cannot run, and labels out of range.
    """
    op = "linear_token_logps"
    head = Head.make(op, hidden, weight, bias, low_rank, labels)
    transform = Transform.make(op, logit_softcap, temperature, logit_scale)
    return head_stats(op, head, labels, Call.of_head(op, head, (), transform, ignore_index, tile_mib, impl)).logps


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    outputs=STATS,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    tile_mib: int | None = None,
    impl: str = "auto",
) -> TokenStats:
    """As `linear_token_logps`, and from the same tiles the statistics named in `outputs` (see `TokenStats`)."""
    op = "linear_token_stats"
    head = Head.make(op, hidden, weight, bias, low_rank, labels)
    transform = Transform.make(op, logit_softcap, temperature, logit_scale)
    return head_stats(op, head, labels, Call.of_head(op, head, outputs, transform, ignore_index, tile_mib, impl))


def head_stats(op: str, head: Head, labels: Tensor, call: Call) -> TokenStats:
    """What the public functions return, for a call that is checked. labels: (N,)."""
    if call.impl == "reference":
        head.check_values(op, labels, call.ignore_index)
        low_rank = None if head.down is None else (head.down, head.up)
        knobs = dict(ignore_index=call.ignore_index, **call.transform.oracle)
        stats = oracle_token_stats(oracle_logits(*head[:3], low_rank), labels, **knobs)
        return stats.only(call.outputs, torch.promote_types(head.hidden.dtype, torch.float32))
    edge = edge_of(head.hidden, head.down) if call.plan == "frozen" else None
    logps, _, extras, *_ = head_forward(*head, labels, *call.flat(), edge)
    return TokenStats.of(logps, extras, call.outputs)
