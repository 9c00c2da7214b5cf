"""How the head is run: one pure function from sizes and needs to a plan.

    score      nothing needs a gradient                     1 GEMM   one tile
    frozen     the head does not train                      2 GEMMs  one tile; d_hidden's direction from the forward
    pairwise   the head trains, pairs are independent       3 GEMMs  one tile + fp32 d_weight; the loss of a chunk of
                                                                     whole pairs gives their coefficients on the spot
    pending    as pairwise, one pair is longer than a tile  3 GEMMs  one tile + three fp32 d_weight: D^T hidden of the
                                                                     two sequences waits for their coefficients
    recompute  the loss couples pairs, or unknown           4 GEMMs  one tile, and an fp32 d_hidden where a 16-bit one
                                                                     is returned; the backward goes slice by slice

A GEMM is one product over N x H x V: 2 N H V FLOPs. A tile is the only piece of the logits that ever exists.
"""

from dataclasses import dataclass

import torch

GEMMS = {"score": 1, "frozen": 2, "pairwise": 3, "pending": 3, "recompute": 4}
DEFAULT_TILE_MIB = 256
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
    longest_pair: int | None = None,
    tile_mib: int = DEFAULT_TILE_MIB,
    device_type: str = "cuda",
) -> HeadPlan:
    """Choose the plan for N tokens, width H, vocabulary V.

    dtype: of hidden and weight; hidden_grad, head_grad: what needs gradients; separable: whether the loss is a sum over
    pairs, with coefficients known once a pair is scored; longest_pair: tokens of the longest pair, None: fits a tile.
    device_type: "cuda" stands for any device with Triton, its interpreter on CPU tensors included.
    A tile has at least one row: with V x 4 bytes above the budget it is that much larger.
    """
    if min(N, H, V - 1, tile_mib - 1) < 0 or H < 1:
        raise ValueError(f"plan_head: sizes must be positive, got N={N}, H={H}, V={V}, tile_mib={tile_mib}")
    half, on_cpu = dtype in (torch.float16, torch.bfloat16), device_type == "cpu"
    budget = tile_mib << 20
    thin = 2 * H * 4 if hidden_grad or head_grad else 0  # a token's d_hidden and W[y]

    def rows_within(columns: int) -> int:
        """Rows of a tile within the budget and, with what goes along with a row, within a tenth above it."""
        logits = 4 * columns  # fp32; the 16-bit D that 16-bit GEMMs take is written over them
        return max(1, min(budget // logits, budget * 11 // 10 // (logits + thin)))

    budget_rows = rows_within(V)
    rows = max(1, min(N, budget_rows, _CPU_WHOLE_ROWS if on_cpu else N))
    name, reason = _choose(hidden_grad, head_grad, separable, longest_pair, rows, budget_rows)
    if name == "pairwise" and longest_pair is not None:
        rows = max(rows, longest_pair)
    columns = slice_columns = V
    if on_cpu and name in ("score", "frozen", "recompute"):
        columns = min(V, CPU_COLUMNS, budget // 4)
        rows = max(1, min(N, _CPU_ROWS, rows_within(columns)))
    workspace = rows * (4 * columns + thin)
    if name == "recompute":
        bytes_per_logit = 6 if half and not on_cpu else 4  # there D is a 16-bit copy
        slice_budget = min(budget, _CPU_SLICE_BYTES) if on_cpu else budget
        slice_columns = max(1, min(columns, slice_budget // (max(N, 1) * bytes_per_logit)))
        workspace = max(workspace, slice_columns * N * bytes_per_logit) + (N * H * 4 if hidden_grad and half else 0)
    gradient_is_work = 1 if half else 0  # an fp32 d_weight is itself what is returned
    workspace += V * H * 4 * {"pairwise": gradient_is_work, "pending": 2 + gradient_is_work}.get(name, 0)
    gemms = GEMMS[name]
    if head_grad and not hidden_grad and name != "score":
        gemms -= 1  # a frozen backbone: no d_hidden
    return HeadPlan(name, rows, columns, slice_columns, gemms, gemms * 2 * N * H * V, workspace, reason)


def _choose(hidden_grad, head_grad, separable, longest_pair, rows, budget_rows) -> tuple[str, str]:
    if not (hidden_grad or head_grad):
        return "score", "no input needs a gradient"
    if not head_grad:
        return "frozen", "the head does not train"
    if not separable:
        return "recompute", "a token's coefficient is known only after all tokens are scored"
    if longest_pair is not None and longest_pair > budget_rows:
        return "pending", f"the longest pair has {longest_pair} tokens, a tile {budget_rows} rows"
    return "pairwise", "the head trains and pairs are independent"
