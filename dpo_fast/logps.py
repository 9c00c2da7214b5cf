"""Stage 4: token log-probs -> sequence log-probs -> `PairLogps`, what every loss and metric is a function of."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """Sequence log-probs of P pairs under the policy and, where there is one, the reference.

    All tensors have shape (P,) and live on one device; log-probs are fp32 sums over the scored completion tokens, in
    nats. Only `chosen` and `rejected` carry gradients.
    """

    chosen: Tensor  # (P,) policy log-prob of the chosen completion
    rejected: Tensor  # (P,)
    ref_chosen: Tensor | None = None  # (P,) the same under the reference; None for reference-free losses
    ref_rejected: Tensor | None = None  # (P,)
    chosen_lengths: Tensor | None = None  # (P,) number of scored tokens
    rejected_lengths: Tensor | None = None  # (P,)
    weights: Tensor | None = None  # (P,) detached factor on each pair's loss (WPO), 1 where None
    # (P,) each: the log-ratios themselves, where they were summed token by token; chosen - ref_chosen would round them
    # to the digits of two long sums. Their gradient is that of `chosen` and `rejected`
    exact_log_ratios: tuple[Tensor, Tensor] | None = None
    # () mean of `chosen_lengths` over the whole batch, for losses normalised by its token count (sft) when this object
    # holds only some of the batch's pairs; None: these pairs are the whole batch
    mean_chosen_length: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0]

    @property
    def chosen_log_ratio(self) -> Tensor:
        """(P,) log(policy / reference) of the chosen completion."""
        if self.exact_log_ratios is not None:
            return _with_gradient_of(self.chosen, self.exact_log_ratios[0])
        return self.chosen - self._reference("ref_chosen")

    @property
    def rejected_log_ratio(self) -> Tensor:
        """(P,) log(policy / reference) of the rejected completion."""
        if self.exact_log_ratios is not None:
            return _with_gradient_of(self.rejected, self.exact_log_ratios[1])
        return self.rejected - self._reference("ref_rejected")

    @property
    def margin(self) -> Tensor:
        """(P,) chosen minus rejected log-ratio: what DPO pushes up."""
        return self.chosen_log_ratio - self.rejected_log_ratio

    @property
    def reference_margin(self) -> Tensor:
        """(P,) chosen minus rejected log-prob under the reference."""
        chosen, rejected = self._reference("ref_chosen"), self._reference("ref_rejected")
        return chosen.to(torch.promote_types(chosen.dtype, self.chosen.dtype)) - rejected

    def first(self, count: int) -> "PairLogps":
        """The first `count` pairs; `mean_chosen_length` stays."""

        def cut(value):
            if isinstance(value, tuple):
                return tuple(map(cut, value))
            return value if value is None or value.ndim == 0 else value[:count]

        return PairLogps(*(cut(getattr(self, field.name)) for field in fields(self)))

    def _reference(self, name: str) -> Tensor:
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this loss needs reference log-probs, but PairLogps.{name} is None")
        return value


def _with_gradient_of(logps: Tensor, exact: Tensor) -> Tensor:
    """`exact` (P,), differentiated as `logps` (P,). An impossible completion is -inf in both, and -inf + inf is NaN."""
    return torch.where(logps.isinf(), logps, exact + (logps - logps.detach()))


def pair_logps(
    sequence_logps: Tensor,
    reference_logps: Tensor | None = None,
    lengths: Tensor | None = None,
    weights: Tensor | None = None,
    exact_log_ratios: tuple[Tensor, Tensor] | None = None,
    mean_chosen_length: Tensor | None = None,
) -> PairLogps:
    """Split `(2P,)` vectors in the order [chosen 0..P-1, rejected 0..P-1] into a `PairLogps`; the rest is as there."""

    def halves(x):  # -> two tensors, or two times None
        return (None, None) if x is None else torch.tensor_split(x, 2)

    chosen, rejected = halves(sequence_logps)
    ref_chosen, ref_rejected = halves(reference_logps)
    chosen_lengths, rejected_lengths = halves(lengths)
    return PairLogps(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        chosen_lengths,
        rejected_lengths,
        weights,
        exact_log_ratios,
        mean_chosen_length,
    )
