"""DPO as a composition of functions. Read this first: everything else is one of these lines, made fast.

    attach(policy), attach(reference)
    objective = Objective("sigmoid", beta=0.1)

    with torch.no_grad():
        ref = score(reference, batch)                     # log-probs of 2P sequences and their N tokens
    step = preference_step(policy, batch, objective, ref)
    step.loss.backward()

`batch` is a `PreferenceBatch` of P pairs and N scored tokens, see `batch.py`. The order of sequences is
[chosen 0..P-1, rejected 0..P-1], or what its `comparisons` say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .batch import PreferenceBatch
from .forward import TokenScores
from .logps import PairLogps
from .metrics import Metrics, pair_metrics, token_metrics
from .objective import Objective, ld_dpo_token_weights
from .ops.sequence import sequence_logps
from .ops.stats import check_outputs

# metrics that cost an extra statistic of each row of logits: name -> what `model(batch)` must put out for it
EXTRA_METRICS = {"entropy": "entropy", "logits": "mean_logits", "mean_token_accuracy": "is_top1"}


@dataclass(frozen=True)
class SequenceScores:
    """A model's view of a batch."""

    logps: Tensor  # (2P,) fp32, in nats
    tokens: TokenScores | None = None  # (N,) each; None where only the sums were kept


@dataclass(frozen=True)
class PreferenceStep:
    """What one batch yields."""

    loss: Tensor  # () mean over the pairs, with gradients
    losses: Tensor  # (P,)
    pairs: PairLogps
    tokens: TokenScores
    aux_loss: Tensor | None = None  # () with gradients: a mixture of experts' balancing loss, not multiplied


def score(
    model: nn.Module, batch: PreferenceBatch, *, outputs: Sequence[str] = (), ld_alpha: float | None = None
) -> SequenceScores:
    """Log-probs of all sequences of a batch under an attached model; with `ld_alpha`, weighted as in LD-DPO."""
    _check_batch("score", batch)
    return sequence_scores(model(batch, outputs=check_outputs("score", outputs)), batch, ld_alpha)


def sequence_scores(tokens: TokenScores, batch: PreferenceBatch, ld_alpha: float | None = None) -> SequenceScores:
    """The sums over a batch's sequences of what a model gave for its tokens."""
    weights = None
    if ld_alpha is not None:
        dtype, index = tokens.logps.dtype, batch.compared().index
        weights = ld_dpo_token_weights(batch.sequence_ids, batch.lengths, ld_alpha, dtype=dtype, comparisons=index)
    return SequenceScores(sequence_logps(tokens.logps, batch.sequence_ids, len(batch.lengths), weights=weights), tokens)


def preference_step(
    model: nn.Module,
    batch: PreferenceBatch,
    objective: Objective,
    reference: SequenceScores | Tensor | None = None,
    *,
    ld_alpha: float | None = None,
    mean_chosen_length: Tensor | float | None = None,
    extra_metrics: Sequence[str] = (),
    aux_loss: bool = False,
) -> PreferenceStep:
    """Score the batch with the policy and apply the objective, both inside the model's forward.

    reference: `score` of the reference model, or (2P,) log-probs under the same `ld_alpha`; None for losses without
      one. Where token log-probs are at hand, log-ratios are summed token by token, which keeps more digits.
    mean_chosen_length: over all micro-batches and ranks of an optimizer step, see `linear_preference_loss`.
    aux_loss: compute a mixture of experts' balancing loss, too; it is not added to the loss.
    """
    op = "preference_step"
    _check_batch(op, batch)
    if not isinstance(objective, Objective):
        raise TypeError(f"{op}: objective must be an Objective, got {objective!r}")
    if not (reference is None or isinstance(reference, (Tensor, SequenceScores))):
        raise TypeError(f"{op}: reference must be SequenceScores, a tensor or None, got {reference!r}")
    if not isinstance(extra_metrics, (list, tuple, set)) or not set(extra_metrics) <= set(EXTRA_METRICS):
        raise ValueError(f"{op}: extra_metrics must be names of {', '.join(EXTRA_METRICS)}, got {extra_metrics!r}")
    objective = objective.with_ld_alpha(ld_alpha)
    knobs: dict[str, Any] = {"mean_chosen_length": mean_chosen_length}
    if aux_loss:
        knobs["aux_loss"] = True
    if isinstance(reference, Tensor):
        knobs["reference_logps"] = reference
    elif reference is not None and reference.tokens is not None:
        knobs["reference_token_logps"] = reference.tokens.logps
    elif reference is not None:
        knobs["reference_logps"] = reference.logps
    outputs = tuple(EXTRA_METRICS[name] for name in extra_metrics)
    return PreferenceStep(*model(batch, outputs=outputs, objective=objective, **knobs))


def _check_batch(op: str, batch) -> None:
    if not isinstance(batch, dict):
        raise TypeError(f"{op}: batch must be a PreferenceBatch, got {type(batch).__name__}")


def step_metrics(
    step: PreferenceStep, batch: PreferenceBatch, objective: Objective, first: int | None = None
) -> Metrics:
    """Metrics of a step as sums on the device: nothing waits for them. `first`: of that many of its pairs only."""
    losses, pairs, tokens, sequence_ids = step.losses.detach(), step.pairs, step.tokens, batch.sequence_ids
    compared = batch.compared()
    if first is not None:
        losses, pairs = losses[:first], pairs.first(first)
        keep = torch.isin(sequence_ids, compared.index[:first].flatten())
        tokens, sequence_ids = TokenScores._make(x if x is None else x[keep] for x in tokens), sequence_ids[keep]
    pairs_counted = losses.new_full((), losses.numel())
    metrics = {
        "loss": (losses.sum(), pairs_counted),
        **pair_metrics(pairs, objective),
        **token_metrics(tokens, sequence_ids, batch.num_pairs, compared),
    }
    if step.aux_loss is not None:
        metrics["aux_loss"] = step.aux_loss.detach() * losses.numel(), pairs_counted
    return metrics
