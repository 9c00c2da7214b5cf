"""FlexAttention's block mask of a packed row (layout.py), made from its segments: no tensor has S x S entries.

A query sees two runs of keys: from the beginning of its own sequence in the row to itself, and, in a rejected branch,
its prefix. So a block of queries and a block of keys meet where the ends of those runs say so. All of it is computed on
the layout's device, and nothing waits for the host.
"""

import torch
from torch import Tensor

from .layout import SharedPrefixLayout

BLOCK = 128  # FlexAttention's own default; its kernels' tiles divide it


def visible_keys(layout: SharedPrefixLayout, window: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """first, shared, shared_end, each (S,) int32: query q sees the keys first..q and shared..shared_end - 1.

    The second run is the prefix of a rejected branch, empty elsewhere. The first never begins before the second ends.
    """
    rows = torch.arange(layout.length, dtype=torch.int32, device=layout.positions.device)
    first = layout.query_ends.index_select(0, 2 * layout.pair_ids + (layout.branches == 2))
    shared = layout.query_ends.index_select(0, 2 * layout.pair_ids)
    shared_end = shared + layout.positions - (rows - first)  # the tokens before it that are not in its own run
    if window is not None:
        first = torch.maximum(first, rows - (window - 1))
        shared = torch.minimum(shared_end, shared + (layout.positions - (window - 1)).clamp_(min=0))
    return first, shared, shared_end


def block_mask(layout: SharedPrefixLayout, window: int | None, block: int = BLOCK):
    """The `BlockMask` of a row: what `create_block_mask` returns, without its S x S mask. window: see attention.py."""
    from torch.nn.attention.flex_attention import BlockMask

    first, shared, shared_end = visible_keys(layout, window)

    def sees(_batch, _head, q, k):
        # Only tensors are captured, so all windows share a compiled kernel; what depends on q alone is loaded once
        return ((k >= first[q]) & (k <= q)) | ((k >= shared[q]) & (k < shared_end[q]))

    partial, full = meeting_blocks(first, shared, shared_end, block)
    return BlockMask.from_kv_blocks(
        *_ordered(partial), *_ordered(full), BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(layout.length,) * 2
    )


def meeting_blocks(first: Tensor, shared: Tensor, shared_end: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """partial, full: (blocks, blocks) bool, where some entries of a block are visible, and where all are."""
    S = len(first)
    rows = torch.arange(S, dtype=torch.int32, device=first.device)
    blocks = -(-S // block)
    line = rows // block * (blocks + 1)

    def count(*runs: tuple[Tensor, Tensor]) -> Tensor:
        """(query blocks, key blocks) int32: over the queries, how many of their runs of key blocks hold a block."""
        marks = torch.zeros(blocks * (blocks + 1), dtype=torch.int32, device=first.device)
        one = torch.ones_like(rows)
        for begin, end in runs:
            marks.index_add_(0, line + begin, one)
            marks.index_add_(0, line + torch.maximum(begin, end), one, alpha=-1)
        return marks.view(blocks, blocks + 1).cumsum(1, dtype=torch.int32)[:, :blocks]

    def up(x: Tensor) -> Tensor:
        return (x + (block - 1)) // block

    touched_end = torch.where(shared < shared_end, up(shared_end), 0)
    touched = count((first // block, rows // block + 1), (shared // block, touched_end)) > 0
    # Runs that meet are one: a block may be full by both
    one_run = (shared < shared_end) & (shared_end == first)
    begin = torch.where(one_run, shared, first)
    end = torch.where(one_run, 0, shared_end)
    full = count((up(begin), (rows + 1) // block), (up(shared), end // block)) == block
    return touched & ~full, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(1, 1, query blocks) int32: how many; (1, 1, query blocks, key blocks) int32: which, and then the others."""
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(1, dtype=torch.int32)[None, None], order[None, None]
