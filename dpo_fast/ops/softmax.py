"""The eager softmax of rows whose columns come some at a time: partial sums, and D where the softmax is known.

What folding in more columns and combining with other partial sums share is `rescale`: sums move to a larger maximum.

D, the derivative of a token's log-prob by its logits, has two forms. `Partial.fold_` leaves exp(z - max) k in the place
of the logits: 1 / sum and the coefficients go to the thin operands of GEMMs. Where the softmax is known beforehand,
`d_columns_` writes diag(c) D itself.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .call import Transform
from .dispatch import free_to_look
from .plan import CPU_COLUMNS

_COPY_BYTES = 4 << 20  # of a tile copied at a time, by the passes that need a copy of what they overwrite


class Partial:
    """The softmax of n rows after some of their columns. All are (n, 1); sums are relative to `row_max`.

    outputs: which statistics; like: a tensor with the dtype and device of the logits. whole: rows come in one piece,
    and are summed in that dtype; else sums of slices are added in fp64 (but on MPS, which has none): which slices there
    are then changes hardly a bit.
    """

    def __init__(self, n: int, outputs: Iterable[str], like: Tensor, whole: bool = False):
        # Not -inf: a row of all -inf then sums to 0, not NaN
        self.row_max = like.new_full((n, 1), torch.finfo(like.dtype).min)
        self.target = like.new_zeros((n, 1))  # the label's logit, as far as `Transform.bend_` goes
        self.whole, self.empty = whole, True
        wide = like.dtype if whole or like.device.type == "mps" else torch.float64
        self.sum_exp = like.new_zeros((n, 1), dtype=wide)
        self.stats = {name: torch.zeros_like(self.sum_exp) for name in outputs}

    def rescale(self, row_max: Tensor) -> Tensor:
        """Make the sums relative to `row_max`, no smaller than now: (n, 1), what they were multiplied by."""
        shift = (self.row_max.to(self.sum_exp.dtype) - row_max).clamp_(min=-1e4)  # exp(-inf) is 0, but 0 x -inf NaN
        factor = shift.exp()
        if "entropy" in self.stats:  # sum of exp(z - max) (z - max)
            self.stats["entropy"].add_(self.sum_exp * shift).mul_(factor)
        if "log_sum_sq_probs" in self.stats:  # sum of exp(z - max)^2
            self.stats["log_sum_sq_probs"].mul_(factor.square())
        self.row_max, self.sum_exp = row_max, self.sum_exp * factor
        return factor

    def fold_(self, x: Tensor, label: Tensor, first: int, transform: Transform, gradient: bool = False) -> Tensor:
        """Fold in raw logits x (n, width), the columns from `first` on, and leave exp(z - max) in their place; times
        k = dz/dx / slope where a `gradient` is to follow. Returns what earlier sums were multiplied by, (n, 1)."""
        stats = self.stats
        copied = transform.softcap is not None or "entropy" in stats or "log_sum_sq_probs" in stats
        transform.bend_(x)
        here, inside = column_of(label - first, x.shape[1])
        self.target = torch.where(inside, x.gather(1, here), self.target)
        top = transform.stretch_(x.amax(1, keepdim=True))
        if "is_top1" in stats:
            hit = inside & (x.argmax(1, keepdim=True) == here)
            better = (top > self.row_max) | self.empty
            stats["is_top1"] = torch.where(better, hit.to(self.sum_exp.dtype), stats["is_top1"])
        row_max = torch.maximum(self.row_max, top)
        factor = self.rescale(row_max)
        self.empty = False
        for block in blocks_of_columns(x, copied):
            k = None if transform.softcap is None or not gradient else transform.bend_slope(block)
            z = transform.stretch_(block)
            if "mean_logits" in stats:
                stats["mean_logits"] += z.sum(1, keepdim=True)
            z.sub_(row_max)
            shifted = z.clone() if "entropy" in stats else None
            self.sum_exp += self._sum(z.exp_())
            if shifted is not None:
                stats["entropy"] += torch.where(z > 0, shifted.mul_(z), 0).sum(1, keepdim=True)
            if "log_sum_sq_probs" in stats:
                stats["log_sum_sq_probs"] += z.square().sum(1, keepdim=True)
            if k is not None:
                z.mul_(k)
        return factor

    def _sum(self, x: Tensor) -> Tensor:
        """(n, 1): of `CPU_COLUMNS` columns in x's dtype, of these sums in a wider one, however wide x is."""
        if self.whole:
            return x.sum(1, keepdim=True)
        sums = [part.sum(1, keepdim=True) for part in x.split(CPU_COLUMNS, 1)]
        return torch.cat(sums, 1).sum(1, keepdim=True, dtype=self.sum_exp.dtype)

    def combine(self, other: "Partial") -> None:
        """Add what is known of further columns of the same rows, of which none was folded in here. A label's column is
        in one of the two; the other's `target` is 0."""
        row_max = torch.maximum(self.row_max, other.row_max)
        if "is_top1" in self.stats:  # of equal logits the first is the largest
            theirs, ours = other.stats["is_top1"], self.stats["is_top1"]
            self.stats["is_top1"] = torch.where(other.row_max > self.row_max, theirs, ours)
        self.rescale(row_max)
        other.rescale(row_max)
        self.target = self.target + other.target
        self.sum_exp += other.sum_exp
        for name in self.stats.keys() - {"is_top1"}:
            self.stats[name] += other.stats[name]

    @classmethod
    def of_rows(cls, parts: "list[Partial]") -> "Partial":
        """One of more rows, one after another."""
        if len(parts) == 1:
            return parts[0]
        rows = parts[0]
        rows.row_max, rows.target, rows.sum_exp = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("row_max", "target", "sum_exp")
        )
        rows.stats = {name: torch.cat([part.stats[name] for part in parts]) for name in rows.stats}
        return rows

    def results(self, vocab: int, transform: Transform) -> dict[str, Tensor]:
        """Name -> (n,): logps, row_max, log_sum and the statistics, once all `vocab` columns are in."""
        sum_exp, log_sum, stats = self.sum_exp, self.sum_exp.log(), dict(self.stats)
        target = transform.stretch_(self.target.clone())
        logps = torch.where(sum_exp == 0, -torch.inf, target - self.row_max - log_sum)
        if "mean_logits" in stats:
            stats["mean_logits"] = stats["mean_logits"] / vocab
        if "entropy" in stats:
            stats["entropy"] = log_sum - stats["entropy"] / sum_exp
        if "log_sum_sq_probs" in stats:
            stats["log_sum_sq_probs"] = stats["log_sum_sq_probs"].log() - 2 * log_sum
        found = {"logps": logps, "row_max": self.row_max, "log_sum": log_sum, **stats}
        return {name: value.squeeze(1).to(target.dtype) for name, value in found.items()}


def d_columns_(x: Tensor, label: Tensor, row_max: Tensor, log_sum: Tensor, c: Tensor, transform: Transform) -> Tensor:
    """Raw logits x (n, width) -> diag(c) D in their place; label counts from the first column, and may lie outside. All
    but x are (n, 1)."""
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0)  # a row of all -inf: p = 0
    scale, start = c * -transform.slope, 0
    for block in blocks_of_columns(x, copied=transform.softcap is not None):
        transform.bend_(block)
        bent = None if transform.softcap is None else block.clone()
        z = transform.stretch_(block)
        z.sub_(row_max).sub_(log_sum).exp_()
        here, inside = column_of(label - start, z.shape[1])
        z.scatter_add_(1, here, -inside.to(z.dtype))
        z.mul_(scale)
        if bent is not None:
            z.addcmul_(z, bent.square_(), value=-1)
        start += z.shape[1]
    return x


def blocks_of_columns(x: Tensor, copied: bool) -> Iterator[Tensor]:
    """The columns of x: all at once, or a few at a time where passes make copies of them."""
    if not copied:
        yield x
        return
    limit = _COPY_BYTES if free_to_look(x) else 8 * _COPY_BYTES
    yield from x.split(max(1, limit // max(1, x.shape[0] * x.element_size())), 1)


def column_of(column: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`column` as an address among `width` columns, and whether it is one of them."""
    return column.clamp(0, width - 1), (column >= 0) & (column < width)
