"""Stage 5: `PairLogps` -> loss per pair. One small function per loss, with its paper and equation.

Notation: c, r are the log-ratios log(policy / reference) of the chosen and the rejected completion, m = c - r their
margin, s(x) the logistic sigmoid. `-log s(x)` is always `softplus(-x)`, which cannot overflow.

`LOSSES` maps names to functions (pairs, params) -> (P,). What the rest of the library must know about a loss is
recorded on the function by `@loss`. `objective.py` combines losses and checks that they fit together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .logps import PairLogps
from .ops.checks import LARGEST, LEAST, describe, is_number

LOSSES: dict[str, "RegisteredLoss"] = {}
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_EXP_LIMIT = 80.0  # exp(80) = 5.5e34: its products with beta and small integers stay finite in fp32
_SQUARE_LIMIT = 1e18  # likewise for what is squared
_LOGIT_LIMIT = 1e4  # a probability of 1 by far


def knob(default, help: str, **metadata):
    """A field of a dataclass, with what a command line says of it."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class LossParams:
    """Every knob of every loss; names are TRL's where TRL has the same one. `FastDPOConfig` has these fields, too."""

    beta: float = knob(0.1, "Strength of the pull towards the reference (tau in ipo, lambda in orpo).")
    label_smoothing: float = knob(
        0.0,
        "Probability that a preference label is wrong (sigmoid, which is then cDPO, robust, exo_pair, aot, "
        "aot_unpaired, simpo, cpo).",
    )
    f_divergence_type: str = knob("reverse_kl", "Divergence from the reference.", choices=list(F_DIVERGENCES))
    f_alpha_divergence_coef: float = knob(0.5, "Alpha of alpha_divergence.")
    discopop_tau: float = knob(0.05, "Temperature of discopop.")
    simpo_gamma: float = knob(0.5, "Target margin of simpo, in units of the reward.")
    cpo_alpha: float = knob(1.0, "Weight of the negative log-likelihood of the chosen completion in cpo.")

    def __post_init__(self):
        for option in fields(self):
            value = getattr(self, option.name)
            if option.type is not float:
                continue
            # Compared, as torch.compile may leave a number open
            if not is_number(value) or not -LARGEST <= value <= LARGEST:
                raise ValueError(f"{option.name} must be a finite number, got {describe(value)}")
            if not isinstance(value, float):
                setattr(self, option.name, float(value))  # NumPy's scalars
        for name in ("beta", "discopop_tau"):
            if getattr(self, name) < LEAST:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.f_divergence_type not in F_DIVERGENCES:
            raise ValueError(
                f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}, got {self.f_divergence_type!r}"
            )


class RegisteredLoss(Protocol):
    """A function that `loss` has registered; the attributes are its arguments."""

    __name__: str
    couples_pairs: bool
    needs_reference: bool
    needs_lengths: bool
    f_divergence: bool
    averages: bool
    likelihood: Callable[[LossParams], float] | None
    rewards: bool
    check: Callable[[LossParams], None] | None

    def __call__(self, pairs: PairLogps, params: LossParams, /) -> Tensor: ...


def loss(
    *,
    couples_pairs=False,
    needs_reference=True,
    needs_lengths=False,
    f_divergence=False,
    averages=False,
    likelihood=None,
    rewards=True,
    check=None,
):
    """Register a loss under its function's name, with what others must know about it.

    couples_pairs: a pair's loss depends on other pairs. f_divergence: other divergences than reverse KL are valid,
    because log Z cancels in the margin (arXiv:2309.16240). rewards: it defines one. averages: its rewards are means
    over tokens. likelihood: of params, the factor of `negative_log_likelihood` in it, whose mean is over tokens. check:
    called with params, raises ValueError for those that it cannot take.
    """

    def register(function):
        function.couples_pairs = couples_pairs
        function.needs_reference = needs_reference
        function.needs_lengths = needs_lengths
        function.f_divergence = f_divergence
        function.averages = averages
        function.likelihood = likelihood
        function.rewards = rewards
        function.check = check
        LOSSES[function.__name__] = function
        return function

    return register


# --- what the losses share -----------------------------------------------------------------------------------------


def scores(pairs: PairLogps, params: LossParams) -> tuple[Tensor, Tensor]:
    """f'(policy / reference) of both completions, (P,) each: the implicit rewards / beta (f-DPO, arXiv:2309.16240)."""
    return _f_prime(pairs.chosen_log_ratio, params), _f_prime(pairs.rejected_log_ratio, params)


def _f_prime(u: Tensor, params: LossParams) -> Tensor:
    """f'(t) at t = exp(u), up to a constant. Exponents are clamped: beyond, the value is finite and its gradient 0."""
    kind, excess = params.f_divergence_type, params.f_alpha_divergence_coef - 1
    if kind == "forward_kl":  # f'(t) = 1 - 1/t
        return 1 - torch.exp((-u).clamp(max=_EXP_LIMIT))
    if kind == "js_divergence":  # f'(t) = log 2t/(1+t)
        return math.log(2) - F.softplus(-u)
    if kind == "alpha_divergence" and abs(excess) > 1e-6:  # f'(t) = (t^(a-1) - 1) / (a - 1), in the limit log t
        return _expm1((u * excess).clamp(max=_EXP_LIMIT)) / excess
    return u  # f'(t) = log t


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 with a slope that keeps its digits where it is nearly -1: torch's is expm1(x) + 1."""
    return torch.where(x > -1, torch.expm1(x), torch.exp(x) - 1)


def margin(pairs: PairLogps, params: LossParams) -> Tensor:
    if params.f_divergence_type == "reverse_kl":
        return pairs.margin
    chosen, rejected = scores(pairs, params)
    return chosen - rejected


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x), the cross-entropy with a label that is wrong with probability e."""
    if label_smoothing == 0:
        return F.softplus(-x)
    return (1 - label_smoothing) * F.softplus(-x) + label_smoothing * F.softplus(x)


def probability(x: Tensor) -> Tensor:
    """s(x) with a slope that keeps its digits where s(x) is nearly 1: that of `torch.sigmoid` is s (1 - s)."""
    return F.logsigmoid(x).exp()


def token_counts(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """Numbers of scored tokens, (P,) each."""
    return _token_count(pairs, "chosen_lengths"), _token_count(pairs, "rejected_lengths")


def _token_count(pairs: PairLogps, name: str) -> Tensor:
    value = getattr(pairs, name)
    if value is None:
        raise ValueError(f"this loss needs the completions' lengths, but PairLogps.{name} is None")
    return value


def lengths(pairs: PairLogps) -> tuple[Tensor, Tensor]:
    """What a sum over tokens is divided by, (P,) each: the number of scored tokens, 1 where there is none."""
    chosen, rejected = token_counts(pairs)
    return chosen.clamp(min=1), rejected.clamp(min=1)


def negative_log_likelihood(pairs: PairLogps) -> Tensor:
    """(P,), its mean over the batch is the mean over all chosen tokens."""
    mean_length = pairs.mean_chosen_length
    if mean_length is None:
        mean_length = token_counts(pairs)[0].to(pairs.chosen.dtype).mean()
    return -pairs.chosen / mean_length.clamp(min=1e-6)  # all completions empty: 0, not NaN


def squared(x: Tensor) -> Tensor:
    """x^2; beyond the limit its value is finite and its gradient 0."""
    return x.clamp(-_SQUARE_LIMIT, _SQUARE_LIMIT) ** 2


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0 (Maechler 2012); x is kept below -eps, where the value is -16 and not -inf."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# --- losses of the margin ------------------------------------------------------------------------------------------


@loss(f_divergence=True)
def sigmoid(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta m): DPO, arXiv:2305.18290, equation 7. With label smoothing, conservative DPO (Mitchell 2023)."""
    return smoothed(params.beta * margin(pairs, params), params.label_smoothing)


@loss(f_divergence=True)
def hinge(pairs: PairLogps, params: LossParams) -> Tensor:
    """max(0, 1 - beta m): SLiC, arXiv:2305.10425, on log-ratios as in RSO, arXiv:2309.06657."""
    return torch.relu(1 - params.beta * margin(pairs, params))


@loss(f_divergence=True, needs_lengths=True)
def ipo(pairs: PairLogps, params: LossParams) -> Tensor:
    """(c/|c| - r/|r| - 1/(2 beta))^2: IPO, arXiv:2310.12036, equation 17, with log-ratios averaged over tokens."""
    (chosen, rejected), (chosen_length, rejected_length) = scores(pairs, params), lengths(pairs)
    return squared(chosen / chosen_length - rejected / rejected_length - 1 / (2 * params.beta))


def _some_smoothing(params: LossParams) -> None:
    if params.label_smoothing == 0:
        raise ValueError("label_smoothing must be above 0 for loss 'exo_pair' (its paper suggests 1e-3), got 0")


@loss(f_divergence=True, check=_some_smoothing)
def exo_pair(pairs: PairLogps, params: LossParams) -> Tensor:
    """KL((s(beta m), s(-beta m)) || (1 - e, e)): EXO, arXiv:2402.00856, equation 16, K = 2."""
    # Beyond, the value and its gradient are those of the limit; 0 x log 0 would be NaN
    x, e = (params.beta * margin(pairs, params)).clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT), params.label_smoothing
    win = probability(x) * (-F.softplus(-x) - math.log1p(-e))
    return win + probability(-x) * (-F.softplus(x) - math.log(e))


def _less_than_half(params: LossParams) -> None:
    if params.label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5) for loss 'robust', got {params.label_smoothing}")


@loss(f_divergence=True, check=_less_than_half)
def robust(pairs: PairLogps, params: LossParams) -> Tensor:
    """(-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2e): rDPO, arXiv:2403.00409, section 3.1."""
    x, e = params.beta * margin(pairs, params), params.label_smoothing
    if e == 0:
        return F.softplus(-x)
    return ((1 - e) * F.softplus(-x) - e * F.softplus(x)) / (1 - 2 * e)


@loss(f_divergence=True)
def discopop(pairs: PairLogps, params: LossParams) -> Tensor:
    """(1 - w) softplus(-x) + w exp(-x), w = s(x / tau), x = beta m: arXiv:2406.08414, equation 5.

    w exp(-x) is one exponential: apart, the second factor overflows long before the first makes up for it."""
    x = params.beta * margin(pairs, params)
    modulation = x / params.discopop_tau
    exponent = -x - F.softplus(-modulation)
    limit = -_EXP_LIMIT if params.discopop_tau < 1 else _EXP_LIMIT  # of inf - inf, where x is -inf
    exponential = torch.exp(exponent.nan_to_num(nan=limit).clamp(max=_EXP_LIMIT))
    # A sigmoid of infinity has the slope 0, and 0 x inf is NaN
    return probability(-modulation.clamp(-_LOGIT_LIMIT, _LOGIT_LIMIT)) * F.softplus(-x) + exponential


@loss(f_divergence=True, needs_lengths=True)
def sigmoid_norm(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta (c/|c| - r/|r|)): length-normalised DPO, as in Tulu 3, arXiv:2411.15124."""
    (chosen, rejected), (chosen_length, rejected_length) = scores(pairs, params), lengths(pairs)
    return F.softplus(-params.beta * (chosen / chosen_length - rejected / rejected_length))


# --- losses of each completion -------------------------------------------------------------------------------------


@loss()
def nca_pair(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta c) - (log s(-beta c) + log s(-beta r)) / 2: NCA, arXiv:2402.05369, section 4.1, K = 2."""
    chosen, rejected = params.beta * pairs.chosen_log_ratio, params.beta * pairs.rejected_log_ratio
    return F.softplus(-chosen) + 0.5 * F.softplus(chosen) + 0.5 * F.softplus(rejected)


@loss()
def bco_pair(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta c) - log s(-beta r): BCO, arXiv:2404.04656, section 4, without the reward shift."""
    return F.softplus(-params.beta * pairs.chosen_log_ratio) + F.softplus(params.beta * pairs.rejected_log_ratio)


@loss()
def sppo_hard(pairs: PairLogps, params: LossParams) -> Tensor:
    """(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2: SPPO, arXiv:2405.00675, equation 4.7, win probabilities 1 and 0."""
    target = 0.5 / params.beta
    return (pairs.chosen_log_ratio - target) ** 2 + (pairs.rejected_log_ratio + target) ** 2


@loss()
def apo_zero(pairs: PairLogps, params: LossParams) -> Tensor:
    """s(-beta c) + s(beta r): APO, arXiv:2408.06266, equation 7. Raises chosen, lowers rejected."""
    return probability(-params.beta * pairs.chosen_log_ratio) + probability(params.beta * pairs.rejected_log_ratio)


@loss()
def apo_down(pairs: PairLogps, params: LossParams) -> Tensor:
    """s(beta c) + s(-beta m): APO, arXiv:2408.06266, equation 8. Lowers chosen, and rejected more."""
    return probability(params.beta * pairs.chosen_log_ratio) + probability(-params.beta * pairs.margin)


# --- losses of the batch -------------------------------------------------------------------------------------------


@loss(couples_pairs=True)
def aot(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta (sort(policy margin) - sort(reference margin))): AOT, arXiv:2406.05882, paired."""
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = pairs.reference_margin.sort().values
    return smoothed(params.beta * (policy - reference), params.label_smoothing)


@loss(couples_pairs=True)
def aot_unpaired(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta (sort(c) - sort(r))): AOT, arXiv:2406.05882, unpaired."""
    x = pairs.chosen_log_ratio.sort().values - pairs.rejected_log_ratio.sort().values
    return smoothed(params.beta * x, params.label_smoothing)


# --- losses without a reference ------------------------------------------------------------------------------------


@loss(needs_reference=False, needs_lengths=True, f_divergence=True, likelihood=lambda params: 1.0, rewards=False)
def sft(pairs: PairLogps, params: LossParams) -> Tensor:
    """Negative log-likelihood of the chosen completion; the batch's mean is the mean over its chosen tokens."""
    return negative_log_likelihood(pairs)


@loss(needs_reference=False, needs_lengths=True, averages=True)
def simpo(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta (log p_c / |c| - log p_r / |r|) - gamma): SimPO, arXiv:2405.14734, equation 6."""
    chosen_length, rejected_length = lengths(pairs)
    x = params.beta * (pairs.chosen / chosen_length - pairs.rejected / rejected_length)
    return smoothed(x - params.simpo_gamma, params.label_smoothing)


@loss(needs_reference=False, needs_lengths=True, likelihood=lambda params: params.cpo_alpha)
def cpo(pairs: PairLogps, params: LossParams) -> Tensor:
    """-log s(beta (log p_c - log p_r)) + alpha NLL(chosen): CPO, arXiv:2401.08417, equation 3."""
    preferred = smoothed(params.beta * (pairs.chosen - pairs.rejected), params.label_smoothing)
    return preferred + params.cpo_alpha * negative_log_likelihood(pairs)


@loss(needs_reference=False, needs_lengths=True, averages=True, likelihood=lambda params: 1.0)
def orpo(pairs: PairLogps, params: LossParams) -> Tensor:
    """NLL(chosen) - beta log s(log odds_c - log odds_r), odds of the mean token: ORPO, arXiv:2403.07691, eq. 6, 7.

    The likelihood is that of the completion, as in the paper; TRL's counts the prompt's tokens, too."""
    chosen_length, rejected_length = lengths(pairs)
    chosen, rejected = pairs.chosen / chosen_length, pairs.rejected / rejected_length
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return negative_log_likelihood(pairs) + params.beta * F.softplus(-log_odds_ratio)
