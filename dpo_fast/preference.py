"""Level 3: hidden states of P pairs to their preference loss, no logits, in the fewest GEMMs the mathematics allows."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .logps import PairLogps, pair_logps
from .objective import Objective, ld_dpo_token_weights, wpo_weights
from .ops.call import Call, Head, Transform
from .ops.checks import check_finite, check_tensor, checking
from .ops.dispatch import choose_impl, device_memory, free_to_look, plan_device
from .ops.linear import head_stats
from .ops.pairwise import OwnLeaves, PairwiseLossFunction, group_tokens
from .ops.plan import HeadPlan, plan_head, reference_plan
from .ops.sequence import sequence_sums
from .ops.stats import STATS, TokenStats, check_outputs

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PreferenceOutput:
    """What `linear_preference_loss` returns. Losses and log-probs carry gradients; where the plan is pairwise or
    pending, `loss` has taken them, and a backward by way of the others raises RuntimeError. Rewards are detached."""

    loss: Tensor  # () fp32, mean of `losses`
    losses: Tensor  # (P,)
    pairs: PairLogps
    stats: TokenStats  # (N,) token log-probs, and the statistics asked for
    chosen_rewards: Tensor  # (P,) beta x log-ratio
    rejected_rewards: Tensor  # (P,)
    plan: HeadPlan | None  # what ran

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
    mean_chosen_length: Tensor | float | None = None,
    outputs: Sequence[str] = (),
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    tile_mib: int | None = None,
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
    sequence_lengths: host-side token counts of the 2P sequences, ignored tokens included; on an accelerator it saves
      the synchronisation that counting costs.
    mean_chosen_length: chosen tokens a pair, on average over all that is averaged in the end, where that is more than
      these P pairs (micro-batches, ranks): what losses with a likelihood (sft, cpo, orpo) divide by.

    `out.loss.backward()` gives the gradients of hidden, weight, bias and low_rank. The plan is `ops.plan.plan_head`'s.
    In `pairwise` and `pending` the gradients are computed in the forward: a second backward raises RuntimeError, and so
    does one through the log-probs of the result. A loss function's own parameters get their gradients in each. Under
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
    elif (loss_weights, use_weighting, beta, label_smoothing, params) != (None, False, 0.1, 0.0, {}):
        raise ValueError(f"{op}: loss is an Objective, which has its own knobs; give loss_weights, beta ... to it")
    asked = check_outputs(op, outputs)
    outputs = tuple(s for s in STATS if s in asked or (s == "log_sum_sq_probs" and objective.use_weighting))
    head = Head.make(op, hidden, weight, bias, low_rank, labels)
    transform = Transform.make(op, logit_softcap, temperature, logit_scale)
    call = Call.of_head(op, head, outputs, transform, ignore_index, tile_mib, impl)
    scored = labels != call.ignore_index
    context = _Context.make(
        op,
        objective,
        scored,
        sequence_ids,
        num_pairs,
        reference_logps,
        reference_token_logps,
        ld_alpha,
        mean_chosen_length,
        torch.promote_types(hidden.dtype, torch.float32),
        call.impl,
    )
    _check_lengths(op, sequence_ids, num_pairs, sequence_lengths)

    hidden_grad, head_grad = head.gradients
    compiling = torch.compiler.is_compiling()
    separable = head_grad and not objective.couples_pairs and call.impl != "reference" and not compiling
    tokens = None
    if separable:
        tokens = group_tokens(labels, sequence_ids, num_pairs, context.weights, call.ignore_index, sequence_lengths)
    needs = dict(hidden_grad=hidden_grad, head_grad=head_grad)
    if call.impl == "reference":
        plan = reference_plan(*head.sizes, **needs)
    else:
        plan = plan_head(
            *head.sizes,
            call.gemm_dtype,
            **needs,
            separable=separable,
            pair_lengths=tokens.pair_lengths if separable else None,
            tile_mib=call.tile_mib,
            device_type=plan_device(call.impl, hidden.device),
            device_memory=None if compiling else device_memory(hidden.device),
        )
    if plan.name not in ("pairwise", "pending"):
        return context.output(head_stats(op, head, labels, call), sequence_ids, asked, plan)

    head.check_values(op, labels, call.ignore_index)
    own: dict[Tensor, Tensor] = {}
    value, losses, logps, extras = PairwiseLossFunction.apply(
        *head, tokens, replace(call, plan=plan.name), plan.chunk_rows, context.losses, own
    )
    if own:
        value = OwnLeaves.apply(value, list(own.values()), *own)
    return context.output(TokenStats.of(logps, extras, outputs), sequence_ids, asked, plan, value, losses)


def preference_from_stats(
    stats: TokenStats,
    sequence_ids: Tensor,
    num_pairs: int,
    *,
    loss: Objective,
    reference_logps: Tensor | None = None,
    reference_token_logps: Tensor | None = None,
    ld_alpha: float | None = None,
    mean_chosen_length: Tensor | float | None = None,
    outputs: Sequence[str] = (),
    impl: str = "auto",
) -> PreferenceOutput:
    """`linear_preference_loss` for tokens that are scored already, none of them ignored. Everything in `stats.logps`'
    graph is differentiable; `plan` is None. With WPO's weights, `stats` must hold log_sum_sq_probs."""
    op = "preference_from_stats"
    impl = choose_impl(op, impl, stats.logps.device, stats.logps.dtype)
    scored = torch.ones_like(sequence_ids, dtype=torch.bool)
    context = _Context.make(
        op,
        loss,
        scored,
        sequence_ids,
        num_pairs,
        reference_logps,
        reference_token_logps,
        ld_alpha,
        mean_chosen_length,
        stats.logps.dtype,
        impl,
    )
    return context.output(stats, sequence_ids, check_outputs(op, outputs), None)


@dataclass(frozen=True)
class _Context:
    """What turns scored tokens of some pairs into their `PairLogps`: the same for a chunk and for the whole batch."""

    objective: Objective
    scored: Tensor  # (N,) bool
    counts: Tensor  # (2P,) scored tokens
    weights: Tensor | None  # (N,) token weights
    reference_tokens: Tensor | None  # (N,)
    reference: Tensor | None  # (2P,)
    mean_length: Tensor  # (), of chosen completions
    impl: str

    @classmethod
    def make(
        cls,
        op,
        objective,
        scored,
        sequence_ids,
        num_pairs,
        reference_logps,
        reference_tokens,
        ld_alpha,
        mean_length,
        dtype,
        impl,
    ) -> "_Context":
        """Check what is about pairs, and count the `scored` (N,) tokens of each sequence. dtype: of log-probs."""
        objective.check_ld_alpha(ld_alpha)
        _check_pairs(op, scored, sequence_ids, num_pairs)
        reference = _reference(op, objective, scored, num_pairs, reference_logps, reference_tokens)
        counts = torch.zeros(2 * num_pairs, dtype=torch.int64, device=scored.device).index_add_(
            0, sequence_ids, scored.to(torch.int64)
        )
        weights = None if ld_alpha is None else ld_dpo_token_weights(sequence_ids, counts, ld_alpha, scored, dtype)
        reference_tokens = None if reference_tokens is None else reference_tokens.detach()
        wide = torch.float32 if scored.device.type == "mps" else torch.float64
        if mean_length is None:
            mean_length = counts[:num_pairs].to(wide).mean()
        elif isinstance(mean_length, Tensor):
            check_tensor(op, "mean_chosen_length", mean_length, (), _FLOATS, scored.device)
        elif isinstance(mean_length, numbers.Real) and 0 <= mean_length < math.inf:
            mean_length = torch.full((), mean_length, dtype=wide, device=scored.device)
        else:
            raise ValueError(f"{op}: mean_chosen_length must be a number of tokens or None, got {mean_length!r}")
        return cls(objective, scored, counts, weights, reference_tokens, reference, mean_length, impl)

    def output(self, stats: TokenStats, sequence_ids, asked, plan, loss=None, losses=None) -> PreferenceOutput:
        """The result for the whole batch; the loss is composed here where the head's op has not computed it."""
        P = self.counts.shape[0] // 2
        sums = sequence_sums(stats.logps, sequence_ids, 2 * P, self.weights, self.impl)
        values = {"logps": stats.logps, "log_sum_sq_probs": stats.log_sum_sq_probs}
        pairs = self.pairs(sums, values, sequence_ids, slice(None), slice(0, P))
        if loss is None:
            losses = self.objective(pairs)
            loss = losses.mean()
        return PreferenceOutput(loss, losses, pairs, stats.only(asked), *self.objective.rewards(pairs), plan)

    def losses(self, sums: Tensor, values: dict, ids: Tensor, index, pairs: slice) -> Tensor:
        return self.objective(self.pairs(sums, values, ids, index, pairs))

    def pairs(self, sums: Tensor, values: dict, ids: Tensor, index, pairs: slice) -> PairLogps:
        """sums: (2p,) of the pairs' sequences; values: token values by name, (n,); ids: (n,) in [0, 2p); index: where
        these tokens are among all N."""
        P = self.counts.shape[0] // 2

        def select(x: Tensor) -> Tensor:
            return torch.cat([x[:P][pairs], x[P:][pairs]])

        def total(x, weights):  # Dynamo before torch 2.9 does not trace annotations that are unions
            return sequence_sums(x, ids, sums.shape[0], weights, self.impl)

        logps, counts = values["logps"].detach(), select(self.counts)
        # A wider reference would make everything after it wider than the policy is, in some of the plans
        reference = None if self.reference is None else select(self.reference).to(sums.dtype)
        exact = None
        if self.reference_tokens is not None:
            weights = None if self.weights is None else self.weights[index]
            # Not told from logps == 0, which a certain token has, too
            theirs = torch.where(self.scored[index], self.reference_tokens[index].to(logps.dtype), 0)
            reference = total(theirs, weights)
            exact = tuple(total(logps - theirs, weights).tensor_split(2))
        pair_weights = None
        if self.objective.use_weighting:
            pair_weights = wpo_weights(total(logps - values["log_sum_sq_probs"], None), counts)
        return pair_logps(sums, reference, counts, pair_weights, exact, self.mean_length.to(sums.dtype))


def _check_pairs(op: str, scored: Tensor, ids, num_pairs) -> None:
    if not isinstance(num_pairs, int) or num_pairs < 1:
        raise ValueError(f"{op}: num_pairs must be a positive int, got {num_pairs!r}")
    check_tensor(op, "sequence_ids", ids, (scored.shape[0],), (torch.int64,), scored.device)
    if free_to_look(ids) and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= 2 * num_pairs:
            raise ValueError(
                f"{op}: sequence_ids must be in [0, {2 * num_pairs}) for num_pairs={num_pairs}, got {low} to {high}"
            )


def _check_lengths(op: str, ids: Tensor, num_pairs: int, lengths) -> None:
    if lengths is None:
        return
    N, lengths = ids.shape[0], list(lengths)
    if len(lengths) != 2 * num_pairs or sum(lengths) != N:
        raise ValueError(
            f"{op}: sequence_lengths must be {2 * num_pairs} counts that sum to N={N}, "
            f"got {len(lengths)} that sum to {sum(lengths)}"
        )
    if (free_to_look(ids) or checking()) and not torch.compiler.is_compiling():
        counts = torch.bincount(ids, minlength=2 * num_pairs).tolist()
        if counts != lengths:
            raise ValueError(f"{op}: sequence_lengths must be the counts in sequence_ids, {counts}, got {lengths}")


def _reference(op: str, objective: Objective, scored: Tensor, num_pairs: int, sums, tokens) -> Tensor | None:
    """The (2P,) reference log-probs, checked; None where tokens stand in for them or there are none."""
    if sums is not None and tokens is not None:
        raise ValueError(f"{op}: give reference_logps or reference_token_logps, not both")
    if isinstance(sums, (tuple, list)):
        if len(sums) != 2:
            raise ValueError(f"{op}: reference_logps must be one tensor or a pair of them, got {len(sums)} elements")
        for index, half in enumerate(sums):
            check_tensor(op, f"reference_logps[{index}]", half, (num_pairs,), _FLOATS, scored.device)
        sums = torch.cat([_at_least_fp32(half) for half in sums])  # autocast has no cat of fp16 on CPU
    if tokens is not None:
        check_tensor(op, "reference_token_logps", tokens, tuple(scored.shape), _FLOATS, scored.device)
    elif sums is not None:
        check_tensor(op, "reference_logps", sums, (2 * num_pairs,), _FLOATS, scored.device)
    elif objective.must_have_reference:
        raise ValueError(f"{op}: loss {', '.join(objective.names)} needs reference_logps, got None")
    if checking():
        check_finite(op, reference_logps=sums, reference_token_logps=tokens)
    return None if sums is None else _at_least_fp32(sums)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
