"""Which losses are trained, together and with what knobs: checked once, then called with `PairLogps`.

Also the two weightings that papers put on top of any loss: of tokens (LD-DPO) and of pairs (WPO).
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .comparisons import pairs_of
from .logps import PairLogps
from .losses import LOSSES, LossParams, lengths
from .ops.checks import LARGEST, check_flag, describe, is_number
from .ops.dispatch import readable

_KNOBS = tuple(field.name for field in fields(LossParams))
_UNGIVEN = {"weights": None, "use_weighting": False, **{field.name: field.default for field in fields(LossParams)}}
_COUNTS = (torch.int64, torch.int32, torch.float32, torch.float64)  # 16-bit floats cannot count to 300


class Objective:
    """A checked combination of losses: called with `PairLogps`, gives (P,) losses, whose mean is what is trained.

    loss: a name from `LOSSES`, a function of `PairLogps` that returns (P,), or a sequence of these.
    weights: one number per loss, 1 where None (MPO, arXiv:2411.10442). use_weighting: `PairLogps.weights` will be set
      (WPO). ld_alpha: weight of the tokens beyond the shorter completion (LD-DPO), None: all count alike. Further
      keywords are `LossParams`. A function counts as one of the whole batch and as in need of a
      reference and of lengths, unless its attributes `couples_pairs`, `needs_reference`, `needs_lengths` say otherwise.
      One with `function.couples_pairs = False` is called with some of the pairs at a time: a head that trains then
      costs a GEMM less. Tensors of the function's own that require gradients (a learned beta) get theirs.
    """

    def __init__(
        self,
        loss="sigmoid",
        *,
        weights: Sequence[float] | None = None,
        use_weighting: bool = False,
        ld_alpha: float | None = None,
        **params,
    ):
        unknown = [name for name in params if name not in _KNOBS]
        if unknown:
            raise TypeError(f"a loss has no knob {', '.join(unknown)}; knobs are {', '.join(_KNOBS)}")
        self.params = LossParams(**params)
        parts = [loss] if isinstance(loss, str) or callable(loss) else loss
        if not (isinstance(parts, Sequence) and len(parts)):
            raise ValueError(f"loss must be a name, a function or a non-empty sequence of them, got {loss!r}")
        self.parts = [_resolve(part) for part in parts]
        weights = [1.0] * len(parts) if weights is None else weights
        if not (isinstance(weights, Sequence) and len(weights) == len(parts) and all(map(_is_finite, weights))):
            raise ValueError(f"loss weights must be {len(parts)} finite numbers, one per loss, got {weights!r}")
        self.loss_weights = list(weights)
        self.names = tuple(part if isinstance(part, str) else getattr(part, "__name__", repr(part)) for part in parts)
        self.use_weighting, self.ld_alpha = check_flag("Objective", "use_weighting", use_weighting), ld_alpha
        self.couples_pairs = any(getattr(part, "couples_pairs", True) for part in self.parts)
        self.needs_reference = any(getattr(part, "needs_reference", True) for part in self.parts)
        self.needs_lengths = any(getattr(part, "needs_lengths", True) for part in self.parts)
        # What a registered loss cannot do without; a function may look at less than it is given
        self.must_have_reference = any(getattr(part, "needs_reference", False) for part in self.parts)
        self.must_have_lengths = any(getattr(part, "needs_lengths", False) for part in self.parts)
        # Of the mean over chosen tokens that is a part of the mean over pairs
        factors = [getattr(part, "likelihood", None) for part in self.parts]
        self.likelihood_weight = sum(
            weight * factor(self.params) for weight, factor in zip(self.loss_weights, factors, strict=True) if factor
        )
        # What a reward is, the parts say that define one
        rewarded = [part for part in self.parts if getattr(part, "rewards", True)]
        self.averages = bool(rewarded) and all(getattr(part, "averages", False) for part in rewarded)
        self._check_combination()

    def _check_combination(self) -> None:
        params = self.params
        if params.f_divergence_type != "reverse_kl":
            unfit = [n for n, part in zip(self.names, self.parts, strict=True) if not getattr(part, "f_divergence", 0)]
            if unfit:
                fit = ", ".join(name for name, function in LOSSES.items() if function.f_divergence)
                raise ValueError(
                    f"f_divergence_type={params.f_divergence_type!r} does not fit loss {', '.join(unfit)}, whose "
                    f"log Z would not cancel; it fits {fit}"
                )
        for part in self.parts:
            check = getattr(part, "check", None)
            if check:
                check(params)
        if self.use_weighting and any(getattr(part, "couples_pairs", False) for part in self.parts):
            raise ValueError(f"use_weighting weighs each pair, but loss {', '.join(self.names)} sorts across pairs")
        alpha = self.ld_alpha
        if alpha is None:
            return
        if not (_is_finite(alpha) and 0 <= alpha <= 1):
            raise ValueError(f"ld_alpha must be in [0, 1] or None, got {alpha!r}")
        unfit = [n for n, part in zip(self.names, self.parts, strict=True) if getattr(part, "likelihood", None)]
        if unfit and alpha != 1:
            raise ValueError(
                f"ld_alpha={alpha} does not fit loss {', '.join(unfit)}: it would weigh down the end of long chosen "
                "completions in their likelihood; leave out one of the two"
            )

    @classmethod
    def of(cls, op: str, loss, ld_alpha: float | None, **knobs) -> "Objective":
        """`loss` with these knobs; `loss` itself where it is an Objective. ValueError where that is given knobs, too:
        of those it has its own."""
        if not isinstance(loss, Objective):
            return cls(loss, ld_alpha=ld_alpha, **knobs)
        given = [name for name, value in knobs.items() if name not in _UNGIVEN or value != _UNGIVEN[name]]
        if given:
            raise ValueError(f"{op}: loss is an Objective, which has its own {', '.join(given)}; give it there")
        return loss.with_ld_alpha(ld_alpha)

    def with_ld_alpha(self, alpha: float | None) -> "Objective":
        """The same with LD-DPO's token weights; itself where `alpha` is None. ValueError where it has others."""
        if alpha is None or alpha == self.ld_alpha:
            return self
        if self.ld_alpha is not None:
            raise ValueError(f"ld_alpha={alpha}, but the objective has ld_alpha={self.ld_alpha}; give it once")
        weighing = copy.copy(self)
        weighing.ld_alpha = alpha
        weighing._check_combination()
        return weighing

    def token_weights(self, sequence_ids: Tensor, lengths: Tensor, **more) -> Tensor | None:
        """(N,) factors on tokens' log-probs, None where all count alike; arguments: as `ld_dpo_token_weights`."""
        if self.ld_alpha is None:
            return None
        return ld_dpo_token_weights(sequence_ids, lengths, self.ld_alpha, **more)

    def __call__(self, pairs: PairLogps) -> Tensor:
        if not isinstance(pairs, PairLogps):
            raise TypeError(f"an Objective is called with PairLogps, got {type(pairs).__name__}")
        total = None
        for _, value in self._terms(pairs):
            total = value if total is None else total + value
        assert total is not None  # there is a loss
        if torch.is_grad_enabled() and pairs.chosen.requires_grad and not total.requires_grad:
            raise RuntimeError(
                f"loss {', '.join(self.names)}: the loss does not depend on pairs.chosen or pairs.rejected, or not in "
                "a way that autograd sees; leave out detach(), item() and no_grad()"
            )
        return total if pairs.weights is None else total * pairs.weights

    @torch.no_grad()
    def terms(self, pairs: PairLogps) -> dict[str, Tensor]:
        """Name -> (P,) what each loss adds to the sum: times its weight, and the pairs'; without gradients."""
        found: dict[str, Tensor] = {}
        for name, value in self._terms(pairs):
            value = value if pairs.weights is None else value * pairs.weights
            found[name] = found[name] + value if name in found else value
        return found

    def _terms(self, pairs: PairLogps) -> Iterator[tuple[str, Tensor]]:
        for name, part, weight in zip(self.names, self.parts, self.loss_weights, strict=True):
            registered = LOSSES.get(getattr(part, "__name__", "")) is part
            value = part(pairs, self.params) if registered else part(pairs)
            if not isinstance(value, Tensor):
                raise TypeError(f"loss {name} must return a tensor, one value per pair, got {type(value).__name__}")
            if not value.is_floating_point() or value.device != pairs.chosen.device:
                raise TypeError(
                    f"loss {name} must return floating values on {pairs.chosen.device}, got {value.dtype} on "
                    f"{value.device}"
                )
            if value.shape != pairs.chosen.shape:
                raise ValueError(
                    f"loss {name} must return one value per pair, {tuple(pairs.chosen.shape)}, got {tuple(value.shape)}"
                )
            yield name, value if weight == 1.0 else value * weight

    def rewards(self, pairs: PairLogps) -> tuple[Tensor, Tensor]:
        """Implicit rewards (P,) of both completions: beta x log-ratio, or beta x (mean) log-prob without reference."""
        chosen, rejected = pairs.chosen.detach(), pairs.rejected.detach()
        if pairs.ref_chosen is not None:
            chosen, rejected = pairs.chosen_log_ratio.detach(), pairs.rejected_log_ratio.detach()
        elif self.averages:
            chosen_length, rejected_length = lengths(pairs)
            chosen, rejected = chosen / chosen_length, rejected / rejected_length
        return self.params.beta * chosen, self.params.beta * rejected

    def __repr__(self) -> str:
        return f"Objective({list(self.names)}, weights={self.loss_weights}, {self.params})"


def _is_finite(value) -> bool:
    return is_number(value) and -LARGEST <= value <= LARGEST


def _resolve(part) -> Callable:
    if callable(part):
        if not torch.compiler.is_compiling() and LOSSES.get(getattr(part, "__name__", "")) is not part:
            _check_signature(part)
        return part
    if not isinstance(part, str) or part not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, or a function of PairLogps, got {part!r}")
    return LOSSES[part]


def _check_signature(function: Callable) -> None:
    """TypeError for a function that cannot be called with a `PairLogps` alone."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # some of C's have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        name = getattr(function, "__name__", repr(function))
        raise TypeError(f"loss {name} must take one argument, the PairLogps: {error}") from error


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    loss="sigmoid",
    loss_weights: Sequence[float] | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "none",
    **params,
) -> Tensor:
    """Loss per pair from sequence log-probs, in plain PyTorch, for your own training loop.

    *_logps: (P,) floating, summed over the completion's tokens, in nats; those of the reference may be None where no
      loss needs them. 16-bit input is computed in fp32.
    loss, loss_weights: as in `Objective`; params: those of `LossParams` (beta, label_smoothing, f_divergence_type ...).
    chosen_lengths, rejected_lengths: (P,) numbers of completion tokens, for losses that average over tokens.
    weights: (P,) factor on each pair's loss, not differentiated.

    Returns (P,), or () for reduction "mean" or "sum". Raises ValueError or TypeError for wrong shapes, dtypes and
    devices, unknown names, values out of range, and what a loss needs but did not get.
    """
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    objective = Objective(loss, weights=loss_weights, use_weighting=weights is not None, **params)
    given: dict[str, Any] = dict(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        weights=weights,
    )
    needed = {"chosen_logps", "rejected_logps"}
    if objective.must_have_reference:
        needed |= {"ref_chosen_logps", "ref_rejected_logps"}
    if objective.must_have_lengths:
        needed |= {"chosen_lengths", "rejected_lengths"}
    for name, value in given.items():
        if value is None:
            if name in needed:
                raise ValueError(f"preference_loss: loss {', '.join(objective.names)} needs {name}, got None")
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"preference_loss: {name} must be a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_nested:
            raise TypeError(f"preference_loss: {name} must be a dense tensor, got {value.layout}")
        if value.ndim != 1 or value.shape != chosen_logps.shape:
            expected = f"({chosen_logps.shape[0]},)" if chosen_logps.ndim == 1 else "(P,)"
            raise ValueError(f"preference_loss: {name} must have shape {expected}, got {tuple(value.shape)}")
        if name.endswith("lengths") and value.dtype not in _COUNTS:
            raise TypeError(f"preference_loss: {name} must be int64, int32 or fp32, got {value.dtype}")
        if not name.endswith("lengths") and not value.is_floating_point():
            raise TypeError(f"preference_loss: {name} must be floating, got {value.dtype}")
        if value.device != chosen_logps.device:
            raise ValueError(f"preference_loss: {name} is on {value.device}, chosen_logps on {chosen_logps.device}")
        if value.dtype in (torch.float16, torch.bfloat16):
            given[name] = value.float()
        if readable(value):
            _check_values(name, value, objective)
    if reduction == "mean" and not len(chosen_logps):
        raise ValueError("preference_loss: reduction 'mean' of no pairs, P = 0")
    pairs = PairLogps(
        given["chosen_logps"],
        given["rejected_logps"],
        None if ref_chosen_logps is None else given["ref_chosen_logps"].detach(),
        None if ref_rejected_logps is None else given["ref_rejected_logps"].detach(),
        chosen_lengths,
        rejected_lengths,
        None if weights is None else given["weights"].detach(),
    )
    losses = objective(pairs)
    return losses if reduction == "none" else getattr(losses, reduction)()


def _check_values(name: str, value: Tensor, objective: Objective) -> None:
    """ValueError for numbers of tokens, factors and log-probs that are none. NaN log-probs give NaN, as in torch."""
    if name.endswith("lengths"):
        wrong, expected = ~(value >= 0) | value.isinf(), "numbers of tokens"
    elif name == "weights":
        wrong, expected = ~value.isfinite(), "finite"
    elif objective.likelihood_weight:  # of others, sums may lack a constant
        wrong, expected = value > 1e-3, "log-probs, at most 0"  # a rounded 0 may be above
    else:
        return
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"preference_loss: {name} must be {expected}, got {value[first].item()} at index {first}")


# --- weights from tokens -------------------------------------------------------------------------------------------


def ld_dpo_token_weights(
    sequence_ids: Tensor,
    sequence_lengths: Tensor,
    alpha: float,
    scored: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    comparisons: Tensor | None = None,
) -> Tensor:
    """(N,) of `dtype`: 1 up to the shorter completion's length, alpha beyond it: LD-DPO, arXiv:2409.06411.

    sequence_ids: (N,) in [0, S), tokens of a sequence in order, sequences in any; sequence_lengths: (S,) their
    numbers of scored tokens; scored: (N,) bool, which tokens count, all where None; comparisons: (C, 2) int64, each
    sequence in at most one, S / 2 pairs where None."""
    if not (is_number(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"ld_alpha must be in [0, 1], got {describe(alpha)}")
    if comparisons is None:
        comparisons = pairs_of(sequence_lengths.shape[0] // 2, sequence_lengths.device)
    order = sequence_ids.argsort(stable=True)
    counts = torch.ones_like(sequence_ids) if scored is None else scored[order].to(sequence_ids.dtype)
    starts = sequence_lengths.cumsum(0) - sequence_lengths
    position = torch.empty_like(sequence_ids)  # number of scored tokens before this one in its sequence
    position[order] = counts.cumsum(0) - counts - starts[sequence_ids[order]]
    shared = sequence_lengths.clone()
    shared[comparisons] = sequence_lengths[comparisons].amin(1, keepdim=True).expand(-1, 2)
    weights = torch.ones_like(sequence_ids, dtype=dtype)
    return weights.masked_fill_(position >= shared[sequence_ids], alpha)


def wpo_weights(log_weights: Tensor, sequence_lengths: Tensor) -> Tensor:
    """(P,) detached weights of pairs: WPO, arXiv:2406.11827, equation 2, and its alignment of weights.

    log_weights: (2P,) sums over a sequence's tokens of log p(token) - log sum_v p(v)^2; sequence_lengths: (2P,)."""
    weights = torch.exp(log_weights.detach() / sequence_lengths.clamp(min=1))
    chosen, rejected = weights.tensor_split(2)
    return chosen * rejected
