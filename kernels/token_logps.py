"""Log-softmax of each row of logits at its label, in one read of the row; and its gradient.

    logp = (z_y - max_v z_v) - log sum_v exp(z_v - max)            d logp / d z_v = [v = y] - p_v

z is the transformed logit (numerics.py). No probability is stored: the forward keeps two floats per row (`row_max`,
`log_sum`), from which the backward rebuilds each p_v. Subtracting the maximum first, and not the sum of both, keeps the
digits that a large log-sum-exp would swallow. The same pass can report entropy, mean logit, top-1 hit and log sum p^2.
"""

import triton
import triton.language as tl

from .numerics import LOWEST, Knobs, d_block, fold, log_prob, merge, rescale_dots, transform
from .tuned import constants, target_name


@triton.jit
def token_logps_fwd_kernel(
    logits_ptr,  # (outer, inner, V), strides below
    labels_ptr,  # (N,) with N = outer * inner
    logps_ptr,  # (N,) fp32
    row_max_ptr,  # (N,) fp32
    log_sum_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32, and so on: written only where the flag is set
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_probs_ptr,
    V,
    inner,
    stride_outer,
    stride_inner,
    stride_v,
    ignore_index,
    logit_scale,
    softcap,
    inv_temperature,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGITS: tl.constexpr,
    IS_TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One program per row, with LANES independent online softmaxes. In a step a lane takes WIDTH neighbouring columns,
    one 16-byte load. So a lane never leaves its thread, and threads wait for each other only at the end. A step takes
    one `exp` per logit, and one per lane."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if label == ignore_index:  # nothing of the row is read
        tl.store(logps_ptr + row, 0.0)
        tl.store(row_max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if MEAN_LOGITS:
            tl.store(mean_logits_ptr + row, 0.0)
        if IS_TOP1:
            tl.store(is_top1_ptr + row, 0.0)
        if LOG_SUM_SQ_PROBS:
            tl.store(log_sum_sq_probs_ptr + row, 0.0)
        return

    row_ptr = logits_ptr + (row // inner) * stride_outer + (row % inner) * stride_inner
    offs = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    running_max = tl.full((LANES,), LOWEST, tl.float32)
    running_sum = tl.zeros((LANES,), tl.float32)  # sum of exp(z - max)
    running_dot = tl.zeros((LANES,), tl.float32)  # sum of exp(z - max) (z - max)
    running_sq = tl.zeros((LANES,), tl.float32)  # sum of exp(z - max)^2
    total = tl.zeros((LANES,), tl.float32)  # sum of z
    best_before = tl.full((LANES,), -float("inf"), tl.float32)  # largest z left of the label
    for start in range(0, V, LANES * WIDTH):
        cols = start + offs
        inside = cols < V
        x = tl.load(row_ptr + cols.to(tl.int64) * stride_v, mask=inside, other=0.0).to(tl.float32)
        z, _ = transform(x, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
        if MEAN_LOGITS:
            total += tl.sum(tl.where(inside, z, 0.0), axis=1)
        z = tl.where(inside, z, -float("inf"))
        if IS_TOP1:
            best_before = tl.maximum(best_before, tl.max(tl.where(cols < label, z, -float("inf")), axis=1))
        running_max, running_sum, running_dot, running_sq = fold(
            running_max, running_sum, running_dot, running_sq, z, ENTROPY, LOG_SUM_SQ_PROBS
        )

    row_max, sum_exp, log_sum, shift, shrink = merge(running_max, running_sum)

    # A label outside the vocabulary is never used as an address; its row becomes NaN.
    valid = (label >= 0) & (label < V)
    x = tl.load(row_ptr + tl.where(valid, label, 0).to(tl.int64) * stride_v).to(tl.float32)
    target, _ = transform(x, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    logp = log_prob(target, row_max, sum_exp, log_sum, valid)
    tl.store(logps_ptr + row, logp)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, log_sum)
    if ENTROPY:
        dot = tl.sum(rescale_dots(running_dot, running_sum, shift, shrink), axis=0)
        tl.store(entropy_ptr + row, log_sum - dot / sum_exp)
    if MEAN_LOGITS:
        tl.store(mean_logits_ptr + row, tl.sum(total, axis=0) / V)
    if IS_TOP1:
        first = (target >= row_max) & (target > tl.max(best_before, axis=0)) & valid
        tl.store(is_top1_ptr + row, first.to(tl.float32))
    if LOG_SUM_SQ_PROBS:
        squares = tl.sum(running_sq * shrink * shrink, axis=0)
        tl.store(log_sum_sq_probs_ptr + row, tl.log(squares) - 2.0 * log_sum)


@triton.jit
def token_logps_bwd_kernel(
    logits_ptr,  # (outer, inner, V)
    d_logits_ptr,  # (outer, inner, V) with strides of its own; may be logits_ptr: a program reads what it overwrites
    labels_ptr,  # (N,)
    row_max_ptr,  # (N,) fp32
    log_sum_ptr,  # (N,) fp32
    d_logps_ptr,  # (N,) fp32
    V,
    inner,
    stride_outer,
    stride_inner,
    stride_v,
    d_stride_outer,
    d_stride_inner,
    d_stride_v,
    lowest,  # of valid labels: 0, or less where negative ones are of no column here
    ignore_index,
    logit_scale,
    softcap,
    inv_temperature,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One program per row and block of columns: one read and one write."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = cols < V
    outer_index, inner_index = row // inner, row % inner
    out_ptrs = d_logits_ptr + outer_index * d_stride_outer + inner_index * d_stride_inner
    out_ptrs += cols.to(tl.int64) * d_stride_v
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(out_ptrs, tl.zeros((BLOCK_V,), d_logits_ptr.dtype.element_ty), mask=inside)
        return
    valid = (label >= lowest) & (label < V)
    coefficient = tl.where(valid, tl.load(d_logps_ptr + row), float("nan"))
    row_max, log_sum = tl.load(row_max_ptr + row), tl.load(log_sum_ptr + row)
    in_ptrs = logits_ptr + outer_index * stride_outer + inner_index * stride_inner + cols.to(tl.int64) * stride_v
    x = tl.load(in_ptrs, mask=inside, other=0.0).to(tl.float32)
    d = d_block(x, cols, label, row_max, log_sum, coefficient, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
    tl.store(out_ptrs, d.to(d_logits_ptr.dtype.element_ty), mask=inside)


def token_logps_fwd(logits, rows, labels, out, knobs: Knobs):
    """Launch the forward. `rows` is (outer, inner, stride_outer, stride_inner); `out` maps names to (N,) fp32 tensors,
    the statistics that are missing from it are not computed."""
    V = logits.shape[-1]
    _, inner, stride_outer, stride_inner = rows
    unused = out["logps"]
    token_logps_fwd_kernel[(labels.numel(),)](
        logits,
        labels,
        out["logps"],
        out["row_max"],
        out["log_sum"],
        out.get("entropy", unused),
        out.get("mean_logits", unused),
        out.get("is_top1", unused),
        out.get("log_sum_sq_probs", unused),
        V,
        inner,
        stride_outer,
        stride_inner,
        logits.stride(-1),
        *knobs.scalars,
        HAS_SOFTCAP=knobs.softcap is not None,
        ENTROPY="entropy" in out,
        MEAN_LOGITS="mean_logits" in out,
        IS_TOP1="is_top1" in out,
        LOG_SUM_SQ_PROBS="log_sum_sq_probs" in out,
        **forward_config(V, logits.element_size(), target_name(logits.device)),
    )


def token_logps_bwd(
    logits,
    d_logits,
    rows,
    d_rows,
    labels,
    row_max,
    log_sum,
    d_logps,
    knobs: Knobs,
    lowest=0,
):
    """Launch the backward: d_logits = diag(d_logps) D, in its own dtype and strides; it may be `logits` itself. For the
    head's fp32 tile it writes the D that GEMMs take: over the tile in fp32, into another tensor in 16 bits.

    lowest: of valid labels. A negative one is valid where the logits are some columns of a vocabulary, and the label is
    none of these; others make their rows NaN."""
    V = logits.shape[-1]
    _, inner, stride_outer, stride_inner = rows
    _, _, d_stride_outer, d_stride_inner = d_rows
    config = backward_config(V, target_name(logits.device))
    token_logps_bwd_kernel[(labels.numel(), triton.cdiv(V, config["BLOCK_V"]))](
        logits,
        d_logits,
        labels,
        row_max,
        log_sum,
        d_logps,
        V,
        inner,
        stride_outer,
        stride_inner,
        logits.stride(-1),
        d_stride_outer,
        d_stride_inner,
        d_logits.stride(-1),
        lowest,
        *knobs.scalars,
        HAS_SOFTCAP=knobs.softcap is not None,
        **config,
    )


def forward_config(V: int, element_size: int, target: str = "other") -> dict[str, int]:
    """A rule where nothing was measured: four 16-byte loads in flight per thread, no more lanes than the row can fill.
    A vocabulary that is no multiple of 16 is read logit by logit, each with a predicate. A quarter of the lanes, one
    and its eight 2-byte loads per thread, leaves registers for them."""
    full, warps = constants(target, "token_logps_fwd", (1024, 8))
    width, full = 16 // element_size, full if V % 16 == 0 else full // 4
    lanes = min(full, triton.next_power_of_2(triton.cdiv(V, width)))
    return {"LANES": lanes, "WIDTH": width, "num_warps": max(1, warps * lanes // full)}


def backward_config(V: int, target: str = "other") -> dict[str, int]:
    """A rule where nothing was measured: two 16-byte bf16 loads per thread, one where predicates need the registers."""
    full, warps = constants(target, "token_logps_bwd", (4096, 8))
    block = min(full if V % 16 == 0 else full // 2, triton.next_power_of_2(V))
    return {"BLOCK_V": block, "num_warps": max(1, min(warps, block // 256))}
