"""Sums of token values by sequence, chosen and rejected together, in a fixed order.

    out[s] = sum over tokens i with ids[i] = s of weights[i] values[i]

One program owns a sequence and walks the tokens in order with fp64 partial sums: no atomics, so two runs agree to the
last bit, and a sum of thousands of log-probs is rounded once, to fp32. A program reads every id but only its own
values: S x N ids, which stay in L2 (16 MB for 32k tokens of 64 sequences).
"""

import triton
import triton.language as tl


@triton.jit
def sequence_sum_kernel(
    values_ptr,  # (N,) fp32
    ids_ptr,  # (N,) int64
    weights_ptr,  # (N,) fp32, read where WEIGHTED
    out_ptr,  # (S,) fp32
    N,
    WEIGHTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sequence = tl.program_id(0)
    partial = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, N, BLOCK_N):
        offs = start + tl.arange(0, BLOCK_N)
        inside = offs < N
        mine = inside & (tl.load(ids_ptr + offs, mask=inside, other=-1) == sequence)
        value = tl.load(values_ptr + offs, mask=mine, other=0.0).to(tl.float64)
        if WEIGHTED:
            value *= tl.load(weights_ptr + offs, mask=mine, other=0.0).to(tl.float64)
        partial += tl.where(mine, value, 0.0)
    tl.store(out_ptr + sequence, tl.sum(partial, axis=0).to(tl.float32))


def sequence_sum_fwd(values, ids, weights, out):
    """Launch; `out` is (S,) fp32 and every element of it is written."""
    sequence_sum_kernel[(out.numel(),)](
        values,
        ids,
        values if weights is None else weights,
        out,
        values.numel(),
        WEIGHTED=weights is not None,
        BLOCK_N=1024,
        num_warps=4,
    )
