"""DPO as a composition of functions. Read this first: everything else is one of these lines, made fast.

    attach(policy), attach(reference)
    objective = Objective("sigmoid", beta=0.1)

    with torch.no_grad():
        ref = score(reference, batch).logps                      # (2P,)
    step = preference_step(policy, batch, objective, ref)
    step.loss.backward()

`batch` is a `PreferenceBatch` of P pairs and N scored tokens, see `batch.py`. The order of sequences is
[chosen 0..P-1, rejected 0..P-1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .batch import PreferenceBatch
from .forward import TokenScores
from .logps import PairLogps, pair_logps
from .metrics import Metrics, pair_metrics, token_metrics
from .objective import Objective, ld_dpo_token_weights, wpo_weights
from .ops.sequence import sequence_logps

# metrics that cost an extra statistic of each row of logits: name -> what `model(batch)` must put out for it
EXTRA_METRICS = {"entropy": "entropy", "logits": "mean_logits", "mean_token_accuracy": "is_top1"}


@dataclass(frozen=True)
class SequenceScores:
    """A model's view of a batch."""

    logps: Tensor  # (2P,) fp32, in nats
    tokens: TokenScores  # (N,) each


@dataclass(frozen=True)
class PreferenceStep:
    """What one batch yields."""

    losses: Tensor  # (P,) with gradients
    pairs: PairLogps
    tokens: TokenScores

    @property
    def loss(self) -> Tensor:
        return self.losses.mean()


def score(
    model: nn.Module, batch: PreferenceBatch, *, outputs: Sequence[str] = (), ld_alpha: float | None = None
) -> SequenceScores:
    """Log-probs of all sequences of a batch under an attached model; with `ld_alpha`, weighted as in LD-DPO."""
    tokens = model(batch, outputs=tuple(outputs))
    weights = None
    if ld_alpha is not None:
        weights = ld_dpo_token_weights(batch.sequence_ids, batch.lengths, ld_alpha)
    return SequenceScores(sequence_logps(tokens.logps, batch.sequence_ids, len(batch.lengths), weights=weights), tokens)


def preference_step(
    model: nn.Module,
    batch: PreferenceBatch,
    objective: Objective,
    reference_logps: Tensor | None = None,
    *,
    ld_alpha: float | None = None,
    extra_metrics: Sequence[str] = (),
) -> PreferenceStep:
    """Score the batch with the policy and apply the objective.

    reference_logps: (2P,) from `score` of the reference, under the same `ld_alpha`; None for losses without reference.
    """
    outputs = [EXTRA_METRICS[name] for name in extra_metrics]
    if objective.use_weighting:
        outputs.append("log_sum_sq_probs")
    scores = score(model, batch, outputs=outputs, ld_alpha=ld_alpha)
    weights = on_policy_weights(scores.tokens, batch) if objective.use_weighting else None
    pairs = pair_logps(scores.logps, reference_logps, batch.lengths, weights)
    return PreferenceStep(objective(pairs), pairs, scores.tokens)


def on_policy_weights(tokens: TokenScores, batch: PreferenceBatch) -> Tensor:
    """(P,) weights of pairs by how likely the policy is to produce them (WPO)."""
    aligned = tokens.logps.detach() - tokens.log_sum_sq_probs  # (N,)
    return wpo_weights(sequence_logps(aligned, batch.sequence_ids, len(batch.lengths)), batch.lengths)


def step_metrics(step: PreferenceStep, batch: PreferenceBatch, objective: Objective) -> Metrics:
    """Metrics of a step as sums on the device: nothing waits for them."""
    return {**pair_metrics(step.pairs, objective), **token_metrics(step.tokens, batch.sequence_ids, batch.num_pairs)}
