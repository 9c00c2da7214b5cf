"""Stage 4 for pairs: scored tokens -> sums over sequences -> `PairLogps`, for a whole batch or some of its pairs."""

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from .comparisons import Compared, Comparisons
from .logps import PairLogps
from .objective import Objective, wpo_weights
from .ops.checks import check_count, check_finite, check_tensor, checking, describe
from .ops.dispatch import free_to_look
from .ops.sequence import sequence_sums
from .ops.stats import TokenStats

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PairTerms:
    """What turns scored tokens of some pairs into their `PairLogps`: the same for a chunk and for the whole batch."""

    objective: Objective
    comparisons: Comparisons
    scored: Tensor  # (N,) bool
    counts: Tensor  # (S,) scored tokens
    weights: Tensor | None  # (N,) token weights
    reference_tokens: Tensor | None  # (N,)
    reference: Tensor | None  # (S,)
    mean_length: Tensor  # (), of chosen completions
    impl: str

    @classmethod
    def make(
        cls,
        op,
        objective,
        scored,
        sequence_ids,
        comparisons,
        reference_logps,
        reference_tokens,
        mean_length,
        dtype,
        impl,
    ) -> "PairTerms":
        """Check what is about pairs, and count the `scored` (N,) tokens of each sequence. dtype: of log-probs."""
        _check_ids(op, scored, sequence_ids, comparisons)
        if objective.ld_alpha is not None and comparisons.overlap:
            raise ValueError(
                f"{op}: ld_alpha weighs tokens by the length of the other completion, of which a sequence in several "
                "comparisons has several; leave ld_alpha out"
            )
        reference = _reference(op, objective, scored, comparisons, reference_logps, reference_tokens)
        counts = torch.zeros(comparisons.num_sequences, dtype=torch.int64, device=scored.device).index_add_(
            0, sequence_ids, scored.to(torch.int64)
        )
        more = dict(scored=scored, dtype=dtype, comparisons=comparisons.index)
        weights = objective.token_weights(sequence_ids, counts, **more)
        reference_tokens = None if reference_tokens is None else reference_tokens.detach()
        wide = torch.float32 if scored.device.type == "mps" else torch.float64
        if mean_length is None:
            mean_length = counts[comparisons.index[:, 0]].to(wide).mean()
        elif isinstance(mean_length, Tensor):
            check_tensor(op, "mean_chosen_length", mean_length, (), _FLOATS, scored.device)
        elif _is_real(mean_length) and 0 <= mean_length < math.inf:
            mean_length = torch.full((), mean_length, dtype=wide, device=scored.device)
        else:
            raise ValueError(f"{op}: mean_chosen_length must be a number of tokens or None, got {mean_length!r}")
        return cls(objective, comparisons, scored, counts, weights, reference_tokens, reference, mean_length, impl)

    def whole(self, stats: TokenStats, sequence_ids: Tensor) -> PairLogps:
        """Of the whole batch, whose tokens are in the caller's order."""
        sums = sequence_sums(stats.logps, sequence_ids, self.comparisons.num_sequences, self.weights, self.impl)
        values = {"logps": stats.logps, "log_sum_sq_probs": stats.log_sum_sq_probs}
        return self.pairs(sums, values, sequence_ids, slice(None), self.comparisons.whole)

    def losses(self, sums: Tensor, values: dict, ids: Tensor, index, compared: Compared) -> Tensor:
        return self.objective(self.pairs(sums, values, ids, index, compared))

    def pairs(self, sums: Tensor, values: dict, ids: Tensor, index, compared: Compared) -> PairLogps:
        """sums: (s,) of the sequences at hand; values: token values by name, (n,); ids: (n,) in [0, s); index: where
        these tokens are among all N."""

        def total(x, weights):  # Dynamo before torch 2.9 does not trace annotations that are unions
            return sequence_sums(x, ids, sums.shape[0], weights, self.impl)

        logps, counts = values["logps"].detach(), self.counts[compared.sequences]
        # A wider reference would make everything after it wider than the policy is, in some of the plans
        reference = (None, None) if self.reference is None else self.reference.to(sums.dtype)[compared.sequences]
        exact = None
        if self.reference_tokens is not None:
            weights = None if self.weights is None else self.weights[index]
            # Not told from logps == 0, which a certain token has, too
            theirs = torch.where(self.scored[index], self.reference_tokens[index].to(logps.dtype), 0)
            reference = total(theirs, weights)[compared.places]
            exact = tuple(total(logps - theirs, weights)[compared.places])
        pair_weights = None
        if self.objective.use_weighting:
            log_weights = total(logps - values["log_sum_sq_probs"], None)[compared.places]
            pair_weights = wpo_weights(log_weights.flatten(), counts.flatten())
        (chosen, rejected), (ref_chosen, ref_rejected) = sums[compared.places], reference
        chosen_counts, rejected_counts = counts
        return PairLogps(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_counts,
            rejected_counts,
            pair_weights,
            exact,
            self.mean_length.to(sums.dtype),
        )


def _is_real(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_ids(op: str, scored: Tensor, ids, comparisons: Comparisons) -> None:
    check_tensor(op, "sequence_ids", ids, (scored.shape[0],), (torch.int64,), scored.device)
    if free_to_look(ids) and ids.numel() and not torch.compiler.is_compiling():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= comparisons.num_sequences:
            raise ValueError(
                f"{op}: sequence_ids must be in [0, {comparisons.num_sequences}) "
                f"for num_pairs={len(comparisons.index)}, got {low} to {high}"
            )


def check_lengths(op: str, ids: Tensor, num_sequences: int, lengths) -> list[int] | None:
    """The counts as a list of Python's ints, None where they are."""
    if lengths is None:
        return None
    N = ids.shape[0]
    if hasattr(lengths, "tolist") and not (isinstance(lengths, Tensor) and not free_to_look(lengths)):
        lengths = lengths.tolist()
    if not isinstance(lengths, (list, tuple)):
        raise ValueError(f"{op}: sequence_lengths must be a sequence of ints on the host, got {describe(lengths)}")
    lengths = [check_count(op, f"sequence_lengths[{i}]", length, 0) for i, length in enumerate(lengths)]
    if len(lengths) != num_sequences or sum(lengths) != N:
        raise ValueError(
            f"{op}: sequence_lengths must be {num_sequences} counts that sum to N={N}, "
            f"got {len(lengths)} that sum to {sum(lengths)}"
        )
    if (free_to_look(ids) or checking()) and not torch.compiler.is_compiling():
        counts = torch.bincount(ids, minlength=num_sequences).tolist()
        if counts != lengths:
            raise ValueError(f"{op}: sequence_lengths must be the counts in sequence_ids, {counts}, got {lengths}")
    return lengths


def check_order(op: str, ids: Tensor, num_sequences: int, order) -> list[int] | None:
    """The sequences as a list of Python's ints, in the order of their runs of tokens; None where they are."""
    if order is None:
        return None
    ints = isinstance(order, (list, tuple)) and all(type(x) is int for x in order)
    if not ints or sorted(order) != list(range(num_sequences)):
        raise ValueError(
            f"{op}: sequence_order must be a list of all sequences in [0, {num_sequences}), got {describe(order)}"
        )
    if (free_to_look(ids) or checking()) and not torch.compiler.is_compiling():
        runs = ids.unique_consecutive().tolist()
        expected = [sequence for sequence in order if sequence in set(runs)]
        if runs != expected:
            raise ValueError(
                f"{op}: sequence_order must be the order of runs in sequence_ids, {describe(runs)}, "
                f"got {describe(order)}"
            )
    return list(order)


def _reference(op: str, objective: Objective, scored: Tensor, comparisons: Comparisons, sums, tokens) -> Tensor | None:
    """The (S,) reference log-probs, checked; None where tokens stand in for them or there are none."""
    if sums is not None and tokens is not None:
        raise ValueError(f"{op}: give reference_logps or reference_token_logps, not both")
    if isinstance(sums, (tuple, list)):
        if len(sums) != 2 or comparisons.host is not None:
            raise ValueError(
                f"{op}: reference_logps must be one tensor, or for pairs a pair of them, got {len(sums)} elements"
            )
        for index, half in enumerate(sums):
            check_tensor(op, f"reference_logps[{index}]", half, (len(comparisons.index),), _FLOATS, scored.device)
        sums = torch.cat([_at_least_fp32(half) for half in sums])  # autocast has no cat of fp16 on CPU
    if tokens is not None:
        check_tensor(op, "reference_token_logps", tokens, tuple(scored.shape), _FLOATS, scored.device)
    elif sums is not None:
        check_tensor(op, "reference_logps", sums, (comparisons.num_sequences,), _FLOATS, scored.device)
    elif objective.must_have_reference:
        raise ValueError(f"{op}: loss {', '.join(objective.names)} needs reference_logps, got None")
    if checking():
        check_finite(op, reference_logps=sums, reference_token_logps=tokens)
    return None if sums is None else _at_least_fp32(sums)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
