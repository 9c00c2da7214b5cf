"""Log-softmax of each row of logits at its label, in one read of the row; and its gradient.

    logp = (z_l - max_v z_v) - log sum_v exp(z_v - max)            d logp / d z_v = [v = l] - p_v

z = slope y is the transformed logit (numerics.py), l the label. No probability is stored: the forward keeps two floats
per row (`row_max`, `log_sum`), from which the backward rebuilds each p_v. Subtracting the maximum first, and not the
sum of both, keeps the digits that a large log-sum-exp would swallow. The same pass can report entropy, mean logit,
top-1 hit and log sum p^2.
"""

import triton
import triton.language as tl

from .numerics import LOG2_E, LOWEST, Knobs, bend, d_block, fold, merge, nats, rescale_dots
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
    factor,
    factor_rest,
    slope,
    slope_log2,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGITS: tl.constexpr,
    IS_TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    """One program per row, with LANES independent online softmaxes. In a step a lane takes WIDTH columns: neighbours,
    one 16-byte load, where ADJACENT; else LANES apart, as then it is threads that load neighbours. So a lane never
    leaves its thread, and threads wait for each other only at the end. A step takes one `exp2` per logit, and one per
    lane. Only the row's end is masked. It goes first, as Triton wants what a loop sums up to be used once after it."""
    row = tl.program_id(0)
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

    slope, slope_log2 = tl.cast(slope, tl.float32), tl.cast(slope_log2, tl.float32)
    row_ptr = logits_ptr + (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner
    offs = tl.arange(0, LANES)[:, None] * (WIDTH if ADJACENT else 1)
    offs += tl.arange(0, WIDTH)[None, :] * (1 if ADJACENT else LANES)
    top = tl.full((LANES,), LOWEST, tl.float32)  # the largest y
    sums = tl.zeros((LANES,), tl.float32)  # of exp(z - max)
    dots = tl.zeros((LANES,), tl.float32)  # of exp(z - max) (y - max y)
    squares = tl.zeros((LANES,), tl.float32)  # of exp(z - max)^2
    total = tl.zeros((LANES,), tl.float32)  # of y
    before = tl.full((LANES,), -float("inf"), tl.float32)  # the largest y left of the label
    whole = V // (LANES * WIDTH) * (LANES * WIDTH)
    if whole < V:
        cols = whole + offs
        inside = cols < V
        x = tl.load(row_ptr + cols.to(tl.int64) * stride_v, mask=inside, other=0.0).to(tl.float32)
        y = bend(x, factor, factor_rest, HAS_SOFTCAP, NEGATIVE)
        if MEAN_LOGITS:
            total += tl.sum(tl.where(inside, y, 0.0), axis=1)
        y = tl.where(inside, y, -float("inf"))
        if IS_TOP1:
            before = tl.maximum(before, tl.max(tl.where(cols < label, y, -float("inf")), axis=1))
        top, sums, dots, squares = fold(top, sums, dots, squares, y, slope_log2, ENTROPY, LOG_SUM_SQ_PROBS)
    for start in range(0, whole, LANES * WIDTH):
        cols = start + offs
        x = tl.load(row_ptr + cols.to(tl.int64) * stride_v).to(tl.float32)
        y = bend(x, factor, factor_rest, HAS_SOFTCAP, NEGATIVE)
        if MEAN_LOGITS:
            total += tl.sum(y, axis=1)
        if IS_TOP1:
            before = tl.maximum(before, tl.max(tl.where(cols < label, y, -float("inf")), axis=1))
        top, sums, dots, squares = fold(top, sums, dots, squares, y, slope_log2, ENTROPY, LOG_SUM_SQ_PROBS)

    top, sum_exp, shift, shrink = merge(top, sums, slope_log2)
    log_sum = tl.log(sum_exp)

    # A label outside the vocabulary is never used as an address; its row becomes NaN.
    valid = (label >= 0) & (label < V)
    x = tl.load(row_ptr + tl.where(valid, label, 0).to(tl.int64) * stride_v).to(tl.float32)
    target = bend(x, factor, factor_rest, HAS_SOFTCAP, NEGATIVE)
    logp = tl.where(sum_exp == 0.0, -float("inf"), (target - top) * slope - log_sum)
    tl.store(logps_ptr + row, tl.where(valid, logp, float("nan")))
    row_max, stored_log_sum = nats(top, log_sum, slope)
    tl.store(row_max_ptr + row, row_max)
    tl.store(log_sum_ptr + row, stored_log_sum)
    if ENTROPY:
        dot = tl.sum(rescale_dots(dots, sums, shift, shrink), axis=0)
        tl.store(entropy_ptr + row, log_sum - slope * dot / sum_exp)
    if MEAN_LOGITS:
        tl.store(mean_logits_ptr + row, slope * tl.sum(total, axis=0) / V)
    if IS_TOP1:
        first = (target >= top) & (target > tl.max(before, axis=0)) & valid
        tl.store(is_top1_ptr + row, first.to(tl.float32))
    if LOG_SUM_SQ_PROBS:
        tl.store(log_sum_sq_probs_ptr + row, tl.log(tl.sum(squares * shrink * shrink, axis=0)) - 2.0 * log_sum)


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
    factor,
    factor_rest,
    slope,
    derivative,
    HAS_SOFTCAP: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EVEN: tl.constexpr,  # V is a multiple of 16
):
    """One program per row and block of columns: one read and one write. A predicate per 16 bytes costs nothing; where
    there would be one per logit, only the last block has them."""
    row = tl.program_id(0)
    block = tl.program_id(1) * BLOCK_V
    cols = block + tl.arange(0, BLOCK_V)
    inside = cols < V
    outer_index, inner_index = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
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
    hit = tl.where(valid, label, -1).to(tl.int32) - block
    whole = block + BLOCK_V <= V
    if EVEN:
        whole = False
    if whole:
        y = bend(tl.load(in_ptrs).to(tl.float32), factor, factor_rest, HAS_SOFTCAP, NEGATIVE)
        d = d_block(y, hit, row_max, log_sum, coefficient, slope, derivative, HAS_SOFTCAP, BLOCK_V)
        tl.store(out_ptrs, d.to(d_logits_ptr.dtype.element_ty))
    else:
        x = tl.load(in_ptrs, mask=inside, other=0.0).to(tl.float32)
        y = bend(x, factor, factor_rest, HAS_SOFTCAP, NEGATIVE)
        d = d_block(y, hit, row_max, log_sum, coefficient, slope, derivative, HAS_SOFTCAP, BLOCK_V)
        tl.store(out_ptrs, d.to(d_logits_ptr.dtype.element_ty), mask=inside)


def token_logps_fwd(logits, rows, labels, out, knobs: Knobs):
    """Launch the forward. `rows` is (outer, inner, stride_outer, stride_inner); `out` maps names to (N,) fp32 tensors,
    the statistics that are missing from it are not computed."""
    V = logits.shape[-1]
    _, inner, stride_outer, stride_inner = rows
    aligned = logits.data_ptr() % 16 == stride_outer % 16 == stride_inner % 16 == 0 and logits.stride(-1) == 1
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
        knobs.ignore_index,
        *knobs.factor,
        knobs.slope,
        knobs.slope * LOG2_E.value,
        **knobs.flags,
        ENTROPY="entropy" in out,
        MEAN_LOGITS="mean_logits" in out,
        IS_TOP1="is_top1" in out,
        LOG_SUM_SQ_PROBS="log_sum_sq_probs" in out,
        **forward_config(V, logits.element_size(), aligned, target_name(logits.device)),
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
        knobs.ignore_index,
        *knobs.factor,
        knobs.slope,
        knobs.derivative,
        **knobs.flags,
        **config,
    )


def forward_config(V: int, element_size: int, aligned: bool = True, target: str = "other") -> dict[str, int]:
    """A rule where nothing was measured: four 16-byte loads per thread and step, no more lanes than the row can fill.
    Rows that are not `aligned` to 16 elements are read logit by logit, half as many at a time."""
    full, warps = constants(target, "token_logps_fwd", (1024, 8))
    width, full = 16 // element_size, full if aligned else full // 2
    lanes = min(full, triton.next_power_of_2(triton.cdiv(V, width)))
    return {"LANES": lanes, "WIDTH": width, "ADJACENT": aligned, "num_warps": max(1, warps * lanes // full)}


def backward_config(V: int, target: str = "other") -> dict[str, int]:
    """A rule where nothing was measured: two 16-byte bf16 loads per thread, one where predicates need the registers."""
    full, warps = constants(target, "token_logps_bwd", (4096, 8))
    even = V % 16 == 0
    block = min(full if even else full // 2, triton.next_power_of_2(V))
    return {"BLOCK_V": block, "EVEN": even, "num_warps": max(1, min(warps, block // 256))}
