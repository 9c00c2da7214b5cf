"""A tile of logits with Triton's passes over it, between torch's GEMMs."""

import torch
from torch import Tensor

from dpo_fast.kernels.token_logps import token_logps_bwd, token_logps_fwd

from .gemm import aligned, fp16_lift, fp16_weighted, gemm_operand, logits_into, mm_into, products, times_right
from .tile import Tile


class TritonTile(Tile):
    """One read to score, one read and write for D.

    D takes the tile's place, and a buffer of its own where GEMMs take 16 bits. c is in it, but in fp16 (above).
    """

    def _allocate(self, rows: int, columns: int) -> None:
        self.buffer = aligned(rows, columns, torch.float32, self.factors.lefts[0].device)
        self.operand = gemm_operand(self.factors.lefts[0].new_empty(0, dtype=self.factors.dtypes[0])).dtype
        self.d_buffer = None  # made by the first gradient
        self.knobs = dict(ignore_index=-1, **self.call.transform.knobs)  # no label is: those are usable

    def _score(self, label: Tensor, gradient: bool) -> dict[str, Tensor]:
        self.label = label
        tile = self.tile = logits_into(self.buffer[: label.numel()], self.chunk, self.factors.bias)
        self.out = {name: tile.new_empty(label.numel()) for name in ("logps", "row_max", "log_sum", *self.call.outputs)}
        token_logps_fwd(tile, _rows_of(tile), label, self.out, **self.knobs)
        self.lift = fp16_lift(self.call.transform) if self.operand == torch.float16 else None
        self.coefficient = self.d = None
        return self.out

    def _direction(self, coefficient: Tensor) -> Tensor:
        """diag(c) D in the operands' dtype, lifted instead in fp16; written on the first call for a tile."""
        if self.d is None:
            self.coefficient = coefficient
            inside = coefficient if self.lift is None else torch.full_like(coefficient, self.lift)
            self.d = self._write_direction(inside.reshape(-1).contiguous())
        elif coefficient is not self.coefficient:
            raise AssertionError("the tile holds D for other coefficients")
        return self.d

    def _write_direction(self, c: Tensor) -> Tensor:
        tile = d = self.tile
        if self.operand != tile.dtype:
            if self.d_buffer is None:
                self.d_buffer = aligned(*self.buffer.shape, self.operand, tile.device)
            d = self.d_buffer[: tile.shape[0]]
        row_max, log_sum = self.out["row_max"], self.out["log_sum"]
        rows = _rows_of(tile), _rows_of(d)
        token_logps_bwd(tile, d, *rows, self.label, row_max, log_sum, c, **self.knobs)
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


def _rows_of(x: Tensor) -> tuple[int, int, int, int]:
    """(outer, inner, stride_outer, stride_inner) of a matrix with contiguous columns, as the kernels walk it."""
    return 1, x.shape[0], 0, x.stride(0)
