"""How the head is run: one pure function from sizes and needs to a plan.

    score      nothing needs a gradient                     1 GEMM   one tile
    frozen     the head does not train                      2 GEMMs  one tile; d_hidden's direction from the forward
    pairwise   the head trains, pairs are independent       3 GEMMs  one tile + fp32 d_weight; the loss of a chunk of
                                                                     whole pairs gives their coefficients on the spot
    pending    as pairwise, one pair is longer than a tile  3 GEMMs  one tile + three fp32 d_weight: D^T hidden of the
                                                                     two sequences waits for their coefficients
    recompute  the loss couples pairs, or unknown           4 GEMMs  one tile + fp32 d_hidden; the backward goes
                                                                     vocabulary slice by slice

A GEMM is one product over N x H x V: 2 N H V FLOPs. A tile is the only piece of the logits that ever exists.
"""

from dataclasses import dataclass

import torch

GEMMS = {"score": 1, "frozen": 2, "pairwise": 3, "pending": 3, "recompute": 4}
DEFAULT_TILE_MIB = 256
# Rows of a tile beyond which a GEMM gains nothing. On CPU, more rows only cost page faults: with H=1024, V=32,000 fp32,
# bare GEMMs take 2.76, 2.47, 2.37, 2.40, 2.44 processor seconds in tiles of 64, 128, 256, 512, 1024 rows.
_ENOUGH_ROWS = {"cpu": 256}


@dataclass(frozen=True)
class HeadPlan:
    """What the fused head will do. `flops` and `workspace_bytes` are counted, not measured."""

    name: str
    chunk_rows: int  # tokens in a tile, forward
    slice_columns: int  # vocabulary entries in a tile of `recompute`'s backward; V elsewhere
    gemms: int
    flops: int
    workspace_bytes: int  # beyond inputs, outputs and returned gradients
    reason: str

    def describe(self) -> str:
        return (
            f"{self.name}: {self.gemms} GEMMs, {self.flops / 1e12:.3g} TFLOP, tiles of {self.chunk_rows} tokens, "
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
    A tile has at least one row: with V x 4 bytes above the budget it is that much larger.
    """
    if min(N, H, V - 1, tile_mib - 1) < 0 or H < 1:
        raise ValueError(f"plan_head: sizes must be positive, got N={N}, H={H}, V={V}, tile_mib={tile_mib}")
    half = dtype in (torch.float16, torch.bfloat16)
    # On an accelerator the gradient's GEMMs take the model's dtype, so the tile has a 16-bit twin
    bytes_per_logit = 4 + 2 * (half and device_type != "cpu" and (hidden_grad or head_grad))
    budget_rows = max(1, (tile_mib << 20) // (V * bytes_per_logit))
    rows = max(1, min(budget_rows, N, _ENOUGH_ROWS.get(device_type, budget_rows)))

    name, reason = _choose(hidden_grad, head_grad, separable, longest_pair, rows, budget_rows)
    if name == "pairwise" and longest_pair is not None:
        rows = max(rows, longest_pair)
    workspace = rows * V * bytes_per_logit
    columns = V
    if name == "recompute":
        columns = max(1, min(V, (tile_mib << 20) // (max(N, 1) * bytes_per_logit)))
        workspace = max(workspace, columns * N * bytes_per_logit) + (N * H * 4 if hidden_grad else 0)
    gradient_is_work = 1 if half else 0  # an fp32 d_weight is itself what is returned
    workspace += V * H * 4 * {"pairwise": gradient_is_work, "pending": 2 + gradient_is_work}.get(name, 0)
    gemms = GEMMS[name]
    if head_grad and not hidden_grad and name != "score":
        gemms -= 1  # a frozen backbone: no d_hidden
    return HeadPlan(name, rows, columns, gemms, gemms * 2 * N * H * V, workspace, reason)


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
