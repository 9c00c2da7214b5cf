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
    ignored token costs nothing; elsewhere its row is computed from zeros (`Factors.rows`)."""
    if not free_to_look(scored) or scored.all():
        return None
    return scored.nonzero().squeeze(1)


def usable_labels(labels: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels that are safe to use as addresses, and where they were ignored or out of range."""
    ignored = labels == ignore_index
    invalid = ~ignored & ((labels < 0) | (labels >= vocab))
    return labels.long().clamp(0, vocab - 1).contiguous(), ignored, invalid


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
        may hold anything, and 0 times infinity is NaN, in its own gradient and in all of the weight's."""
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
    """n tokens by `columns` vocabulary entries of one call.

    It owns what is usable of labels and factors, for the tokens that it was given last (`take`, `fold`). Either `fold`
    scores these, then gradients may be asked for; or the softmax is known, and `open` gives D of some columns.

    An implementation scores (`_score`), opens, and has the two products.
    """

    ignored: Tensor | None  # (n,) bool of the tokens taken last; None where none is to be looked for
    invalid: Tensor | None  # likewise
    d_buffer: Tensor | None

    def __init__(self, call: Call, head: Head, rows: int, columns: int):
        self.call, self.factors, self.vocab = call, Factors(head, call.dtype), head.weight.shape[0]
        self.on_host = free_to_look(head.hidden)
        # What GEMMs take D as
        self.operand = gemm_operand(head.hidden.new_empty(0, dtype=self.factors.dtypes[0])).dtype
        self.sizes, self.d_buffer = (rows, columns), None
        self._allocate(rows, columns)

    def take(self, index: "Tensor | slice", labels: Tensor) -> Tensor:
        """The tokens at `index` are the tile's; labels: (N,) of all. Returns theirs, (n,) int64 in [0, V)."""
        label, self.ignored, self.invalid = labels[index].long().contiguous(), None, None
        if not self.on_host:  # where `scored_rows` and `check_labels` have left neither
            label, self.ignored, self.invalid = usable_labels(label, self.call.ignore_index, self.vocab)
        self.chunk = self.factors.rows(index, self.ignored)
        return label

    def fold(self, index: "Tensor | slice", labels: Tensor, gradient: bool = True) -> dict[str, Tensor]:
        """Score the tokens at `index`: name -> (n,) fp32, the log-probs, row_max, log_sum and the call's statistics; 0
        where a label is ignored, NaN log-probs where one is out of range. labels: (N,) of all tokens. gradient:
        whether `d_left` or `add_d_right` will be called."""
        out = self._score(self.take(index, labels), gradient)
        if self.ignored is not None and self.invalid is not None:
            for name in ("logps", "row_max"):  # the latter makes gradients NaN, too
                out[name].masked_fill_(self.invalid, torch.nan)
            for name in ("logps", *self.call.outputs):
                out[name].masked_fill_(self.ignored, 0)
        return out

    def scored(self, coefficient: Tensor) -> Tensor:
        """(n,) -> (n, 1), 0 where the token is ignored and NaN where its label is out of range."""
        if self.ignored is not None and self.invalid is not None:
            coefficient = coefficient.masked_fill(self.ignored, 0).masked_fill_(self.invalid, torch.nan)
        return coefficient.unsqueeze(1)

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
    def _score(self, label: Tensor, gradient: bool) -> dict[str, Tensor]:
        """`fold` of `self.chunk`, the factors of n tokens; label: (n,) int64 in [0, V)."""

    @abstractmethod
    def d_left(self, k: int, coefficient: Tensor) -> Tensor:
        """(n, K) fp32 gradient of factor k's left side, for coefficients (n, 1). Once a factor and `fold`."""

    @abstractmethod
    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor) -> None:
        """total (V, K) fp32 += the gradient of a factor's right side whose left is (n, K)."""

    @abstractmethod
    def open(self, part: slice, label: Tensor, known: Known, coefficient: Tensor) -> Tensor:
        """diag(c) D of the columns `part`, (n, width) in `operand`, of the tokens taken last. label: as `take` returned
        it; known: theirs; coefficient: (n, 1)."""


class EagerTile(Tile):
    """A tile on the eager path, stored column by column on CPU.

    `fold` leaves exp(z - max) k in the tile, unnormalised: 1 / sum and the coefficient c become factors of rows of the
    thin operands, and the one-hot term an exact row of `right`. One pass writes the tile, and c needs no further one.

    With fewer columns than the vocabulary has, a tile passes over it slice by slice and the softmax is online: sums so
    far are rescaled when the maximum grows. exp(z - max) k right is then summed on the way (`d_left`); what needs the
    whole of D at once (`add_d_right`) needs a tile with all columns.
    """

    sums: list[Tensor] | None  # exp(z - max) k right of each factor, where it is summed on the way

    def _allocate(self, rows: int, columns: int) -> None:
        like = self.factors.lefts[0].new_empty(0, dtype=self.factors.wide)
        self.buffer = logits_buffer(rows, columns, like, self.on_host)

    def _fill(self, n: int, part: slice) -> Tensor:
        return self._logits(logits_view(self.buffer, n, part.stop - part.start, self.on_host), part)

    def _score(self, label: Tensor, gradient: bool) -> dict[str, Tensor]:
        transform, n, (_, columns) = self.call.transform, label.numel(), self.sizes
        self.label, self.sums = label.unsqueeze(1), None
        partial = Partial(self.call.outputs)
        for start in range(0, self.vocab, columns):
            part = slice(start, min(start + columns, self.vocab))
            self.tile = self._fill(n, part)
            factor = partial.fold_(self.tile, self.label, start, transform, gradient)
            if gradient and columns < self.vocab:
                self._sum_directions(part, factor)
        self.sum_exp = partial.sums["exp"].masked_fill(partial.sums["exp"] == 0, 1).to(self.tile.dtype)
        self.target_slope = None if transform.softcap is None else transform.bend_slope(partial.target)
        return partial.results(self.vocab, transform)

    def _sum_directions(self, part: slice, factor: Tensor | None) -> None:
        if self.sums is None:
            self.sums = [self.tile.new_empty((len(self.tile), right.shape[1])) for _, right in self.chunk]
        for total, (_, right) in zip(self.sums, self.chunk, strict=True):
            if factor is not None:
                total.mul_(factor.to(total.dtype))
            times_right(self.tile, right[part], total, accumulate=factor is not None)

    def d_left(self, k: int, coefficient: Tensor) -> Tensor:
        right = self.chunk[k][1]
        if self.sums is None:
            d = times_right(self.tile, right, self.tile.new_empty((self.tile.shape[0], right.shape[1])))
        else:
            d = self.sums[k]
        target = right[self.label.squeeze(1)].to(d.dtype)
        if self.target_slope is not None:
            target.mul_(self.target_slope)
        return d.div_(-self.sum_exp).add_(target).mul_(coefficient * self.call.transform.slope)

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor) -> None:
        left, coefficient = left.to(self.tile.dtype), coefficient * self.call.transform.slope
        mm_into(total, self.tile.T, left * (coefficient / -self.sum_exp), accumulate=True)
        if self.target_slope is not None:
            coefficient = coefficient * self.target_slope
        total.index_add_(0, self.label.squeeze(1), left * coefficient)

    def open(self, part: slice, label: Tensor, known: Known, coefficient: Tensor) -> Tensor:
        tile, label = self._fill(len(label), part), (label - part.start).unsqueeze(1)
        row_max, log_sum = (x.unsqueeze(1) for x in known)
        d_columns_(tile, label, row_max, log_sum, coefficient, self.call.transform)
        return tile if tile.dtype == self.operand else self._d_view(*tile.shape).copy_(tile)
