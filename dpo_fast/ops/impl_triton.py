"""The implementation `triton`: its passes over a tile, between torch's GEMMs; over logits; and sums over sequences.

The kernels are imported where they are launched: TRITON_INTERPRET is read when triton is imported.
"""

import torch
from torch import Tensor

from .call import Call
from .gemm import aligned, fp16_lift, fp16_weighted, mm_into, products, times_right
from .tile import Known
from .tile import Tile as TileBase


def _knobs(call: Call):
    from dpo_fast.kernels.numerics import Knobs

    return Knobs(call.ignore_index, *call.transform)


# Labels of a slice of columns: in none of them, ignored, out of range
_ELSEWHERE, _IGNORED, _INVALID = -1, -2, -3


class Tile(TileBase):
    """One read to score, one read and write for D. The kernels know ignored labels and those out of range.

    D takes the tile's place, and a buffer of its own where GEMMs take 16 bits. c is in it, but in fp16 (gemm.py).
    """

    coefficient: Tensor | None
    d: Tensor | None  # None until a gradient is asked for
    places: Tensor | None  # likewise, until a slice is opened

    def _allocate(self, rows: int, columns: int) -> None:
        self.buffer = aligned(rows, columns, torch.float32, self.factors.lefts[0].device)
        self.knobs, self.places = _knobs(self.call), None
        self.lift = fp16_lift(self.call.transform) if self.operand == torch.float16 else None

    def _clears_rows(self, gradient: bool) -> bool:
        return gradient and self.call.plan not in ("score", "frozen")  # the kernels do not read them, the weight's do

    def _fill(self, n: int, part: slice) -> Tensor:
        return self._logits(self.buffer[:n, : part.stop - part.start], part)

    def _score(self, out: dict[str, Tensor], gradient: bool) -> None:
        from dpo_fast.kernels.token_logps import token_logps_fwd

        tile = self.tile = self._fill(len(self.label), slice(0, self.vocab))
        partition = tile.new_empty((2, len(self.label)))
        out = {"row_max": partition[0], "log_sum": partition[1]} | out
        token_logps_fwd(tile, row_strides(tile), self.label, out, self.knobs)
        self.known = Known(out["row_max"], out["log_sum"])
        self.coefficient = self.d = None

    def scored(self, coefficient: Tensor) -> Tensor:
        if self.lift is not None:  # it does not pass through the kernel
            coefficient = coefficient.masked_fill(self._ignored_here(), 0)
        return coefficient.unsqueeze(1)

    def _direction(self, coefficient: Tensor) -> Tensor:
        """diag(c) D in the operands' dtype, lifted instead in fp16; written on the first call for a tile."""
        if self.d is None:
            self.coefficient = coefficient
            inside = coefficient if self.lift is None else torch.full_like(coefficient, self.lift)
            self.d = self._write_d(self.tile, self.label, self.known, inside, self.knobs)
        elif coefficient is not self.coefficient:
            raise AssertionError("the tile holds D for other coefficients")
        return self.d

    def _write_d(self, tile: Tensor, label: Tensor, known: Known, coefficient: Tensor, knobs, lowest=0) -> Tensor:
        from dpo_fast.kernels.token_logps import token_logps_bwd

        d = tile if tile.dtype == self.operand else self._d_view(*tile.shape)
        c = coefficient.reshape(-1).contiguous()
        token_logps_bwd(tile, d, row_strides(tile), row_strides(d), label, *known, c, knobs, lowest=lowest)
        return d

    def _d_left(self, k: int, coefficient: Tensor, out: Tensor | None = None) -> Tensor:
        right = self.chunk[k][1]
        out = self.tile.new_empty((len(self.tile), right.shape[1])) if out is None else out
        times_right(self._direction(coefficient), right, out)
        return out if self.lift is None else out.mul_(coefficient / self.lift)

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor, accumulate: bool) -> None:
        d = self._direction(coefficient)
        if self.lift is None:
            mm_into(total, d.T, left.to(d.dtype), accumulate)
            return
        weighted, largest = fp16_weighted(left, coefficient)
        for part, product in products(d.T, weighted):
            if accumulate:
                total[part].addcmul_(product, largest / self.lift)
            else:
                torch.mul(product, largest / self.lift, out=total[part])

    def open(self, part: slice, known: Known, coefficient: Tensor) -> Tensor:
        if self.places is None:
            self.places = self._places()
        label, knobs = self.places[part.start // self.sizes[1]], self.knobs._replace(ignore_index=_IGNORED)
        return self._write_d(self._fill(len(label), part), label, known, coefficient, knobs, lowest=_ELSEWHERE)

    def _places(self) -> Tensor:
        """(slices, n) int64: where the labels of the tokens taken are among each slice's columns."""
        width, label = self.sizes[1], self.label
        places = label - torch.arange(0, self.vocab, width, device=label.device).unsqueeze(1)
        places.masked_fill_((places < 0) | (places >= width), _ELSEWHERE)
        places.masked_fill_((label < 0) | (label >= self.vocab), _INVALID)
        return places.masked_fill_(self._ignored_here(), _IGNORED)

    def _ignored_here(self) -> Tensor:
        return self.label == self.call.ignore_index


def token_logps_fwd(logits: Tensor, labels: Tensor, out: dict[str, Tensor], call: Call) -> None:
    """Fill the tensors of `out`, name -> (N,); the statistics that are missing from it are not computed."""
    from dpo_fast.kernels.token_logps import token_logps_fwd

    token_logps_fwd(logits, row_strides(logits), labels.contiguous(), out, _knobs(call))


def token_logps_bwd(
    logits: Tensor, d_logits: Tensor, labels: Tensor, row_max: Tensor, log_sum: Tensor, d_logps: Tensor, call: Call
) -> None:
    """Fill `d_logits`, which may be `logits` itself."""
    from dpo_fast.kernels.token_logps import token_logps_bwd

    rows = outer, inner, *_ = row_strides(logits)
    # The gradient's rows are counted as the logits' are; apart from that it is contiguous, or the logits themselves
    vocab = logits.shape[-1]
    d_rows = rows if d_logits is logits else (outer, inner, inner * vocab, vocab)
    token_logps_bwd(logits, d_logits, rows, d_rows, labels.contiguous(), row_max, log_sum, d_logps, _knobs(call))


def row_strides(x: Tensor) -> tuple[int, int, int, int]:
    """(outer, inner, stride_outer, stride_inner) of the rows of x (..., V), which a kernel walks without a copy."""
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if len(merged) > 2:
        raise ValueError(
            f"logits of shape {tuple(x.shape)} and strides {x.stride()} cannot be walked as two dimensions of rows; "
            "make them contiguous first"
        )
    (outer, stride_outer), (inner, stride_inner) = [(1, 0)] * (2 - len(merged)) + merged
    return outer, inner, stride_outer, stride_inner


def sequence_sums(values: Tensor, ids: Tensor, weights: Tensor | None, num_sequences: int) -> Tensor:
    """(num_sequences,) sums of (weighted) values, in fp64 and a fixed order."""
    from dpo_fast.kernels.sequence_sum import sequence_sum_fwd

    out = values.new_empty((num_sequences,))
    if num_sequences:
        weights = None if weights is None else weights.contiguous()
        sequence_sum_fwd(values.contiguous(), ids.contiguous(), weights, out)
    return out
