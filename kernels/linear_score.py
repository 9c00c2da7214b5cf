"""Token log-probs from hidden states and the head in one pass, with no logits tile: forward only, for plan `score`.

    z = transform(hidden weight^T + bias)        logp = (z_y - max_v z_v) - log sum_v exp(z_v - max)

A GEMM whose epilogue is one step of an online softmax. Logits live in the fp32 accumulator and are never rounded nor
written. A program owns BLOCK_N rows and a run of columns; it writes three floats per row (seven with statistics), and a
second, tiny kernel merges the runs in a fixed order. Runs depend on V alone: a row's bits depend neither on the rows
around it nor on the number of processors, so cached reference log-probs equal recomputed ones.

Floor: 2 N V H operations at the GEMM rate. N=8192 H=4096 V=131,072 is 8.8 TFLOP, on an H200 (790 TFLOP/s in bf16,
4.3 TB/s) 11.1 ms. A GEMM that writes an fp32 tile and a pass that reads it move 8 bytes per logit more, 2.0 ms whatever
H is: 18 % of the GEMM at H=4096, 72 % at H=1024. That is what this kernel can win. Its GEMM loses some of it to a
library's: it has plain pointers, no multicast between neighbours, and tensor cores that idle during the epilogue. It is
expected to win for narrow models; for wide ones that is open until it is measured. Up to some 180 rows both wait for
the weight, 0.25 ms for one read of it.

It has no gradient (a backward would recompute the tile), and its sums are grouped otherwise than those of a tiled GEMM:
where policy and reference must agree to the last bit, score both in the same way.
"""

import torch
import triton
import triton.language as tl

from .numerics import LOWEST, Knobs, fold, log_prob, merge, rescale_dots, transform
from .tuned import RELATIVES, constants, target_name


@triton.jit
def linear_score_fwd_kernel(
    hidden_ptr,  # (N, H), rows `stride_hidden` apart
    weight_ptr,  # (V, H), rows `stride_weight` apart, dtype of hidden
    bias_ptr,  # (V,), read where HAS_BIAS
    labels_ptr,  # (N,)
    partials_ptr,  # (3 or 7, splits, stride_split) fp32: max, sum, target; entropy, mean, best before, squares
    N,
    V,
    H,
    stride_hidden,
    stride_weight,
    stride_split,
    splits,
    split_columns,  # a multiple of BLOCK_V
    group,  # row blocks that share hidden states in L2
    ignore_index,
    logit_scale,
    softcap,
    inv_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    MEAN_LOGITS: tl.constexpr,
    IS_TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    FOLD_V: tl.constexpr,  # BLOCK_V or half of it
):
    """Programs that run together take the same columns for `group` blocks of rows, rows fastest: a weight tile is read
    from memory once per group and from L2 otherwise, and the group's hidden states stay in L2 for all columns."""
    blocks = tl.cdiv(N, BLOCK_N)
    first_block = tl.program_id(0) // (group * splits) * group
    within = tl.program_id(0) % (group * splits)
    height = tl.minimum(blocks - first_block, group)
    row = (first_block + within % height) * BLOCK_N
    offs_n = row + tl.arange(0, BLOCK_N)
    split = within // height

    label = tl.load(labels_ptr + offs_n, mask=offs_n < N, other=ignore_index)
    if tl.max((label != ignore_index).to(tl.int32), axis=0) == 0:  # the merge does not look at ignored rows
        return
    target_col = tl.where((label >= 0) & (label < V), label, -1).to(tl.int32)

    # 64-bit scalar bases and 32-bit offsets inside a tile: half the registers of a tile of pointers. Rows and columns
    # past the end repeat the last, their results are dropped, and loads need no mask but H's
    offs_h = tl.arange(0, BLOCK_H)
    hidden_ptr += row.to(tl.int64) * stride_hidden
    hidden_offs = tl.minimum(tl.arange(0, BLOCK_N), N - 1 - row)[:, None] * stride_hidden + offs_h[None, :]
    running_max = tl.full((BLOCK_N,), LOWEST, tl.float32)
    running_sum = tl.zeros((BLOCK_N,), tl.float32)  # sum of exp(z - max)
    running_dot = tl.zeros((BLOCK_N,), tl.float32)  # sum of exp(z - max) (z - max)
    running_sq = tl.zeros((BLOCK_N,), tl.float32)  # sum of exp(z - max)^2
    total = tl.zeros((BLOCK_N,), tl.float32)  # sum of z
    target = tl.zeros((BLOCK_N,), tl.float32)
    best_before = tl.full((BLOCK_N,), -float("inf"), tl.float32)  # largest z left of the label
    for start in range(split * split_columns, tl.minimum((split + 1) * split_columns, V), BLOCK_V):
        tile_ptr = weight_ptr + tl.cast(start, tl.int64) * stride_weight
        weight_offs = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - start)[None, :] * stride_weight + offs_h[:, None]
        x = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + tl.minimum(start + tl.arange(0, BLOCK_V), V - 1)).to(tl.float32)[None, :]
        for h in range(0, H, BLOCK_H):
            hidden = tl.load(hidden_ptr + h + hidden_offs, mask=offs_h[None, :] < H - h, other=0.0)
            weight = tl.load(tile_ptr + h + weight_offs, mask=offs_h[:, None] < H - h, other=0.0)
            x = tl.dot(hidden, weight, x, input_precision=INPUT_PRECISION)
        # FOLD_V columns at a time: what the epilogue needs beside a whole tile does not fit in registers
        parts = (x,)
        if FOLD_V < BLOCK_V:
            parts = tl.split(tl.permute(tl.reshape(x, (BLOCK_N, 2, FOLD_V)), (0, 2, 1)))
        for part in tl.static_range(BLOCK_V // FOLD_V):
            cols = start + part * FOLD_V + tl.arange(0, FOLD_V)
            x = parts[part]
            z, _ = transform(x, logit_scale, softcap, inv_temperature, HAS_SOFTCAP)
            inside = (cols < V)[None, :]
            if MEAN_LOGITS:
                total += tl.sum(tl.where(inside, z, 0.0), axis=1)
            z = tl.where(inside, z, -float("inf"))
            target += tl.sum(tl.where(cols[None, :] == target_col[:, None], z, 0.0), axis=1)
            if IS_TOP1:
                before = tl.where(cols[None, :] < target_col[:, None], z, -float("inf"))
                best_before = tl.maximum(best_before, tl.max(before, axis=1))
            running_max, running_sum, running_dot, running_sq = fold(
                running_max, running_sum, running_dot, running_sq, z, ENTROPY, LOG_SUM_SQ_PROBS
            )

    field = tl.cast(splits, tl.int64) * stride_split
    out_ptrs = partials_ptr + split.to(tl.int64) * stride_split + offs_n  # stride_split is a multiple of BLOCK_N
    tl.store(out_ptrs, running_max)
    tl.store(out_ptrs + field, running_sum)
    tl.store(out_ptrs + 2 * field, target)
    if ENTROPY:
        tl.store(out_ptrs + 3 * field, running_dot)
    if MEAN_LOGITS:
        tl.store(out_ptrs + 4 * field, total)
    if IS_TOP1:
        tl.store(out_ptrs + 5 * field, best_before)
    if LOG_SUM_SQ_PROBS:
        tl.store(out_ptrs + 6 * field, running_sq)


@triton.jit
def linear_score_merge_kernel(
    partials_ptr,  # (3 or 7, splits, stride_split) fp32, as above
    labels_ptr,  # (N,)
    logps_ptr,  # (N,) fp32
    row_max_ptr,  # (N,) fp32
    log_sum_ptr,  # (N,) fp32
    entropy_ptr,  # (N,) fp32, and so on: written only where the flag is set
    mean_logits_ptr,
    is_top1_ptr,
    log_sum_sq_probs_ptr,
    N,
    V,
    stride_split,
    splits,
    ignore_index,
    ENTROPY: tl.constexpr,
    MEAN_LOGITS: tl.constexpr,
    IS_TOP1: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,  # at least `splits`
):
    """One program BLOCK_N rows; all runs of columns at once. The partial results of ignored rows may be anything."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_s = tl.arange(0, BLOCK_S)
    inside, found = offs_n < N, (offs_s < splits)[:, None]
    label = tl.load(labels_ptr + offs_n, mask=inside, other=ignore_index)
    scored = label != ignore_index
    valid = (label >= 0) & (label < V)

    field = tl.cast(splits, tl.int64) * stride_split
    ptrs = partials_ptr + offs_s.to(tl.int64)[:, None] * stride_split + offs_n[None, :]
    maxima = tl.load(ptrs, mask=found, other=LOWEST)
    sums = tl.load(ptrs + field, mask=found, other=0.0)
    row_max, sum_exp, log_sum, shift, shrink = merge(maxima, sums)
    target = tl.sum(tl.load(ptrs + 2 * field, mask=found, other=0.0), axis=0)  # all 0 but the label's own
    logp = log_prob(target, row_max, sum_exp, log_sum, valid)
    tl.store(logps_ptr + offs_n, tl.where(scored, logp, 0.0), mask=inside)
    tl.store(row_max_ptr + offs_n, tl.where(scored, row_max, 0.0), mask=inside)
    tl.store(log_sum_ptr + offs_n, tl.where(scored, log_sum, 0.0), mask=inside)
    if ENTROPY:
        dots = rescale_dots(tl.load(ptrs + 3 * field, mask=found, other=0.0), sums, shift, shrink)
        entropy = log_sum - tl.sum(dots, axis=0) / sum_exp
        tl.store(entropy_ptr + offs_n, tl.where(scored, entropy, 0.0), mask=inside)
    if MEAN_LOGITS:
        mean = tl.sum(tl.load(ptrs + 4 * field, mask=found, other=0.0), axis=0) / V
        tl.store(mean_logits_ptr + offs_n, tl.where(scored, mean, 0.0), mask=inside)
    if IS_TOP1:
        before = tl.max(tl.load(ptrs + 5 * field, mask=found, other=-float("inf")), axis=0)
        first = scored & valid & (target >= row_max) & (target > before)
        tl.store(is_top1_ptr + offs_n, first.to(tl.float32), mask=inside)
    if LOG_SUM_SQ_PROBS:
        squares = tl.load(ptrs + 6 * field, mask=found, other=0.0)
        log_sum_sq = tl.log(tl.sum(squares * shrink * shrink, axis=0)) - 2.0 * log_sum
        tl.store(log_sum_sq_probs_ptr + offs_n, tl.where(scored, log_sum_sq, 0.0), mask=inside)


# (BLOCK_N, BLOCK_V, BLOCK_H, FOLD_V, num_warps, num_stages). A rule, not a measurement: eight warps share the largest
# tile whose fp32 accumulator leaves half of the registers to the epilogue (128 x 256 where the tensor cores read both
# operands from shared memory, 128 x 128 where they pass through registers), and stages fill shared memory: 164 KiB on
# sm_80, 228 on sm_90 and sm_100, 100 on sm_120, 64 on gfx942. Compiled, none of them spills (tests/aot_compile.py).
# On sm_100 128 x 256 would, as tensor memory is read into registers a whole tile at once.
HALF = {
    "cuda:80": (128, 128, 64, 64, 8, 4),
    "cuda:90": (128, 256, 64, 128, 8, 4),
    "cuda:100": (128, 128, 64, 64, 8, 4),
    "cuda:120": (128, 128, 64, 64, 8, 4),
    "hip:gfx942": (128, 256, 32, 128, 8, 2),
    "other": (64, 64, 32, 32, 4, 2),
}
TF32 = {
    "cuda:80": (128, 128, 32, 64, 8, 4),
    "cuda:90": (128, 128, 32, 64, 8, 4),
    "cuda:100": (128, 128, 32, 64, 8, 4),
    "cuda:120": (128, 128, 32, 64, 8, 3),
    "other": (64, 64, 32, 32, 4, 2),
}
# Exact fp32 products run outside the tensor cores on NVIDIA; AMD's take fp32
FP32 = {"hip:gfx942": (128, 128, 32, 64, 8, 2), "other": (128, 64, 16, 64, 8, 3)}

MAX_SPLITS = 128  # runs of columns: enough programs for a GPU from one block of rows, 1.5 KiB of partial results a row
GROUP_BYTES = 16 << 20  # hidden states that programs share at a time, well inside the L2 of a data-centre GPU


def linear_score_config(target: str, dtype: torch.dtype, *, softcap: bool, stats: bool, allow_tf32: bool) -> dict:
    """Block sizes and launch options. A soft-cap and statistics need registers of their own: their tiles are narrower,
    but fold the same columns in the same order, so that asking for more changes no bit of what is asked for."""
    table = HALF if dtype != torch.float32 else TF32 if allow_tf32 and not target.startswith("hip") else FP32
    rule = table.get(RELATIVES.get(target, target), table["other"])
    choice = constants(target, "linear_score_fwd", rule) if table is HALF else rule
    block_n, block_v, block_h, fold_v, num_warps, num_stages = choice
    widest = fold_v if stats else max(fold_v, 128) if softcap else block_v
    blocks = dict(BLOCK_N=block_n, BLOCK_V=min(block_v, widest), BLOCK_H=block_h, FOLD_V=fold_v)
    return dict(**blocks, num_warps=num_warps, num_stages=num_stages)


def split_vocabulary(V: int, FOLD_V: int) -> tuple[int, int]:
    """(splits, columns of each but the last): runs of whole tiles of the widest kind, 2 FOLD_V."""
    columns = 2 * FOLD_V * triton.cdiv(V, 2 * FOLD_V * MAX_SPLITS)
    return triton.cdiv(V, columns), columns


def linear_score_fwd(hidden, weight, labels, bias, out, knobs: Knobs, *, allow_tf32=False, config=None):
    """Launch. hidden (N, H) with N >= 1 and weight (V, H) of one dtype (bf16, fp16, fp32), columns contiguous, rows
    any stride; bias (V,) or None; labels (N,). `out` maps names to (N,) fp32 tensors as for `token_logps_fwd`: `logps`,
    `row_max` and `log_sum` always, the statistics that are missing from it are not computed. fp32 products are exact
    unless `allow_tf32`. `config` overrides `linear_score_config`, for sweeps. Allocates three floats (seven with
    statistics) for each row and run of columns."""
    (N, H), V = hidden.shape, weight.shape[0]
    flags = dict(
        ENTROPY="entropy" in out,
        MEAN_LOGITS="mean_logits" in out,
        IS_TOP1="is_top1" in out,
        LOG_SUM_SQ_PROBS="log_sum_sq_probs" in out,
    )
    stats = any(flags.values())
    if config is None:
        target = target_name(hidden.device)
        choice = dict(softcap=knobs.softcap is not None, stats=stats, allow_tf32=allow_tf32)
        config = linear_score_config(target, hidden.dtype, **choice)
    BLOCK_N = config["BLOCK_N"]
    assert H == 1 or hidden.stride(1) == weight.stride(1) == 1
    assert max(hidden.stride(0) * BLOCK_N, weight.stride(0) * config["BLOCK_V"]) < 2**31, "offsets inside a tile"
    splits, split_columns = split_vocabulary(V, config["FOLD_V"])
    blocks = triton.cdiv(N, BLOCK_N)
    partials = torch.empty(7 if stats else 3, splits, blocks * BLOCK_N, dtype=torch.float32, device=hidden.device)
    linear_score_fwd_kernel[(blocks * splits,)](
        hidden,
        weight,
        weight if bias is None else bias,
        labels,
        partials,
        N,
        V,
        H,
        hidden.stride(0),
        weight.stride(0),
        partials.stride(1),
        splits,
        split_columns,
        max(1, GROUP_BYTES // (BLOCK_N * H * hidden.element_size())),
        *knobs.scalars,
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=knobs.softcap is not None,
        INPUT_PRECISION="tf32" if allow_tf32 else "ieee",
        **flags,
        **config,
    )
    unused = out["logps"]
    rows = min(32, BLOCK_N)
    linear_score_merge_kernel[(triton.cdiv(N, rows),)](
        partials,
        labels,
        out["logps"],
        out["row_max"],
        out["log_sum"],
        out.get("entropy", unused),
        out.get("mean_logits", unused),
        out.get("is_top1", unused),
        out.get("log_sum_sq_probs", unused),
        N,
        V,
        partials.stride(1),
        splits,
        knobs.ignore_index,
        **flags,
        BLOCK_N=rows,
        BLOCK_S=triton.next_power_of_2(splits),
        num_warps=4,
    )
