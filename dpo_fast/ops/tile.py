"""The output head as a sum of factors, and what one tile of logits yields.

    logits = sum_f left_f right_f^T + bias        (hidden, weight), and (hidden A^T, B) for a LoRA update of the head

With D_iv = k_iv ([v = y_i] - p_iv), k the derivative of the logit's transform, and c_i the coefficient of token i:

    d left_f = diag(c) D right_f                  d right_f = D^T diag(c) left_f
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call, Head
from .dispatch import free_to_look
from .gemm import aligned, gemm_operand, logits_buffer, logits_into, logits_view, mm_into, times_right
from .softmax import Partial, d_columns_


def scored_rows(scored: Tensor) -> Tensor | None:
    """Indices of the tokens that are `scored`, (N,) bool; None for all. On CPU, where counting them costs no sync, an
    ignored token costs nothing; elsewhere its row is computed, and is 0."""
    if not free_to_look(scored) or scored.all():
        return None
    return scored.nonzero().squeeze(1)


class Factors:
    """The head's factors in the dtypes of their GEMMs: (hidden, weight), and (down, up) for a low-rank update."""

    def __init__(self, head: Head, dtype: torch.dtype):
        hidden, weight, self.bias, down, up = head
        self.lefts = [hidden] if down is None else [hidden, down]
        self.dtypes = [dtype] if down is None else [dtype, _low_rank_dtype(hidden, down, up, dtype)]
        # One conversion of the whole head on an accelerator, as autocast itself does; on CPU 16-bit weights are
        # converted slice by slice (gemm.py), never as a whole.
        rights = [weight] if up is None else [weight, up]
        self.rights = [right.to(dtype) for right, dtype in zip(rights, self.dtypes, strict=True)]
        self.wide = torch.promote_types(dtype, torch.float32)  # of logits

    def rows(self, index, ignored: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """The factors of some tokens, a slice or an index tensor; zeros where a token is `ignored`: its hidden state
        may hold anything, and 0 times infinity is NaN in all of the weight's gradient."""
        lefts = [left[index].to(dtype) for left, dtype in zip(self.lefts, self.dtypes, strict=True)]
        if ignored is not None:
            lefts = [left.masked_fill(ignored.unsqueeze(1), 0) for left in lefts]
        return list(zip(lefts, self.rights, strict=True))


def _low_rank_dtype(hidden, down, up, dtype: torch.dtype) -> torch.dtype:
    """That of the product down up^T: autocast's where that was asked for, else the wider one of its factors, as PEFT
    keeps an adapter in fp32 on a 16-bit head. It has few columns, so fp32 costs little; it ends in fp32 anyway."""
    if dtype != hidden.dtype:
        return dtype
    wide = torch.promote_types(torch.promote_types(down.dtype, up.dtype), dtype)
    return torch.float32 if wide == torch.float64 and dtype != torch.float64 else wide


class Known(NamedTuple):
    """The softmax of all tokens, from an earlier pass."""

    row_max: Tensor  # (N,)
    log_sum: Tensor  # (N,)


class Tile(ABC):
    """n tokens by `columns` vocabulary entries of one call, whose labels are (N,).

    It owns the labels and factors of the tokens that it was given last (`take`, `fold`). Either `fold` scores these,
    then gradients may be asked for; or the softmax is known, and `open` gives D of some columns.

    An implementation scores (`_score`), opens, and has the two products.
    """

    label: Tensor  # (n,) of the tokens taken last
    chunk: list[tuple[Tensor, Tensor]]  # their factors
    d_buffer: Tensor | None

    def __init__(self, call: Call, head: Head, labels: Tensor, rows: int, columns: int):
        self.call, self.factors, self.vocab = call, Factors(head, call.dtype), head.weight.shape[0]
        self.on_host = free_to_look(head.hidden)
        # (N,) bool; on the host `scored_rows` has left none
        self.ignored = None if self.on_host else labels == call.ignore_index
        self.labels = labels.contiguous()
        # What GEMMs take D as
        self.operand = gemm_operand(head.hidden.new_empty(0, dtype=self.factors.dtypes[0])).dtype
        self.sizes, self.d_buffer = (rows, columns), None
        self._allocate(rows, columns)

    def take(self, index: "Tensor | slice", gradient: bool = True) -> None:
        """The tokens at `index` are the tile's. gradient: as for `fold`."""
        self.index, self.label = index, self.labels[index]
        ignored = self.ignored if self._clears_rows(gradient) else None
        self.chunk = self.factors.rows(index, None if ignored is None else ignored[index])

    def fold(self, index: "Tensor | slice", out: dict[str, Tensor], gradient: bool = True) -> None:
        """Score the tokens at `index` and fill the tensors of `out`, name -> (n,) fp32: the log-probs, row_max, log_sum
        and the call's statistics; 0 where a label is ignored, NaN log-probs where one is out of range. gradient:
        whether `put_d_left` or `add_d_right` will be called."""
        self.take(index, gradient)
        self._score(out, gradient)

    def put_d_left(self, k: int, coefficient: Tensor, total: Tensor) -> None:
        """total (N, K), at the tokens folded last: the gradient of factor k's left side, for coefficients (n, 1). Once
        a factor and `fold`."""
        if isinstance(self.index, slice) and not self.on_host:  # on a CPU, a GEMM's bits may depend on where it writes
            self._d_left(k, coefficient, total[self.index])
        else:
            total[self.index] = self._d_left(k, coefficient)

    def _logits(self, tile: Tensor, part: slice) -> Tensor:
        """Fill the tile with the raw logits of the columns `part`."""
        bias = self.factors.bias
        return logits_into(
            tile, [(left, right[part]) for left, right in self.chunk], None if bias is None else bias[part]
        )

    def _d_view(self, n: int, columns: int) -> Tensor:
        """Memory for D where GEMMs do not take it in the tile's dtype; made by the first gradient."""
        if self.d_buffer is None:
            self.d_buffer = aligned(*self.sizes, self.operand, self.factors.lefts[0].device)
        return self.d_buffer[:n, :columns]

    @abstractmethod
    def _allocate(self, rows: int, columns: int) -> None:
        """Memory for the largest tile."""

    @abstractmethod
    def _clears_rows(self, gradient: bool) -> bool:
        """Whether left rows of ignored tokens are to be zeros. gradient: as for `fold`."""

    @abstractmethod
    def _score(self, out: dict[str, Tensor], gradient: bool) -> None:
        """`fold` of the tokens taken."""

    @abstractmethod
    def scored(self, coefficient: Tensor) -> Tensor:
        """(n,) -> (n, 1) coefficients of the tokens taken, as `_d_left`, `add_d_right` and `open` take them."""

    @abstractmethod
    def _d_left(self, k: int, coefficient: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, K) fp32 gradient of factor k's left side, in `out` where it is given."""

    @abstractmethod
    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor, accumulate: bool) -> None:
        """total (V, K) fp32 (+)= the gradient of a factor's right side whose left is (n, K)."""

    @abstractmethod
    def open(self, part: slice, known: Known, coefficient: Tensor) -> Tensor:
        """diag(c) D of the columns `part`, (n, width) in `operand`, of the tokens taken last, one slice after the other
        of as many columns as the tile has. known: theirs; coefficient: (n, 1)."""


class EagerTile(Tile):
    """A tile on the eager path, stored column by column on CPU.

    `fold` leaves exp(z - max) k in the tile, unnormalised: 1 / sum and the coefficient c become factors of rows of the
    thin operands, and the one-hot term an exact row of `right`. One pass writes the tile, and c needs no further one.

    With fewer columns than the vocabulary has, a tile passes over it slice by slice and the softmax is online: sums so
    far are rescaled when the maximum grows. exp(z - max) k right is then summed on the way (`d_left`); what needs the
    whole of D at once (`add_d_right`) needs a tile with all columns.
    """

    sums: list[Tensor] | None  # exp(z - max) k right of each factor, where it is summed on the way
    invalid: Tensor | None  # (N,) bool, as `ignored`; None on the host, whose labels are checked

    def _allocate(self, rows: int, columns: int) -> None:
        self.invalid, labels = None, self.labels.long()
        if self.ignored is not None:
            self.invalid = ~self.ignored & ((labels < 0) | (labels >= self.vocab))
            labels = labels.clamp(0, self.vocab - 1)  # usable as addresses
        self.labels = labels
        like = self.factors.lefts[0].new_empty(0, dtype=self.factors.wide)
        self.buffer = logits_buffer(rows, columns, like, self.on_host)

    def _fill(self, n: int, part: slice) -> Tensor:
        return self._logits(logits_view(self.buffer, n, part.stop - part.start, self.on_host), part)

    def _clears_rows(self, gradient: bool) -> bool:
        return True

    def scored(self, coefficient: Tensor) -> Tensor:
        if self.ignored is not None and self.invalid is not None:
            coefficient = coefficient.masked_fill(self.ignored[self.index], 0)
            coefficient.masked_fill_(self.invalid[self.index], torch.nan)
        return coefficient.unsqueeze(1)

    def _score(self, out: dict[str, Tensor], gradient: bool) -> None:
        transform, n, (_, columns) = self.call.transform, len(self.label), self.sizes
        label, self.sums = self.label.unsqueeze(1), None
        partial = Partial(self.call.outputs)
        for start in range(0, self.vocab, columns):
            part = slice(start, min(start + columns, self.vocab))
            self.tile = self._fill(n, part)
            factor = partial.fold_(self.tile, label, start, transform, gradient)
            if gradient and columns < self.vocab:
                self._sum_directions(part, factor)
        self.sum_exp = partial.sums["exp"].masked_fill(partial.sums["exp"] == 0, 1).to(self.tile.dtype)
        self.target_slope = None if transform.softcap is None else transform.bend_slope(partial.target)
        found = partial.results(self.vocab, transform)
        if self.ignored is not None and self.invalid is not None:
            for name in ("logps", "row_max"):  # the latter makes gradients NaN, too
                found[name].masked_fill_(self.invalid[self.index], torch.nan)
            for name in ("logps", *self.call.outputs):
                found[name].masked_fill_(self.ignored[self.index], 0)
        for name, x in out.items():
            x.copy_(found[name])

    def _sum_directions(self, part: slice, factor: Tensor | None) -> None:
        if self.sums is None:
            self.sums = [self.tile.new_empty((len(self.tile), right.shape[1])) for _, right in self.chunk]
        for total, (_, right) in zip(self.sums, self.chunk, strict=True):
            if factor is not None:
                total.mul_(factor.to(total.dtype))
            times_right(self.tile, right[part], total, accumulate=factor is not None)

    def _d_left(self, k: int, coefficient: Tensor, out: Tensor | None = None) -> Tensor:
        right = self.chunk[k][1]
        if self.sums is None:
            out = self.tile.new_empty((len(self.tile), right.shape[1])) if out is None else out
            d = times_right(self.tile, right, out)
        else:
            d = self.sums[k] if out is None else out.copy_(self.sums[k])
        target = right[self.label].to(d.dtype)
        if self.target_slope is not None:
            target.mul_(self.target_slope)
        return d.div_(-self.sum_exp).add_(target).mul_(coefficient * self.call.transform.slope)

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor, accumulate: bool) -> None:
        left, coefficient = left.to(self.tile.dtype), coefficient * self.call.transform.slope
        mm_into(total, self.tile.T, left * (coefficient / -self.sum_exp), accumulate)
        if self.target_slope is not None:
            coefficient = coefficient * self.target_slope
        total.index_add_(0, self.label, left * coefficient)

    def open(self, part: slice, known: Known, coefficient: Tensor) -> Tensor:
        tile, label = self._fill(len(self.label), part), (self.label - part.start).unsqueeze(1)
        row_max, log_sum = (x.unsqueeze(1) for x in known)
        d_columns_(tile, label, row_max, log_sum, coefficient, self.call.transform)
        return tile if tile.dtype == self.operand else self._d_view(*tile.shape).copy_(tile)
