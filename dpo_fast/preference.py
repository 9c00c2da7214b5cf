"""Level 3: hidden states of P pairs to their preference loss, no logits, in the fewest GEMMs the mathematics allows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .comparisons import Comparisons
from .logps import PairLogps
from .objective import Objective
from .ops.call import Call, Head
from .ops.dispatch import choose_impl
from .ops.linear import head_stats
from .ops.pairwise import OwnLeaves, PairwiseLossFunction, group_tokens
from .ops.plan import HeadPlan, oracle_plan
from .ops.softmax import Transform
from .ops.stats import TokenStats, check_outputs
from .terms import PairTerms, check_lengths, check_order


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
    comparisons: Tensor | Sequence[Sequence[int]] | None = None,
    num_sequences: int | None = None,
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
    sequence_order: Sequence[int] | None = None,
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
    comparisons: (P, 2) integers, where pairs are of other sequences: a chosen and a rejected one of S = `num_sequences`
      (None: as many as they name), of which each may be in several, or in none. Given on the host, or read there.
      Results (P,) are in their order; sequence_ids are in [0, S), and reference_logps and sequence_lengths of S.
    reference_logps: (2P,) sums under the reference, or a pair of (P,); or reference_token_logps: (N,) token log-probs,
      from which log-ratios are summed token by token, which keeps digits that two long sums lose. None where no loss
      needs a reference.
    loss, loss_weights, beta, label_smoothing, params: an `Objective`, or what makes one (names, functions ...).
    ld_alpha: LD-DPO's weight of tokens beyond the shorter completion; not where a sequence is in several comparisons.
    use_weighting: WPO's weights of pairs.
    sequence_lengths: host-side token counts of the 2P sequences, ignored tokens included; on an accelerator it saves
      the synchronisation that counting costs.
    sequence_order: host-side, where the tokens of each sequence are one run: all sequences in the order of these runs.
      On an accelerator it saves sorting, and gathering, tokens that come pair by pair.
    mean_chosen_length: chosen tokens per pair, on average over all that is averaged in the end, where that is more than
      these P pairs (micro-batches, ranks): what losses with a likelihood (sft, cpo, orpo) divide by.

    `out.loss.backward()` gives the gradients of hidden, weight, bias and low_rank. The plan is `ops.plan.plan_head`'s.
    In `pairwise` and `pending` the gradients are computed in the forward: a second backward raises RuntimeError, and so
    does one through the log-probs of the result. A loss function's own parameters get their gradients in each. Under
    `torch.compile` a head that trains takes `recompute`: one GEMM more, no graph break.

    Raises TypeError for dtypes, ValueError for shapes, devices, ids and labels out of range, and what losses refuse.
    """
    op = "linear_preference_loss"
    knobs = dict(weights=loss_weights, use_weighting=use_weighting, beta=beta, label_smoothing=label_smoothing)
    objective = Objective.of(op, loss, ld_alpha, **knobs, **params)
    head = Head.make(op, hidden, weight, bias, low_rank, labels)
    transform = Transform.make(op, logit_softcap, temperature, logit_scale)
    call = Call.of_head(op, head, outputs, transform, ignore_index, tile_mib, impl)
    asked = call.outputs
    if objective.use_weighting and "log_sum_sq_probs" not in asked:
        call = replace(call, outputs=(*asked, "log_sum_sq_probs"))
    scored = labels != call.ignore_index
    who = Comparisons.make(op, num_pairs, comparisons, num_sequences, hidden.device)
    terms = PairTerms.make(
        op,
        objective,
        scored,
        sequence_ids,
        who,
        reference_logps,
        reference_token_logps,
        mean_chosen_length,
        torch.promote_types(hidden.dtype, torch.float32),
        call.impl,
    )
    sequence_lengths = check_lengths(op, sequence_ids, who.num_sequences, sequence_lengths)
    sequence_order = check_order(op, sequence_ids, who.num_sequences, sequence_order)

    hidden_grad, head_grad = head.gradients()
    compiling = torch.compiler.is_compiling()
    separable = head_grad and not objective.couples_pairs and call.impl != "reference" and not compiling
    tokens = None
    if separable:
        tokens = group_tokens(labels, scored, sequence_ids, who, terms.weights, sequence_lengths, sequence_order)
    needs = dict(hidden_grad=hidden_grad, head_grad=head_grad)
    if call.impl == "reference":
        plan = oracle_plan(*head.sizes(), **needs)
    else:
        plan = call.plan_of(
            head.sizes(),
            hidden.device,
            **needs,
            separable=separable,
            pair_lengths=[sum(size) for size in tokens.sizes] if tokens is not None else None,
            sequences=max(map(len, tokens.sizes)) if tokens is not None else 2,
        )
    if plan.name not in ("pairwise", "pending"):
        return _output(terms, head_stats(op, head, labels, call), sequence_ids, asked, plan)

    head.check_values(op, labels, call.ignore_index)
    own: dict[Tensor, Tensor] = {}
    value, losses, logps, extras = PairwiseLossFunction.apply(
        *head, tokens, replace(call, plan=plan.name), plan.chunk_rows, terms.losses, own
    )
    if own:
        value = OwnLeaves.apply(value, list(own.values()), *own)
    return _output(terms, TokenStats.of(logps, extras, call.outputs), sequence_ids, asked, plan, value, losses)


def preference_from_stats(
    stats: TokenStats,
    sequence_ids: Tensor,
    num_pairs: int,
    *,
    loss: Objective,
    comparisons: Tensor | Sequence[Sequence[int]] | None = None,
    num_sequences: int | None = None,
    reference_logps: Tensor | None = None,
    reference_token_logps: Tensor | None = None,
    mean_chosen_length: Tensor | float | None = None,
    outputs: Sequence[str] = (),
    impl: str = "auto",
) -> PreferenceOutput:
    """`linear_preference_loss` for tokens that are scored already, none of them ignored. Everything in `stats.logps`'
    graph is differentiable; `plan` is None. With WPO's weights, `stats` must hold log_sum_sq_probs."""
    op = "preference_from_stats"
    impl = choose_impl(op, impl, stats.logps.device, stats.logps.dtype)
    scored = torch.ones_like(sequence_ids, dtype=torch.bool)
    terms = PairTerms.make(
        op,
        loss,
        scored,
        sequence_ids,
        Comparisons.make(op, num_pairs, comparisons, num_sequences, scored.device),
        reference_logps,
        reference_token_logps,
        mean_chosen_length,
        stats.logps.dtype,
        impl,
    )
    return _output(terms, stats, sequence_ids, check_outputs(op, outputs), None)


def _output(terms: PairTerms, stats, sequence_ids, asked, plan, loss=None, losses=None) -> PreferenceOutput:
    """The result for the whole batch; the loss is composed here where the head's op has not computed it."""
    pairs = terms.whole(stats, sequence_ids)
    if loss is None:
        losses = terms.objective(pairs)
        loss = losses.mean()
    return PreferenceOutput(loss, losses, pairs, stats.only(asked), *terms.objective.rewards(pairs), plan)
