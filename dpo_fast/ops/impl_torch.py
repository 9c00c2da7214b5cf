"""The implementation `torch`: a tile, the passes of level 1 over logits, sums over sequences, in eager PyTorch.

Level 1 takes rows in blocks that stay in cache, and works on them in place. Beyond its results it holds one scratch
block of fp32 logits (`_BLOCK_BYTES`), whatever the number of rows: no fp32 copy of the logits, no softmax of all.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Call
from .dispatch import free_to_look
from .softmax import Partial, d_columns_
from .tile import EagerTile as Tile

__all__ = ["Tile", "sequence_sums", "token_logps_bwd", "token_logps_fwd"]

_BLOCK_BYTES = 4 << 20  # one block of fp32 logits; about the size of an L2 cache


def row_blocks(x: Tensor, rows_per_block: int, first: int = 0) -> Iterator[tuple[Tensor, slice]]:
    """Views of `rows_per_block` rows of x (..., V), with where they lie among its flattened rows. Never copies."""
    if x.ndim == 1:
        yield x.unsqueeze(0), slice(first, first + 1)
    elif x.ndim == 2:
        for start in range(0, x.shape[0], rows_per_block):
            block = x[start : start + rows_per_block]
            yield block, slice(first + start, first + start + block.shape[0])
    else:
        inner = x[0].numel() // x.shape[-1] if x.shape[0] else 0
        for index, part in enumerate(x):
            yield from row_blocks(part, rows_per_block, first + index * inner)


def _scratch(logits: Tensor) -> tuple[int, Tensor]:
    vocab = logits.shape[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = max(1, _BLOCK_BYTES // (vocab * dtype.itemsize))
    rows = min(rows, max(1, logits.numel() // vocab))
    return rows, torch.empty((rows, vocab), dtype=dtype, device=logits.device)


def token_logps_fwd(logits: Tensor, labels: Tensor, out: dict[str, Tensor], call: Call) -> None:
    """Fill the tensors of `out`, name -> (N,); the statistics that are missing from it are not computed."""
    labels, vocab = labels.reshape(-1), logits.shape[-1]
    valid = (labels >= 0) & (labels < vocab)
    target_ids = torch.where(valid, labels, 0).long().unsqueeze(-1)
    rows, scratch = _scratch(logits)
    parts = []
    for block, where in row_blocks(logits, rows):
        x = scratch[: block.shape[0]].copy_(block)
        part = Partial(call.outputs, whole=True)
        part.fold_(x, target_ids[where], 0, call.transform)
        parts.append(part)
    for name, value in Partial.of_rows(parts).results(vocab, call.transform).items():
        out[name].copy_(value)
    out["logps"].masked_fill_(~valid, torch.nan)
    for value in out.values():
        value.masked_fill_(labels == call.ignore_index, 0)


def token_logps_bwd(
    logits: Tensor, d_logits: Tensor, labels: Tensor, row_max: Tensor, log_sum: Tensor, d_logps: Tensor, call: Call
) -> None:
    """Fill `d_logits`, which may be `logits` itself."""
    labels = labels.reshape(-1)
    ignored = labels == call.ignore_index
    valid = (labels >= 0) & (labels < logits.shape[-1])
    coefficient = torch.where(valid, d_logps, torch.nan).masked_fill_(ignored, 0)
    columns = [x.unsqueeze(1) for x in (torch.where(valid, labels, 0).long(), row_max, log_sum, coefficient)]
    rows, scratch = _scratch(logits)
    for (block, where), (d_block, _) in zip(row_blocks(logits, rows), row_blocks(d_logits, rows), strict=True):
        d = scratch[: block.shape[0]].copy_(block)
        label, top, total, c = (x[where] for x in columns)
        d_columns_(d, label, top, total, c, call.transform, whole=True)
        if not free_to_look(d) or ignored[where].any():  # 0 * NaN is NaN: an ignored row may hold anything
            d.masked_fill_(ignored[where, None], 0)
        d_block.copy_(d)


def sequence_sums(values: Tensor, ids: Tensor, weights: Tensor | None, num_sequences: int) -> Tensor:
    """(num_sequences,) sums of (weighted) values, in fp64 and a fixed order."""
    if not free_to_look(values):
        return _sum_on_device(values, ids, weights, num_sequences)
    partial = torch.zeros(num_sequences, dtype=torch.float64)
    terms = values.double() if weights is None else values.double() * weights.double()
    return partial.index_add_(0, ids, terms).to(values.dtype)  # on CPU in the order of the tokens


def _sum_on_device(values: Tensor, ids: Tensor, weights: Tensor | None, num_sequences: int) -> Tensor:
    """Elsewhere `index_add_` adds in any order. One row of terms per sequence, (S, N), keeps the order. It waits for no
    count, and holds no running sum, by which an infinite term would reach the sequences after its own."""
    wide = torch.float32 if values.device.type == "mps" else torch.float64  # MPS has no fp64
    terms = values.to(wide) if weights is None else values.to(wide) * weights.to(wide)
    mine = ids == torch.arange(num_sequences, device=ids.device).unsqueeze(1)
    return torch.where(mine, terms, 0).sum(1).to(values.dtype)
