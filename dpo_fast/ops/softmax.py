"""How logits become z; the eager softmax of rows whose columns come some at a time, and D where it is known.

What folding in more columns and combining with other partial sums share is `rescale`: sums move to a larger maximum.

D, the derivative of a token's log-prob by its logits, has two forms. `Partial.fold_` leaves exp(z - max) k in the place
of the logits: 1 / sum and the coefficients go to the thin operands of GEMMs. Where the softmax is known beforehand,
`d_columns_` writes diag(c) D itself.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_transform
from .dispatch import free_to_look

_SUM_COLUMNS = 2048  # that are summed in the dtype of a tile: those of one on a CPU (plan.py)
_COPY_BYTES = 4 << 20  # of a tile copied at a time, by the passes that need a copy of what they overwrite


class Transform(NamedTuple):
    """z = softcap tanh(x scale / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @classmethod
    def make(cls, op: str, softcap: float | None, temperature: float, scale: float = 1.0) -> "Transform":
        """Checked: TypeError for what is no number, ValueError for one out of range."""
        softcap, temperature, scale = check_transform(op, softcap, temperature, scale)
        return cls(scale, softcap, temperature)

    @property
    def slope(self) -> float:
        """dz/dx without the soft-cap's share."""
        return self.scale / self.temperature

    @property
    def oracle(self) -> dict[str, float | None]:
        """As `ops.oracle` takes them."""
        return dict(logit_scale=self.scale, logit_softcap=self.softcap, temperature=self.temperature)

    def bend_(self, x: Tensor) -> Tensor:
        """In place, as far as the soft-cap's tanh, whose square its slope needs; `stretch_` goes on to z."""
        if self.scale != 1.0:
            x.mul_(self.scale)
        return x if self.softcap is None else x.div_(self.softcap).tanh_()

    def stretch_(self, t: Tensor) -> Tensor:
        if self.softcap is not None:
            t.mul_(self.softcap)
        return t if self.temperature == 1.0 else t.div_(self.temperature)

    def bend_slope(self, t: Tensor) -> Tensor:
        return t.square().neg_().add_(1)


class Partial:
    """The softmax of n rows after some of their columns. All are (n, 1); sums are relative to `row_max`.

    outputs: which statistics. whole: rows come in one piece with their labels, and are summed in the logits' dtype.
    Else sums of slices are added in fp64, but on MPS, which has none: which slices there are changes hardly a bit.
    """

    row_max: Tensor  # the first `fold_` makes these
    target: Tensor  # the label's logit, as far as `Transform.bend_` goes; 0 where it was not among the columns
    sums: dict[str, Tensor]  # exp: of exp(z - max); and of the statistics, by name

    def __init__(self, outputs: Iterable[str], whole: bool = False):
        self.outputs, self.whole, self.empty = tuple(outputs), whole, True

    def rescale(self, row_max: Tensor) -> Tensor:
        """Make the sums relative to `row_max`, no smaller than now: (n, 1), what they were multiplied by."""
        sums = self.sums
        shift = (self.row_max.to(sums["exp"].dtype) - row_max).clamp_(min=-1e4)  # exp(-inf) is 0, but 0 x -inf NaN
        factor = shift.exp()
        if "entropy" in sums:  # sum of exp(z - max) (z - max)
            sums["entropy"].add_(sums["exp"] * shift).mul_(factor)
        if "log_sum_sq_probs" in sums:  # sum of exp(z - max)^2
            sums["log_sum_sq_probs"].mul_(factor.square())
        self.row_max = row_max
        sums["exp"] = sums["exp"] * factor
        return factor

    def fold_(
        self, x: Tensor, label: Tensor, first: int, transform: Transform, gradient: bool = False
    ) -> Tensor | None:
        """Fold in raw logits x (n, width), the columns from `first` on, and leave exp(z - max) in their place; times
        k = dz/dx / slope where a `gradient` is to follow. Returns what earlier sums were multiplied by, (n, 1); None
        where there were none."""
        outputs, factor = self.outputs, None
        copied = transform.softcap is not None or "entropy" in outputs or "log_sum_sq_probs" in outputs
        transform.bend_(x)
        column = _Column.of(label, first, x.shape[1], self.whole)
        hit = column.is_label(x.argmax(1, keepdim=True)) if "is_top1" in outputs else None
        target = column.of_label(x, 0.0 if self.empty else self.target)
        top = transform.stretch_(x.amax(1, keepdim=True))
        if self.empty:
            # Not -inf: a row of all -inf then sums to 0, not NaN
            self.row_max, self.sums = top.clamp_(min=torch.finfo(x.dtype).min), {}
        else:
            before = self.row_max
            factor = self.rescale(torch.maximum(before, top))
        if hit is not None:
            hit = self._wide(hit if self.empty else torch.where(top > before, hit, self.sums["is_top1"] != 0), x)
            self.sums["is_top1"] = hit
        self.target, self.empty = target, False
        for block in blocks_of_columns(x, copied):
            k = None if transform.softcap is None or not gradient else transform.bend_slope(block)
            z = transform.stretch_(block)
            if "mean_logits" in outputs:
                self._add("mean_logits", z.sum(1, keepdim=True))
            z.sub_(self.row_max)
            shifted = z.clone() if "entropy" in outputs else None
            self._add("exp", self._sum(z.exp_()))
            if shifted is not None:
                self._add("entropy", torch.where(z > 0, shifted.mul_(z), 0).sum(1, keepdim=True))
            if "log_sum_sq_probs" in outputs:
                self._add("log_sum_sq_probs", z.square().sum(1, keepdim=True))
            if k is not None:
                z.mul_(k)
        return factor

    def _wide(self, x: Tensor, logits: Tensor) -> Tensor:
        """In the dtype of sums."""
        return x.to(logits.dtype if self.whole or x.device.type == "mps" else torch.float64)

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = self._wide(value, value)

    def _sum(self, x: Tensor) -> Tensor:
        """(n, 1): of `_SUM_COLUMNS` columns in x's dtype, of these sums in a wider one, however wide x is."""
        if self.whole:
            return x.sum(1, keepdim=True)
        sums = torch.cat([part.sum(1, keepdim=True) for part in x.split(_SUM_COLUMNS, 1)], 1)
        return sums.sum(1, keepdim=True, dtype=None if x.device.type == "mps" else torch.float64)

    def combine(self, other: "Partial") -> None:
        """Add what is known of further columns of the same rows, of which none was folded in here. Both move to the
        larger maximum."""
        before, theirs = self.row_max, other.row_max
        row_max = torch.maximum(before, theirs)
        self.rescale(row_max)
        other.rescale(row_max)
        self.target = self.target + other.target
        for name, total in other.sums.items():
            if name == "is_top1":  # of equal logits the first is the largest
                self.sums[name] = torch.where(theirs > before, total, self.sums[name])
            else:
                self.sums[name] = self.sums[name] + total

    @classmethod
    def of_rows(cls, parts: "list[Partial]") -> "Partial":
        """One of more rows, one after another."""
        rows = parts[0]
        if len(parts) > 1:
            rows.row_max = torch.cat([part.row_max for part in parts])
            rows.target = torch.cat([part.target for part in parts])
            rows.sums = {name: torch.cat([part.sums[name] for part in parts]) for name in rows.sums}
        return rows

    def results(self, vocab: int, transform: Transform) -> dict[str, Tensor]:
        """Name -> (n,): logps, row_max, log_sum and the statistics, once all `vocab` columns are in."""
        found = dict(self.sums)
        sum_exp = found.pop("exp")
        log_sum = sum_exp.log()
        target = transform.stretch_(self.target.clone())
        if "mean_logits" in found:
            found["mean_logits"] = found["mean_logits"] / vocab
        if "entropy" in found:
            found["entropy"] = log_sum - found["entropy"] / sum_exp
        if "log_sum_sq_probs" in found:
            found["log_sum_sq_probs"] = found["log_sum_sq_probs"].log() - 2 * log_sum
        found["logps"] = torch.where(sum_exp == 0, -torch.inf, target - self.row_max - log_sum)
        found |= {"row_max": self.row_max, "log_sum": log_sum}
        return {name: value.squeeze(1).to(target.dtype) for name, value in found.items()}


def d_columns_(
    x: Tensor, label: Tensor, row_max: Tensor, log_sum: Tensor, c: Tensor, transform: Transform, whole: bool = False
) -> Tensor:
    """Raw logits x (n, width) -> diag(c) D in their place. label counts from the first column, and may lie outside,
    unless rows are `whole`. All but x are (n, 1)."""
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0)  # a row of all -inf: p = 0
    scale, start = c * -transform.slope, 0
    for block in blocks_of_columns(x, copied=transform.softcap is not None):
        transform.bend_(block)
        bent = None if transform.softcap is None else block.clone()
        z = transform.stretch_(block)
        z.sub_(row_max).sub_(log_sum).exp_()
        _Column.of(label, start, z.shape[1], whole and z.shape == x.shape).subtract_(z)
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


class _Column(NamedTuple):
    """Where labels are among some columns."""

    here: Tensor  # (n, 1) int64, an address in any case
    inside: Tensor | None  # (n, 1) bool, whether it is the label's; None: each is

    @classmethod
    def of(cls, label: Tensor, first: int, width: int, whole: bool) -> "_Column":
        """label: (n, 1), counted from where `first` is; whole: all columns are here, each label among them."""
        if whole:
            return cls(label, None)
        column = label - first
        return cls(column.clamp(0, width - 1), (column >= 0) & (column < width))

    def of_label(self, x: Tensor, other: Tensor | float) -> Tensor:
        """(n, 1): x at the labels, `other` where they are not here."""
        found = x.gather(1, self.here)
        return found if self.inside is None else torch.where(self.inside, found, other)

    def is_label(self, column: Tensor) -> Tensor:
        """(n, 1) bool: whether a column, counted from the first of these, is the label's."""
        hit = column == self.here
        return hit if self.inside is None else hit & self.inside

    def subtract_(self, x: Tensor) -> None:
        """x -= 1 at the labels."""
        one = torch.full_like(self.here, -1, dtype=x.dtype) if self.inside is None else -self.inside.to(x.dtype)
        x.scatter_add_(1, self.here, one)
