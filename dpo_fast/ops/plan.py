"""How the head is run: one pure function from sizes and needs to a plan.

    score      nothing needs a gradient                     1 GEMM   one tile
    frozen     the head does not train                      2 GEMMs  one tile; d_hidden's direction from the forward
    pairwise   the head trains, pairs are independent       3 GEMMs  one tile + fp32 d_weight; the loss of a chunk of
                                                                     whole pairs gives their coefficients on the spot
    pending    as pairwise, one pair is longer than a tile  3 GEMMs  one tile + three fp32 d_weight: D^T hidden of the
                                                                     two sequences waits for their coefficients
    recompute  the loss couples pairs, or unknown;          4 GEMMs  one tile, and an fp32 d_hidden where a 16-bit one
               or where its GEMM costs less than pending's           is returned; the backward goes slice by slice
               passes over d_weight

A GEMM is one product over N x H x V: 2 N H V FLOPs. A tile is the only piece of the logits that ever exists.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GEMMS = {"score": 1, "frozen": 2, "pairwise": 3, "pending": 3, "recompute": 4}
# Rows of a tile on an accelerator. A GEMM's tiles have 128 or 256 rows, and what is left over of one is wasted. Below
# some 700 rows the third GEMM waits for d_weight, which each chunk reads and writes once (8 V H bytes against 2 n V H
# FLOP), and the second has fewer tiles than the device has processors. Arithmetic, not measured.
TILE_ROWS, ROW_MULTIPLE = 2048, 256
MEMORY_SHARE = 32  # ... or rows that fit this share of the device's memory, whose size does not vary between passes
FLOPS_PER_BYTE = 176  # of a data-centre GPU: 760 TFLOP/s by 4.3 TB/s; 147 to 209 from A100 to H100
DEFAULT_TILE_MIB = 256  # on CPU, and the least elsewhere where nothing else is asked for
# Elements to which a tile's row stride is rounded up on an accelerator: 16 bytes let a GEMM use its fast loads, and a
# row of a line's length is read in whole lines
STRIDE_MULTIPLE = 64
# Rows and columns of a tile beyond which a GEMM gains nothing on CPU, where a tile of 8 MiB stays in a cache. For the
# plans that may go through the vocabulary slice by slice; the others take whole rows, of which 384 are nearly as good.
# Processor ms for `frozen` at N=H=1024, V=32,000 in fp32: 1453 with 1024 x 2048, 1499 with 1024 x 4096, 1462 with
# 1024 x 8192, 1469 with 512 x 4096, 1537 with 256 x 8192; 1722 with whole rows, 256 at a time.
_CPU_ROWS, CPU_COLUMNS, _CPU_WHOLE_ROWS = 1024, 2048, 384
_CPU_SLICE_BYTES = 64 << 20  # of a slice with all tokens in `recompute`'s backward


@dataclass(frozen=True)
class HeadPlan:
    """What the fused head will do. `flops` and `workspace_bytes` are counted, not measured."""

    name: str
    chunk_rows: int  # tokens in a tile, forward
    chunk_columns: int  # vocabulary entries in a tile, forward: all of them, or on CPU a slice of an online softmax
    slice_columns: int  # vocabulary entries in a tile of `recompute`'s backward, which holds all tokens; V elsewhere
    gemms: int
    flops: int
    workspace_bytes: int  # beyond inputs, outputs and returned gradients
    reason: str

    def describe(self) -> str:
        return (
            f"{self.name}: {self.gemms} GEMMs, {self.flops / 1e12:.3g} TFLOP, "
            f"tiles of {self.chunk_rows} tokens x {self.chunk_columns} entries, "
            f"{self.workspace_bytes / 2**20:.0f} MiB of work space ({self.reason})"
        )


def plan_head(
    N: int,
    H: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    hidden_grad: bool = True,
    head_grad: bool = True,
    separable: bool = True,
    pair_lengths: Sequence[int] | None = None,
    sequences: int = 2,
    tile_mib: int | None = None,
    device_type: str = "cuda",
    device_memory: int | None = None,
) -> HeadPlan:
    """Choose the plan for N tokens, width H, vocabulary V.

    dtype: of hidden and weight; hidden_grad, head_grad: what needs gradients; separable: whether the loss is a sum over
    pairs, with coefficients known once a pair is scored; pair_lengths: tokens of each pair, None: any fits a tile.
    sequences: of the largest group, where comparisons connect more than pairs; pair_lengths are then of the groups.
    tile_mib: the budget for a tile in MiB, with the 16-bit copy that 16-bit GEMMs take; None: 256 MiB on CPU, 2,048
    rows elsewhere, or fewer where `device_memory` (bytes, None: plenty) is short.
    device_type: "cuda" stands for any device with Triton, its interpreter on CPU tensors included.
    A tile has at least one row: with a row above the budget it is that much larger. On an accelerator the rows of all
    plans are the same for equal sizes, unless a pair is longer than a tile: policy and reference are scored by the same
    GEMMs. On CPU the plans that take whole rows have fewer of them.
    """
    if N < 0 or H < 1 or V < 1 or (tile_mib is not None and tile_mib < 1):
        raise ValueError(f"plan_head: sizes must be positive, got N={N}, H={H}, V={V}, tile_mib={tile_mib}")
    half, on_cpu = dtype in (torch.float16, torch.bfloat16), device_type == "cpu"
    logit_bytes = 6 if half and not on_cpu else 4  # fp32, and there D as 16-bit GEMMs take it
    thin = 2 * H * 4  # a token's d_hidden and W[y]
    if tile_mib is not None:
        budget = tile_mib << 20
    elif on_cpu:
        budget = DEFAULT_TILE_MIB << 20
    else:
        wanted = TILE_ROWS * (logit_bytes * V + thin)
        allowed = wanted if device_memory is None else max(device_memory // MEMORY_SHARE, DEFAULT_TILE_MIB << 20)
        budget = min(wanted, allowed)

    def rows_within(columns: int) -> int:
        """Rows of a tile within the budget and, with what goes along with a row, within a tenth above it."""
        logits = logit_bytes * columns
        return max(1, min(budget // logits, budget * 11 // 10 // (logits + thin)))

    budget_rows = rows_within(V)
    most = _CPU_WHOLE_ROWS if on_cpu else TILE_ROWS if tile_mib is None else budget_rows
    rows = max(1, min(N, min(budget_rows, most) if on_cpu else round_down(min(budget_rows, most))))
    name, reason = _choose(hidden_grad, head_grad, separable, N, pair_lengths, sequences, budget_rows, on_cpu)
    if name == "pairwise" and pair_lengths:
        rows = max(rows, *pair_lengths)
    columns = slice_columns = V
    if on_cpu and name in ("score", "frozen", "recompute"):
        columns = min(V, CPU_COLUMNS, budget // 4)
        rows = max(1, min(N, _CPU_ROWS, rows_within(columns)))
    workspace = rows * (logit_bytes * columns + thin)
    if name == "recompute":
        slice_budget = min(budget, _CPU_SLICE_BYTES) if on_cpu else budget
        slice_columns = max(1, min(columns, slice_budget // (max(N, 1) * logit_bytes)))
        if not on_cpu and slice_columns < V:
            slice_columns = round_down(slice_columns)
        workspace = max(workspace, slice_columns * N * logit_bytes) + (N * H * 4 if hidden_grad and half else 0)
    gradient_is_work = 1 if half else 0  # an fp32 d_weight is itself what is returned
    workspace += V * H * 4 * {"pairwise": gradient_is_work, "pending": 2 + gradient_is_work}.get(name, 0)
    gemms = GEMMS[name]
    if head_grad and not hidden_grad and name != "score":
        gemms -= 1  # a frozen backbone: no d_hidden
    return HeadPlan(name, rows, columns, slice_columns, gemms, gemms * 2 * N * H * V, workspace, reason)


def oracle_plan(N: int, H: int, V: int, *, hidden_grad: bool, head_grad: bool) -> HeadPlan:
    """What impl="reference" runs: all logits, in fp64, and autograd through them."""
    gemms = 1 + hidden_grad + head_grad
    return HeadPlan("reference", N, V, V, gemms, gemms * 2 * N * H * V, 16 * N * V, "the oracle was asked for")


def round_down(count: int) -> int:
    """Rows or columns of a tile on an accelerator, down to whole tiles of its GEMMs as far as there are any."""
    multiple = next((m for m in (ROW_MULTIPLE, 64, 16) if count >= m), 1)
    return count - count % multiple


def row_stride(columns: int) -> int:
    """Elements from one row of a tile to the next on an accelerator."""
    return -(-columns // STRIDE_MULTIPLE) * STRIDE_MULTIPLE


def _choose(hidden_grad, head_grad, separable, N, pair_lengths, sequences, budget_rows, on_cpu) -> tuple[str, str]:
    if not (hidden_grad or head_grad):
        return "score", "no input needs a gradient"
    if not head_grad:
        return "frozen", "the head does not train"
    if not separable:
        return "recompute", "a token's coefficient is known only after all tokens are scored"
    long = [length for length in pair_lengths or () if length > budget_rows]
    if not long:
        return "pairwise", "the head trains and pairs are independent"
    why = f"the longest pair has {max(long)} tokens, a tile {budget_rows} rows"
    if sequences > 2:  # pending holds a d_weight of each sequence of a group
        return "recompute", f"{why}, and groups of up to {sequences} sequences"
    # Of each of a long pair's two sequences, pending zeroes a d_weight and adds it to the whole: 16 V H bytes, beside
    # its GEMMs. Another GEMM over all tokens takes 2 N V H FLOP. On CPU bytes win always.
    if on_cpu or 32 * len(long) * FLOPS_PER_BYTE < 2 * N:
        return "pending", why
    return "recompute", f"{why}; a fourth GEMM takes less time than another d_weight for each of its sequences"
