"""Level 3: hidden states of P pairs to their preference loss, no logits, in the fewest GEMMs the mathematics allows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .logps import PairLogps, pair_logps
from .objective import Objective, ld_dpo_token_weights, wpo_weights
from .ops.checks import check_tensor, check_transform
from .ops.dispatch import choose_impl
from .ops.head import Transform
from .ops.linear import check_head, check_head_values, compute_dtype, linear_token_stats
from .ops.pairwise import Head, PairwiseLossFunction, group_tokens
from .ops.plan import DEFAULT_TILE_MIB, HeadPlan, plan_head
from .ops.sequence import sequence_logps
from .ops.stats import STATS, TokenStats, check_outputs

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PreferenceOutput:
    """What `linear_preference_loss` returns. Log-probs carry gradients unless the plan is pairwise or pending, where
    the loss has taken them; rewards never do."""

    loss: Tensor  # () fp32, mean of `losses`
    losses: Tensor  # (P,)
    pairs: PairLogps
    stats: TokenStats  # (N,) token log-probs, and the statistics asked for
    chosen_rewards: Tensor  # (P,) beta x log-ratio
    rejected_rewards: Tensor  # (P,)
    plan: HeadPlan

    @property
    def chosen_logps(self) -> Tensor:
        """(P,) sequence log-probs."""
        return self.pairs.chosen

    @property
    def rejected_logps(self) -> Tensor:
        """(P,) sequence log-probs."""
        return self.pairs.rejected


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    sequence_ids: Tensor,
    num_pairs: int,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    reference_logps: Tensor | tuple[Tensor, Tensor] | None = None,
    reference_token_logps: Tensor | None = None,
    loss="sigmoid",
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    sequence_lengths: Sequence[int] | None = None,
    outputs: Sequence[str] = (),
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    tile_mib: int = DEFAULT_TILE_MIB,
    impl: str = "auto",
    **params,
) -> PreferenceOutput:
    """Mean preference loss of P pairs from the hidden states that predict their N completion tokens.

    hidden (N, H), weight (V, H), labels (N,), bias, low_rank, the logits' transform, tile_mib: as `linear_token_logps`.
    sequence_ids: (N,) int64 in [0, 2P): pair i's chosen sequence is i, its rejected one P + i. Tokens may come in any
      order. A sequence's log-prob is the sum over its tokens that are not ignored.
    reference_logps: (2P,) sums under the reference, or a pair of (P,); or reference_token_logps: (N,) token log-probs,
      from which log-ratios are summed token by token, which keeps digits that two long sums lose. None where no loss
      needs a reference.
    loss, loss_weights, beta, label_smoothing, params: an `Objective`, or what makes one (names, functions ...).
    ld_alpha: LD-DPO's weight of tokens beyond the shorter completion. use_weighting: WPO's weights of pairs.
    sequence_lengths: host-side token counts of the 2P sequences; on an accelerator it saves the synchronisation that
      counting costs.

    `out.loss.backward()` gives the gradients of hidden, weight, bias and low_rank. The plan is `ops.plan.plan_head`'s.
    In `pairwise` and `pending` the gradients are computed in the forward: a second backward raises RuntimeError. Under
    `torch.compile` a head that trains takes `recompute`: one GEMM more, no graph break.

    Raises TypeError for dtypes, ValueError for shapes, devices, ids and labels out of range, and what losses refuse.
    """
    op = "linear_preference_loss"
    objective = loss
    if not isinstance(loss, Objective):
        objective = Objective(
            loss,
            weights=loss_weights,
            use_weighting=use_weighting,
            beta=beta,
            label_smoothing=label_smoothing,
            **params,
        )
    asked = check_outputs(op, outputs)
    outputs = tuple(s for s in STATS if s in asked or (s == "log_sum_sq_probs" and objective.use_weighting))
    check_head(op, hidden, weight, labels, bias, low_rank, tile_mib)
    check_transform(op, logit_softcap, temperature, logit_scale)
    _check_pairs(op, hidden, sequence_ids, num_pairs, sequence_lengths)
    reference = _reference(op, objective, hidden, num_pairs, reference_logps, reference_token_logps)
    impl = choose_impl(op, impl, hidden.device, hidden.dtype)

    scored = labels != ignore_index
    counts = torch.zeros(2 * num_pairs, dtype=torch.int64, device=hidden.device).index_add_(
        0, sequence_ids, scored.to(torch.int64)
    )
    weights = None if ld_alpha is None else ld_dpo_token_weights(sequence_ids, counts, ld_alpha)
    context = _Context(objective, counts, weights, reference_token_logps, reference, impl)

    down, up = low_rank or (None, None)
    trains = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias, down, up)]
    head_grad = trains[1] or trains[2] or trains[4]
    fused = head_grad and not objective.couples_pairs and impl != "reference" and not torch.compiler.is_compiling()
    tokens = None
    if fused:
        tokens = group_tokens(labels, sequence_ids, num_pairs, weights, ignore_index, sequence_lengths)
    plan = plan_head(
        hidden.shape[0],
        hidden.shape[1],
        weight.shape[0],
        compute_dtype(hidden),
        hidden_grad=trains[0] or trains[3],
        head_grad=head_grad,
        separable=fused,
        longest_pair=tokens.longest_pair if fused else None,
        tile_mib=tile_mib,
        device_type=hidden.device.type,
    )
    if fused:
        check_head_values(op, hidden, weight, labels, ignore_index)
        transform = Transform(logit_scale, logit_softcap, temperature)
        head = Head(plan, transform, outputs, compute_dtype(hidden), impl)
        value, losses, logps, extras = PairwiseLossFunction.apply(
            hidden, weight, bias, down, up, tokens, head, context.losses
        )
        values = {"logps": logps, **dict(zip(outputs, extras.unbind(0), strict=True))}
        if "is_top1" in values:
            values["is_top1"] = values["is_top1"] != 0
        stats = TokenStats(**values)
    else:
        stats = linear_token_stats(
            hidden,
            weight,
            labels,
            outputs=outputs,
            bias=bias,
            low_rank=low_rank,
            ignore_index=ignore_index,
            logit_softcap=logit_softcap,
            logit_scale=logit_scale,
            temperature=temperature,
            tile_mib=tile_mib,
            impl=impl,
        )
    everything = slice(0, num_pairs)
    sums = sequence_logps(stats.logps, sequence_ids, 2 * num_pairs, weights=weights, impl=impl)
    pairs = context.pairs(sums, vars(stats), sequence_ids, slice(None), everything)
    if not fused:
        losses = objective(pairs)
        value = losses.mean()
    chosen_rewards, rejected_rewards = objective.rewards(pairs)
    kept = TokenStats(stats.logps, **{name: getattr(stats, name) for name in asked})
    return PreferenceOutput(value, losses.detach(), pairs, kept, chosen_rewards, rejected_rewards, plan)


@dataclass(frozen=True)
class _Context:
    """What turns scored tokens of some pairs into their `PairLogps`: the same for a chunk and for the whole batch."""

    objective: Objective
    counts: Tensor  # (2P,) scored tokens
    weights: Tensor | None  # (N,) token weights
    reference_tokens: Tensor | None  # (N,)
    reference: Tensor | None  # (2P,)
    impl: str

    def losses(self, sums: Tensor, values: dict, ids: Tensor, index, pairs: slice) -> Tensor:
        return self.objective(self.pairs(sums, values, ids, index, pairs))

    def pairs(self, sums: Tensor, values: dict, ids: Tensor, index, pairs: slice) -> PairLogps:
        """sums: (2p,) of the pairs' sequences; values: token values by name, (n,); ids: (n,) in [0, 2p); index: where
        these tokens are among all N."""
        P = self.counts.shape[0] // 2

        def select(x: Tensor) -> Tensor:
            return torch.cat([x[:P][pairs], x[P:][pairs]])

        def total(x: Tensor, weights: Tensor | None) -> Tensor:
            return sequence_logps(x, ids, sums.shape[0], weights=weights, impl=self.impl)

        logps, counts = values["logps"].detach(), select(self.counts)
        reference = None if self.reference is None else select(self.reference)
        exact = None
        if self.reference_tokens is not None:
            weights = None if self.weights is None else self.weights[index]
            theirs = torch.where(logps == 0, 0, self.reference_tokens[index].to(logps.dtype))
            reference = total(theirs, weights)
            exact = tuple(total(logps - theirs, weights).tensor_split(2))
        pair_weights = None
        if self.objective.use_weighting:
            pair_weights = wpo_weights(total(logps - values["log_sum_sq_probs"], None), counts)
        whole = pair_logps(sums, reference, counts, pair_weights)
        mean_length = self.counts[:P].clamp(min=1).to(sums.dtype).mean()
        return PairLogps(**{**vars(whole), "exact_log_ratios": exact, "mean_chosen_length": mean_length})


def _check_pairs(op: str, hidden: Tensor, ids, num_pairs, lengths) -> None:
    if not isinstance(num_pairs, int) or num_pairs < 1:
        raise ValueError(f"{op}: num_pairs must be a positive int, got {num_pairs!r}")
    check_tensor(op, "sequence_ids", ids, (hidden.shape[0],), (torch.int64,), hidden.device)
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= 2 * num_pairs:
            raise ValueError(
                f"{op}: sequence_ids must be in [0, {2 * num_pairs}) for num_pairs={num_pairs}, got {low} to {high}"
            )
    if lengths is not None and (len(lengths) != 2 * num_pairs or sum(lengths) != hidden.shape[0]):
        raise ValueError(
            f"{op}: sequence_lengths must be {2 * num_pairs} counts that sum to N={hidden.shape[0]}, "
            f"got {len(lengths)} that sum to {sum(lengths)}"
        )


def _reference(op: str, objective: Objective, hidden: Tensor, num_pairs: int, sums, tokens) -> Tensor | None:
    """The (2P,) reference log-probs, checked; None where tokens stand in for them or there are none."""
    if sums is not None and tokens is not None:
        raise ValueError(f"{op}: give reference_logps or reference_token_logps, not both")
    if isinstance(sums, (tuple, list)):
        sums = torch.cat(list(sums))
    if tokens is not None:
        check_tensor(op, "reference_token_logps", tokens, (hidden.shape[0],), _FLOATS, hidden.device)
    elif sums is not None:
        check_tensor(op, "reference_logps", sums, (2 * num_pairs,), _FLOATS, hidden.device)
    elif objective.must_have_reference:
        raise ValueError(f"{op}: loss {', '.join(objective.names)} needs reference_logps, got None")
    return None if sums is None else sums.detach().to(torch.promote_types(sums.dtype, torch.float32))
