"""Device functions that every kernel shares: the transform of a raw logit, and the online softmax.

A logit is transformed as `z = softcap * tanh(x * scale / softcap) / temperature`, the soft-cap being optional. That is
`z = slope * y` with y = `bend(x)` and slope > 0, so y has the order of z. Maxima and differences are of y: without a
soft-cap it is the logit itself, and `y - max y` loses nothing of it. The rest is one multiplication per logit,
exp(z - max z) = exp2((y - max y) * slope log2 e), by a factor that the host computes in fp64.

Partial softmaxes are sums relative to a maximum. Folding in more logits and merging with others share `rescale`.
Columns past the vocabulary are masked after `bend`: a soft-cap would turn their -inf into -1, which counts.
"""

import ctypes
from typing import NamedTuple

import triton
import triton.language as tl

# Where an online maximum starts. Finite, so that a row of all -inf gives exp(-inf - LOWEST) = 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)


class Knobs(NamedTuple):
    """What every launch is told."""

    ignore_index: int = -100
    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def factor(self) -> tuple[float, float]:
        """What `bend` multiplies logits by in front of a soft-cap, in two terms that fp32 holds. The first is rounded
        towards 0: they have one sign, so infinite logits do not become NaN."""
        factor = self.logit_scale / (self.softcap or 1.0)
        rounded = ctypes.c_float(factor * (1 - 2**-24)).value
        return rounded, factor - rounded

    @property
    def slope(self) -> float:
        """dz/dy, positive in fp32: 0 times the -inf of a masked column would be NaN."""
        slope = (abs(self.logit_scale) if self.softcap is None else self.softcap) / self.temperature
        return max(slope, 2.0**-126)

    @property
    def derivative(self) -> float:
        """dz/dx, without the soft-cap's share."""
        return self.logit_scale / self.temperature

    @property
    def flags(self) -> dict[str, bool]:
        softcap = self.softcap is not None
        return {"HAS_SOFTCAP": softcap, "NEGATIVE": not softcap and self.logit_scale < 0}


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
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def bend(x, factor, factor_rest, HAS_SOFTCAP: tl.constexpr, NEGATIVE: tl.constexpr):
    """fp32 logits -> y."""
    y = x
    if HAS_SOFTCAP:
        # Python floats arrive as fp64 under torch.compile before torch 2.15
        y = tanh(tl.fma(x, tl.cast(factor, tl.float32), x * tl.cast(factor_rest, tl.float32)))
    elif NEGATIVE:
        y = -x
    return y


# Partial softmaxes of the same rows are sums relative to a maximum of their own. `shift` is that maximum less a larger
# one, to which the sums move. Those of exp(z - max) are multiplied by `shrink`, those of its squares twice.


@triton.jit
def rescale_dots(dots, sums, shift, shrink):
    """Sums of exp(z - max) (y - max); sums: of exp(z - max), before they move."""
    return (dots + sums * tl.where(sums > 0, shift, 0.0)) * shrink


@triton.jit
def fold(top, sums, dots, squares, y, slope_log2, ENTROPY: tl.constexpr, LOG_SUM_SQ_PROBS: tl.constexpr):
    """Partial softmaxes (n,) with y (n, columns) folded in, -inf where there is no logit. A sum whose flag is not set
    comes back as it is."""
    new_top = tl.maximum(top, tl.max(y, axis=1))
    shift = top - new_top
    shrink = tl.exp2(shift * slope_log2)
    shifted = y - new_top[:, None]
    e = tl.exp2(shifted * slope_log2)
    if ENTROPY:
        dots = rescale_dots(dots, sums, shift, shrink) + tl.sum(tl.where(e > 0, e * shifted, 0.0), axis=1)
    if LOG_SUM_SQ_PROBS:
        squares = squares * shrink * shrink + tl.sum(e * e, axis=1)
    return new_top, sums * shrink + tl.sum(e, axis=1), dots, squares


@triton.jit
def merge(top, sums, slope_log2):
    """Partial softmaxes along the first axis -> the maximum and the sum of exp(z - max); shift and shrink of each, for
    the other sums."""
    new_top = tl.max(top, axis=0)
    shift = top - new_top
    shrink = tl.exp2(shift * slope_log2)
    return new_top, tl.sum(sums * shrink, axis=0), shift, shrink


@triton.jit
def nats(top, log_sum, slope):
    """The largest z and the log of the sum of exp(z - it), as they are stored. What rounding `slope * top` leaves over
    goes to the latter: the backward's fma(y, slope, -row_max) is exact."""
    row_max = tl.maximum(top * slope, LOWEST)
    return row_max, log_sum + tl.fma(top, slope, -row_max)


@triton.jit
def d_block(y, hit, row_max, log_sum, coefficient, slope, derivative, HAS_SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr):
    """coefficient x d logp / dx for a block of a row's y, (BLOCK_V,). hit: the label's place in it, or one outside."""
    log_sum = tl.where(log_sum == -float("inf"), 0.0, log_sum)  # a row of all -inf: p = 0
    shifted = tl.fma(y, tl.cast(slope, tl.float32), -row_max)
    p = tl.exp2(tl.fma(shifted, LOG2_E, -log_sum * LOG2_E))
    c = coefficient * tl.cast(derivative, tl.float32)
    d = -c * p
    if (hit >= 0) & (hit < BLOCK_V):
        d += tl.where(tl.arange(0, BLOCK_V) == hit, c, 0.0)
    if HAS_SOFTCAP:
        d = d * (1.0 - y) * (1.0 + y)
    return d
