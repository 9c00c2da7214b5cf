"""The eager path of level 1: rows in blocks that stay in cache, worked on in place.

Beyond its results it holds one scratch block of fp32 logits (`_BLOCK_BYTES`), whatever the number of rows: no fp32 copy
of the logits and no softmax of all of them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Call
from .dispatch import free_to_look

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
    labels = labels.reshape(-1)
    valid = (labels >= 0) & (labels < logits.shape[-1])
    target_ids = torch.where(valid, labels, 0).long().unsqueeze(-1)
    rows, scratch = _scratch(logits)
    for block, where in row_blocks(logits, rows):
        z = scratch[: block.shape[0]].copy_(block)
        call.transform.apply_(z)
        target = z.gather(-1, target_ids[where])
        if "mean_logits" in out:
            out["mean_logits"][where] = z.mean(-1)
        if "is_top1" in out:
            out["is_top1"][where] = (z.argmax(-1, keepdim=True) == target_ids[where]).squeeze(-1).to(scratch.dtype)
        row_max = z.amax(-1, keepdim=True)
        row_max.masked_fill_(row_max == -torch.inf, torch.finfo(z.dtype).min)  # a row of all -inf sums to 0, not NaN
        z.sub_(row_max)
        shifted = z.clone() if "entropy" in out else None
        sum_exp = z.exp_().sum(-1, keepdim=True)
        log_sum = sum_exp.log()
        logp = torch.where(sum_exp == 0, -torch.inf, target.sub_(row_max).sub_(log_sum))
        out["logps"][where] = logp.squeeze(-1)
        out["row_max"][where] = row_max.squeeze(-1)
        out["log_sum"][where] = log_sum.squeeze(-1)
        if shifted is not None:
            expected = torch.where(z > 0, shifted.mul_(z), 0).sum(-1)
            out["entropy"][where] = (log_sum - expected.unsqueeze(-1) / sum_exp).squeeze(-1)
        if "log_sum_sq_probs" in out:
            out["log_sum_sq_probs"][where] = z.square_().sum(-1).log() - 2 * log_sum.squeeze(-1)
    out["logps"].masked_fill_(~valid, torch.nan)
    for value in out.values():
        value.masked_fill_(labels == call.ignore_index, 0)


def token_logps_bwd(
    logits: Tensor, d_logits: Tensor, labels: Tensor, row_max: Tensor, log_sum: Tensor, d_logps: Tensor, call: Call
) -> None:
    """Fill `d_logits`, which may be `logits` itself."""
    labels = labels.reshape(-1)
    ignored, transform = labels == call.ignore_index, call.transform
    valid = (labels >= 0) & (labels < logits.shape[-1])
    coefficient = torch.where(valid, d_logps, torch.nan).masked_fill_(ignored, 0)
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0)  # a row of all -inf: p = 0
    target_ids = torch.where(valid, labels, 0).long().unsqueeze(-1)
    rows, scratch = _scratch(logits)
    for (block, where), (d_block, _) in zip(row_blocks(logits, rows), row_blocks(d_logits, rows), strict=True):
        z = scratch[: block.shape[0]].copy_(block)
        t = transform.apply_(z)
        d = z.sub_(row_max[where, None]).sub_(log_sum[where, None]).exp_()
        d.scatter_add_(-1, target_ids[where], torch.full_like(target_ids[where], -1, dtype=d.dtype))
        d.mul_(-coefficient[where, None])
        if transform.scale != transform.temperature:
            d.mul_(transform.slope)
        if t is not None:
            d.addcmul_(d, t.square_(), value=-1)
        if not free_to_look(d) or ignored[where].any():  # 0 * NaN is NaN: an ignored row may hold anything
            d.masked_fill_(ignored[where, None], 0)
        d_block.copy_(d)
