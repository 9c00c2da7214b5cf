"""FlexAttention's block mask of a packed row (layout.py), made from its runs: no tensor has T x T entries.

A query sees the keys of its own sequence up to itself: a few runs of the row. So a block of queries and a block of keys
meet where the ends of those runs say so. All of it is computed on the layout's device, and nothing waits for the host.
"""

import torch
from torch import Tensor

from .layout import SharedPrefixLayout

BLOCK = 128  # FlexAttention's own default; its kernels' tiles divide it


def visible_keys(layout: SharedPrefixLayout, window: int | None) -> list[tuple[Tensor, Tensor]]:
    """Runs (begin, end), each (T,) int32, that share no key and do not meet: query q sees begin[q] <= k < end[q]."""
    rows = torch.arange(layout.length, dtype=torch.int32, device=layout.positions.device)
    counts = layout.query_ends.diff()
    owner = torch.arange(len(counts), device=rows.device).repeat_interleave(counts, output_size=layout.length)
    visible = []
    for level, run in enumerate(layout.runs):
        begin, end, position = run.index_select(1, owner)
        if level == 0:
            end = rows + 1  # its own tokens: up to itself
        if window is not None:
            begin = torch.minimum(end, begin + (layout.positions - (window - 1) - position).clamp_(min=0))
        visible.append((begin, end))
    return visible


def block_mask(layout: SharedPrefixLayout, window: int | None, block: int = BLOCK):
    """The `BlockMask` of a row: what `create_block_mask` returns, without its T x T mask. window: see attention.py."""
    from torch.nn.attention.flex_attention import BlockMask

    positions, until = layout.positions, layout.until
    # Only tensors are captured, so that all windows, and none, share a compiled kernel
    widest = positions.new_full((), layout.length if window is None else window)

    def sees(_batch, _head, q, k):
        return (k <= q) & (q < until[k]) & (positions[q] - positions[k] < widest)

    partial, full = meeting_blocks(visible_keys(layout, window), block)
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(layout.length,) * 2
    )


def meeting_blocks(visible: list[tuple[Tensor, Tensor]], block: int) -> tuple[Tensor, Tensor]:
    """partial, full: (blocks, blocks) bool, where some entries of a block are visible, and where all are."""
    T = len(visible[0][0])
    rows = torch.arange(T, dtype=torch.int32, device=visible[0][0].device)
    one, blocks = torch.ones_like(rows), -(-T // block)
    line = rows // block * (blocks + 1)

    def count(runs) -> Tensor:
        """(query blocks, key blocks) int32: over the queries, how many of their runs of key blocks hold a block."""
        marks = torch.zeros(blocks * (blocks + 1), dtype=torch.int32, device=rows.device)
        for begin, end in runs:
            marks.index_add_(0, line + begin, one)
            marks.index_add_(0, line + torch.maximum(begin, end), one, alpha=-1)
        return marks.view(blocks, blocks + 1).cumsum(1, dtype=torch.int32)[:, :blocks]

    def up(x: Tensor) -> Tensor:
        return (x + (block - 1)) // block

    touched = count((begin // block, torch.where(begin < end, up(end), 0)) for begin, end in visible) > 0
    full = count((up(begin), end // block) for begin, end in visible) == block  # runs do not meet: one fills a block
    return touched & ~full, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, query blocks) int32: how many; (1, 1, query blocks, key blocks) int32: which, and then the others."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(1, dtype=torch.int32)[None, None], order[None, None]
