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


_ELSEWHERE = -1  # a label that is in none of a tile's columns


class Tile(TileBase):
    """One read to score, one read and write for D.

    D takes the tile's place, and a buffer of its own where GEMMs take 16 bits. c is in it, but in fp16 (gemm.py).
    """

    coefficient: Tensor | None
    d: Tensor | None  # None until a gradient is asked for

    def _allocate(self, rows: int, columns: int) -> None:
        self.buffer = aligned(rows, columns, torch.float32, self.factors.lefts[0].device)
        self.knobs = _knobs(self.call)._replace(ignore_index=-2)  # no label is: those are usable

    def _fill(self, n: int, part: slice) -> Tensor:
        return self._logits(self.buffer[:n, : part.stop - part.start], part)

    def _score(self, label: Tensor, gradient: bool) -> dict[str, Tensor]:
        from dpo_fast.kernels.token_logps import token_logps_fwd

        self.label = label
        tile = self.tile = self._fill(len(label), slice(0, self.vocab))
        self.out = {name: tile.new_empty(label.numel()) for name in ("logps", "row_max", "log_sum", *self.call.outputs)}
        token_logps_fwd(tile, row_strides(tile), label, self.out, self.knobs)
        self.lift = fp16_lift(self.call.transform) if self.operand == torch.float16 else None
        self.coefficient = self.d = None
        return self.out

    def _direction(self, coefficient: Tensor) -> Tensor:
        """diag(c) D in the operands' dtype, lifted instead in fp16; written on the first call for a tile."""
        if self.d is None:
            self.coefficient = coefficient
            inside = coefficient if self.lift is None else torch.full_like(coefficient, self.lift)
            known = Known(self.out["row_max"], self.out["log_sum"])
            self.d = self._write_d(self.tile, self.label, known, inside)
        elif coefficient is not self.coefficient:
            raise AssertionError("the tile holds D for other coefficients")
        return self.d

    def _write_d(self, tile: Tensor, label: Tensor, known: Known, coefficient: Tensor) -> Tensor:
        from dpo_fast.kernels.token_logps import token_logps_bwd

        d = tile if tile.dtype == self.operand else self._d_view(*tile.shape)
        c = coefficient.reshape(-1).contiguous()
        token_logps_bwd(tile, d, row_strides(tile), row_strides(d), label, *known, c, self.knobs, lowest=_ELSEWHERE)
        return d

    def d_left(self, k: int, coefficient: Tensor) -> Tensor:
        right = self.chunk[k][1]
        d_left = self.tile.new_empty((self.tile.shape[0], right.shape[1]))
        times_right(self._direction(coefficient), right, d_left)
        return d_left if self.lift is None else d_left.mul_(coefficient / self.lift)

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor) -> None:
        d = self._direction(coefficient)
        if self.lift is None:
            mm_into(total, d.T, left.to(d.dtype), accumulate=True)
            return
        weighted, largest = fp16_weighted(left, coefficient)
        for part, product in products(d.T, weighted):
            total[part].addcmul_(product, largest / self.lift)

    def open(self, part: slice, label: Tensor, known: Known, coefficient: Tensor) -> Tensor:
        here = (label >= part.start) & (label < part.stop)
        return self._write_d(
            self._fill(len(label), part), (label - part.start).where(here, _ELSEWHERE), known, coefficient
        )


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


def linear_score(
    factor: tuple[Tensor, Tensor], bias: Tensor | None, labels: Tensor, out: dict[str, Tensor], call: Call
) -> None:
    """One kernel, GEMM and softmax together; fills `out`, name -> (N,). Opt-in until it is measured: cuBLAS may be
    faster for wide models, and its sums are grouped differently from those of the plans with a tile, which policy and
    reference should share."""
    from dpo_fast.kernels.linear_score import linear_score_fwd

    for name, x in zip(("hidden", "weight"), factor, strict=True):
        if x.stride(-1) != 1:
            raise ValueError(f"DPO_FAST_FUSED_SCORE=1 needs {name} with contiguous columns, got strides {x.stride()}")
    bias = None if bias is None else bias.contiguous()
    linear_score_fwd(*factor, labels.contiguous(), bias, out, _knobs(call))


def sequence_sums(values: Tensor, ids: Tensor, weights: Tensor | None, num_sequences: int) -> Tensor:
    """(num_sequences,) sums of (weighted) values, in fp64 and a fixed order."""
    from dpo_fast.kernels.sequence_sum import sequence_sum_fwd

    out = values.new_empty((num_sequences,))
    if num_sequences:
        weights = None if weights is None else weights.contiguous()
        sequence_sum_fwd(values.contiguous(), ids.contiguous(), weights, out)
    return out
