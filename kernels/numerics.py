"""Device functions that every kernel shares: the transform of a raw logit, and the online softmax.

Partial softmaxes are sums relative to a maximum. Folding in more logits and merging with others share `rescale`.

A logit is transformed as `z = softcap * tanh(x * scale / softcap) / temperature`, the soft-cap being optional. Columns
past the vocabulary are masked after the transform: a soft-cap would turn their -inf into -softcap, which counts.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Where an online maximum starts. Finite, so that a row of all -inf gives exp(-inf - LOWEST) = 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


class Knobs(NamedTuple):
    """What every launch is told."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def scalars(self) -> tuple[int, float, float, float]:
        """As the kernels take them: ignore_index, logit_scale, softcap, inv_temperature."""
        return self.ignore_index, self.logit_scale, self.softcap or 1.0, 1.0 / self.temperature


@triton.jit
def tanh(x):
    """tanh to 2 ulp. Near 0 a polynomial (Cephes tanhf): the usual `2 sigmoid(2x) - 1` cancels to an error of 1e-7."""
    square = x * x
    near = -5.70498872745e-3
    near = near * square + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def transform(x, logit_scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """fp32 logits -> z, and the tanh of the soft-cap that its derivative needs (0 without one)."""
    # Python floats arrive as fp64 under torch.compile before torch 2.15
    z = x * tl.cast(logit_scale, tl.float32)
    t = z * 0.0
    if HAS_SOFTCAP:
        cap = tl.cast(softcap, tl.float32)
        t = tanh(z / cap)
        z = cap * t
    return z * tl.cast(inv_temperature, tl.float32), t


@triton.jit
def d_transform(t, logit_scale, inv_temperature, HAS_SOFTCAP: tl.constexpr):
    """dz/dx, from the tanh that `transform` returned."""
    slope = tl.cast(logit_scale, tl.float32) * tl.cast(inv_temperature, tl.float32)
    if HAS_SOFTCAP:
        slope = slope * (1.0 - t) * (1.0 + t)
    return slope


# Partial softmaxes of the same rows are sums relative to a maximum of their own. `shift` is that maximum less a larger
# one, to which the sums move. Those of exp(z - max) are multiplied by `shrink`, exp(shift), those of its squares twice.


@triton.jit
def rescale_dots(dots, sums, shift, shrink):
    """Sums of exp(z - max) (z - max); sums: of exp(z - max), before they move."""
    return (dots + sums * tl.where(sums > 0, shift, 0.0)) * shrink


@triton.jit
def fold(row_max, sums, dots, squares, z, ENTROPY: tl.constexpr, LOG_SUM_SQ_PROBS: tl.constexpr):
    """Partial softmaxes (n,) with z (n, columns) folded in, -inf where there is no logit. A sum whose flag is not set
    comes back as it is."""
    new_max = tl.maximum(row_max, tl.max(z, axis=1))
    shift = row_max - new_max
    shrink = tl.exp(shift)
    shifted = z - new_max[:, None]
    e = tl.exp(shifted)
    if ENTROPY:
        dots = rescale_dots(dots, sums, shift, shrink) + tl.sum(tl.where(e > 0, e * shifted, 0.0), axis=1)
    if LOG_SUM_SQ_PROBS:
        squares = squares * shrink * shrink + tl.sum(e * e, axis=1)
    return new_max, sums * shrink + tl.sum(e, axis=1), dots, squares


@triton.jit
def merge(row_max, sums):
    """Partial softmaxes along the first axis -> the maximum, the sum of exp(z - max) and its log; shift and shrink of
    each, for the other sums."""
    new_max = tl.max(row_max, axis=0)
    shift = row_max - new_max
    shrink = tl.exp(shift)
    total = tl.sum(sums * shrink, axis=0)
    return new_max, total, tl.log(total), shift, shrink


@triton.jit
def log_prob(target, row_max, sums, log_sum, valid):
    """log softmax of the label's logit, NaN where the label is not `valid`."""
    logp = tl.where(sums == 0.0, -float("inf"), (target - row_max) - log_sum)
    return tl.where(valid, logp, float("nan"))


@triton.jit
def d_block(
    x, cols, label, row_max, log_sum, coefficient, logit_scale, softcap, inv_temperature, HAS_SOFTCAP: tl.constexpr
):
    """coefficient x d logp / dx for a block of a row's fp32 logits."""
    z, t = transform(x, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    log_sum = tl.where(log_sum == -float("inf"), 0.0, log_sum)  # a row of all -inf: p = 0
    p = tl.exp((z - row_max) - log_sum)
    d = coefficient * (tl.where(cols == label, 1.0, 0.0) - p)
    return d * d_transform(t, logit_scale, inv_temperature, HAS_SOFTCAP)
