"""Stage 6: `PairLogps` -> metrics as device scalars, one packed reduction and one host sync per logging step.

A metric is a mean, kept as (sum, weight): micro-steps and ranks add up, whatever number of pairs or tokens each holds.
Names are TRL's, and within a micro-step so are the values; between micro-steps TRL takes a mean of means.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .comparisons import Comparisons
from .logps import PairLogps
from .objective import Objective

Metrics = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, weight), both () on the device


class TokenValues(Protocol):
    """What `token_metrics` reads of `TokenStats` or `TokenScores`: (N,) each, or None."""

    @property
    def entropy(self) -> Tensor | None: ...

    @property
    def mean_logits(self) -> Tensor | None: ...

    @property
    def is_top1(self) -> Tensor | None: ...


def pair_metrics(pairs: PairLogps, objective: Objective) -> Metrics:
    """Means over pairs: rewards, their accuracy (strictly greater: 0 at step 0, where they are equal), log-probs."""
    chosen, rejected = objective.rewards(pairs)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": pairs.chosen.detach(),
        "logps/rejected": pairs.rejected.detach(),
    }
    return _means_over_pairs(values)


def _means_over_pairs(values: dict[str, Tensor]) -> Metrics:
    """name -> (P,) values; in one sum and one count, as each is a launch."""
    together = torch.stack(list(values.values()), 1)  # (P, number of names)
    count = together.new_full((), len(together))
    return {name: (total, count) for name, total in zip(values, together.sum(0).unbind(), strict=True)}


def term_metrics(pairs: PairLogps, objective: Objective) -> Metrics:
    """What each of several losses adds, as "loss/<name>"; nothing of a single one. Means over pairs, which a likelihood
    is only where `pairs.mean_chosen_length` is that of all batches: for training."""
    if len(objective.parts) == 1:
        return {}
    return _means_over_pairs({f"loss/{name}": value for name, value in objective.terms(pairs).items()})


def loss_metrics(losses: Tensor, pairs: PairLogps, objective: Objective) -> Metrics:
    """The mean loss as a sum of two means: "loss" over pairs, "likelihood" over chosen tokens. Each adds up over
    batches; a mean over pairs that holds one over tokens does not."""
    losses, weight = losses.detach(), objective.likelihood_weight
    if weight == 0:
        return {"loss": (losses.sum(), losses.new_full((), losses.numel()))}
    likelihood = -weight * pairs.chosen.detach()
    if pairs.weights is not None:
        likelihood = likelihood * pairs.weights
    assert pairs.chosen_lengths is not None  # a likelihood needs lengths
    tokens = pairs.chosen_lengths.to(losses.dtype)
    mean_length = tokens.mean() if pairs.mean_chosen_length is None else pairs.mean_chosen_length
    others = losses - likelihood / mean_length.clamp(min=1e-6)
    return {
        "loss": (others.sum(), losses.new_full((), losses.numel())),
        "likelihood": (likelihood.sum(), tokens.sum()),
    }


def token_metrics(
    stats: TokenValues, sequence_ids: Tensor, num_pairs: int, comparisons: Comparisons | None = None
) -> Metrics:
    """Means over scored tokens, of the statistics that are there: entropy of all, logits of chosen and of rejected,
    top-1 accuracy of chosen. comparisons: None: of pairs. A token counts as chosen once for each comparison
    in which its sequence is the chosen one."""
    if all(value is None for value in (stats.entropy, stats.mean_logits, stats.is_top1)):
        return {}
    if comparisons is None:
        comparisons = Comparisons.make("token_metrics", num_pairs, None, None, sequence_ids.device)
    everything = torch.ones_like(sequence_ids)
    chosen, rejected = comparisons.times()[:, sequence_ids]
    found = {
        "entropy": (stats.entropy, everything),
        "logits/chosen": (stats.mean_logits, chosen),
        "logits/rejected": (stats.mean_logits, rejected),
        "mean_token_accuracy": (stats.is_top1, chosen),
    }
    return {
        name: (torch.where(who > 0, value.detach() * who, 0).sum(), who.sum())  # not a product alone: inf * 0 is NaN
        for name, (value, who) in found.items()
        if value is not None
    }


class MetricSums:
    """Adds metrics up on the device. `add` never synchronises; `means` does, once, and starts over."""

    def __init__(self):
        self.names: list[str] = []
        self.sums: Tensor | None = None  # (2, number of names): sums and weights; fp64 where the device has it

    def add(self, metrics: Metrics) -> None:
        names = list(metrics)
        sums, weights = zip(*metrics.values(), strict=True)
        parts = [*sums, *weights]
        wide = torch.float32 if parts[0].device.type == "mps" else torch.float64
        parts = [part if part.is_floating_point() else part.to(wide) for part in parts]  # counts stay exact
        packed = torch.stack(parts).to(wide).view(2, len(names))
        if self.sums is None:
            self.names, self.sums = names, packed
        elif names == self.names:
            self.sums += packed
        else:
            raise ValueError(f"metrics must keep their names between two logs: had {self.names}, got {names}")

    def means(self, sum_over_ranks: Callable[[Tensor], Tensor] = lambda packed: packed) -> dict[str, float]:
        """Name -> mean. `sum_over_ranks` is called once, with the packed tensor, if there is anything to report: ranks
        must have added metrics alike. A mean over no tokens is 0, as in TRL."""
        if self.sums is None:
            return {}
        sums, weights = sum_over_ranks(self.sums).tolist()
        self.sums = None
        return {n: s / w if w else 0.0 for n, s, w in zip(self.names, sums, weights, strict=True)}
