"""Device functions that every kernel shares: the transform of a raw logit and one step of an online softmax.

A logit is transformed as `z = softcap * tanh(x * scale / softcap) / temperature`, the soft-cap being optional. Columns
past the vocabulary are masked after the transform: a soft-cap would turn their -inf into -softcap, which counts.
"""

import triton
import triton.language as tl

# Where an online maximum starts. Finite, so that a row of all -inf gives exp(-inf - LOWEST) = 0 and not NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)


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
