"""The output head as a sum of factors, and what one tile of logits yields.

    logits = sum_f left_f right_f^T + bias        (hidden, weight), and (hidden A^T, B) for a LoRA update of the head

With D_iv = k_iv ([v = y_i] - p_iv), k the derivative of the logit's transform, and c_i the coefficient of token i:

    d left_f = diag(c) D right_f                  d right_f = D^T diag(c) left_f
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from .call import Call, Head
from .dispatch import free_to_look
from .gemm import blocks_of_columns, column_of, logits_buffer, logits_into, logits_view, mm_into, times_right
from .plan import CPU_COLUMNS


def scored_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the tokens that are scored, None for all. On CPU, where counting them costs no sync, an ignored token
    costs nothing; elsewhere its row is computed from zeros (`Factors.rows`)."""
    if not free_to_look(labels) or not (labels == ignore_index).any():
        return None
    return (labels != ignore_index).nonzero().squeeze(1)


def usable_labels(labels: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Labels that are safe to use as addresses, and where they were ignored or out of range: None on CPU, where
    `scored_rows` and `check_labels` have left neither."""
    if free_to_look(labels):
        return labels.long().contiguous(), None, None
    return mask_labels(labels, ignore_index, vocab)


def mask_labels(labels: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
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


class Tile(ABC):
    """n tokens by `columns` vocabulary entries of one call: `fold` scores them, then gradients may be asked for.

    It owns what is usable of labels and factors. An implementation scores (`_score`) and has the two products; another
    device is another one of these, named in `make_tile`.
    """

    def __init__(self, call: Call, head: Head, rows: int, columns: int):
        self.call, self.factors, self.vocab = call, Factors(head, call.gemm_dtype), head.weight.shape[0]
        self._allocate(rows, columns)

    def fold(self, index: "Tensor | slice", labels: Tensor, gradient: bool = True) -> dict[str, Tensor]:
        """Score the tokens at `index`: name -> (n,) fp32, the log-probs, row_max, log_sum and the call's statistics; 0
        where a label is ignored, NaN log-probs where one is out of range. labels: (N,) of all tokens. gradient:
        whether `d_left` or `add_d_right` will be called."""
        label, self.ignored, self.invalid = usable_labels(labels[index], self.call.ignore_index, self.vocab)
        self.chunk = self.factors.rows(index, self.ignored)
        out = self._score(label, gradient)
        if self.ignored is not None:
            for name in ("logps", "row_max"):  # the latter makes gradients NaN, too
                out[name].masked_fill_(self.invalid, torch.nan)
            for name in ("logps", *self.call.outputs):
                out[name].masked_fill_(self.ignored, 0)
        return out

    def scored(self, coefficient: Tensor) -> Tensor:
        """(n,) -> (n, 1), 0 where the token is ignored and NaN where its label is out of range."""
        if self.ignored is not None:
            coefficient = coefficient.masked_fill(self.ignored, 0).masked_fill_(self.invalid, torch.nan)
        return coefficient.unsqueeze(1)

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


def _sum_columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1) sums over columns: a slice's in x's dtype, these in `dtype`, whether slices come singly or together."""
    return torch.cat([part.sum(1, keepdim=True) for part in x.split(CPU_COLUMNS, 1)], 1).sum(1, True, dtype=dtype)


class EagerTile(Tile):
    """A tile on the eager path, stored column by column on CPU.

    `fold` leaves exp(z - max) k in the tile, unnormalised: 1 / sum and the coefficient c become factors of rows of the
    thin operands, and the one-hot term an exact row of `right`. One pass writes the tile, none is owed to c.

    With fewer columns than the vocabulary has, a tile passes over it slice by slice and the softmax is online: sums so
    far are rescaled when the maximum grows. exp(z - max) k right is then summed on the way (`d_left`); what needs the
    whole of D at once (`add_d_right`) needs a tile with all columns.
    """

    def _allocate(self, rows: int, columns: int) -> None:
        like = self.factors.lefts[0]
        self.columns = columns
        self.buffer = logits_buffer(rows, columns, like.new_empty(0, dtype=self.factors.wide))

    def _score(self, label: Tensor, gradient: bool) -> dict[str, Tensor]:
        self.transform, self.label, self.gradient = self.call.transform, label.unsqueeze(1), gradient
        n, vocab, bias = label.numel(), self.vocab, self.factors.bias

        # Sums over slices in fp64, where there is one: which slices there are then changes hardly a bit
        dtype, device = self.buffer.dtype, self.buffer.device
        wide = dtype if device.type == "mps" else torch.float64
        # Not -inf: a row of all -inf then sums to 0, not NaN
        self.row_max = torch.full((n, 1), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.target = torch.zeros_like(self.row_max)
        self.sum_exp = torch.zeros_like(self.row_max, dtype=wide)
        self.running = {name: torch.zeros_like(self.sum_exp) for name in self.call.outputs}
        self.sums = None
        for start in range(0, vocab, self.columns):
            part = slice(start, min(start + self.columns, vocab))
            rights = [(left, right[part]) for left, right in self.chunk]
            tile = logits_view(self.buffer, n, part.stop - part.start)
            z = logits_into(tile, rights, None if bias is None else bias[part])
            rescale = self._fold_slice(z, part)
            if gradient and self.columns < vocab:
                self._sum_directions(z, rights, rescale)
        self.tile = z
        return self._results(vocab)

    def _fold_slice(self, z: Tensor, part: slice) -> Tensor:
        """Turn raw logits (n, width) into exp(z - max) k; returns what sums over earlier slices are to be scaled by."""
        t, running, wide = self.transform, self.running, self.sum_exp.dtype
        copied = t.softcap is not None or "entropy" in running or "log_sum_sq_probs" in running
        t.bend_(z)
        here, inside = column_of(self.label - part.start, z.shape[1])
        self.target = torch.where(inside, z.gather(1, here), self.target)
        top = t.stretch_(z.amax(1, keepdim=True))
        if "is_top1" in running:
            better = (top > self.row_max) | (part.start == 0)
            hit = inside & (z.argmax(1, keepdim=True) == here)
            running["is_top1"] = torch.where(better, hit.to(wide), running["is_top1"])
        row_max = torch.maximum(self.row_max, top)
        shift = (self.row_max.to(wide) - row_max).clamp_(min=-1e4)  # its exp is 0 already, and 0 times it is not NaN
        rescale = shift.exp()
        if "entropy" in running:  # sum of exp(z - max) (z - max)
            running["entropy"].add_(self.sum_exp * shift).mul_(rescale)
        if "log_sum_sq_probs" in running:
            running["log_sum_sq_probs"] *= rescale.square()
        self.row_max, self.sum_exp = row_max, self.sum_exp * rescale
        for _, block in blocks_of_columns(z, copied):
            slope = None if t.softcap is None or not self.gradient else t.bend_slope(block)
            t.stretch_(block)
            if "mean_logits" in running:
                running["mean_logits"] += block.sum(1, keepdim=True)
            block.sub_(row_max)
            shifted = block.clone() if "entropy" in running else None
            self.sum_exp += _sum_columns(block.exp_(), wide)
            if shifted is not None:
                running["entropy"] += torch.where(block > 0, shifted.mul_(block), 0).sum(1, keepdim=True)
            if "log_sum_sq_probs" in running:
                running["log_sum_sq_probs"] += block.square().sum(1, keepdim=True)
            if slope is not None:
                block.mul_(slope)
        return rescale

    def _sum_directions(self, z: Tensor, rights, rescale: Tensor) -> None:
        first = self.sums is None
        if first:
            self.sums = [z.new_empty((z.shape[0], right.shape[1])) for _, right in rights]
        for total, (_, right) in zip(self.sums, rights, strict=True):
            if not first:
                total.mul_(rescale.to(total.dtype))
            times_right(z, right, total, accumulate=not first)

    def _results(self, vocab: int) -> dict:
        sum_exp, log_sum = self.sum_exp, self.sum_exp.log()
        self.target_slope = None if self.transform.softcap is None else self.transform.bend_slope(self.target)
        target = self.transform.stretch_(self.target)
        logps = torch.where(sum_exp == 0, -torch.inf, target - self.row_max - log_sum)
        out = {"logps": logps, "row_max": self.row_max, "log_sum": log_sum, **self.running}
        if "mean_logits" in out:
            out["mean_logits"] = out["mean_logits"] / vocab
        if "entropy" in out:
            out["entropy"] = log_sum - out["entropy"] / sum_exp
        if "log_sum_sq_probs" in out:
            out["log_sum_sq_probs"] = out["log_sum_sq_probs"].log() - 2 * log_sum
        self.sum_exp = sum_exp.masked_fill(sum_exp == 0, 1).to(self.tile.dtype)
        return {name: value.squeeze(1).to(self.tile.dtype) for name, value in out.items()}

    def d_left(self, k: int, coefficient: Tensor) -> Tensor:
        right = self.chunk[k][1]
        if self.sums is None:
            d = times_right(self.tile, right, self.tile.new_empty((self.tile.shape[0], right.shape[1])))
        else:
            d = self.sums[k]
        target = right[self.label.squeeze(1)].to(d.dtype)
        if self.target_slope is not None:
            target.mul_(self.target_slope)
        return d.div_(-self.sum_exp).add_(target).mul_(coefficient * self.transform.slope)

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor) -> None:
        left, coefficient = left.to(self.tile.dtype), coefficient * self.transform.slope
        mm_into(total, self.tile.T, left * (coefficient / -self.sum_exp), accumulate=True)
        if self.target_slope is not None:
            coefficient = coefficient * self.target_slope
        total.index_add_(0, self.label.squeeze(1), left * coefficient)


def make_tile(call: Call, head: Head, rows: int, columns: int) -> Tile:
    """The implementation's tile."""
    if call.impl == "triton":
        from .tile_triton import TritonTile

        return TritonTile(call, head, rows, columns)
    return EagerTile(call, head, rows, columns)
