"""The output head as a sum of factors, its GEMMs with fp32 results, and what one tile of logits yields.

    logits = sum_f left_f right_f^T + bias        (hidden, weight), and (hidden A^T, B) for a LoRA update of the head

With D_iv = k_iv ([v = y_i] - p_iv), k the derivative of the logit's transform, and c_i the coefficient of token i:

    d left_f = diag(c) D right_f                  d right_f = D^T diag(c) left_f
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .logits_torch import transform_

_SLICE_BYTES = 8 << 20  # of a 16-bit weight upcast at a time on CPU
# Of a tile worked on at a time on CPU: as a rule all of it. Blocks that stay in cache gain 2 % on a quiet machine and
# lose a third on a busy one: each is four parallel regions, whose threads wait for one that a neighbour pushed aside.
BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class Transform:
    """z = softcap tanh(x scale / softcap) / temperature."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """dz/dx without the soft-cap's share."""
        return self.scale / self.temperature


# --- GEMMs ---------------------------------------------------------------------------------------------------------


def gemm_operand(x: Tensor) -> Tensor:
    """`x` as the GEMMs take it: 16-bit only where the device multiplies it into an fp32 result."""
    return x if x.dtype in (torch.float32, torch.float64) or x.device.type == "cuda" else x.float()


def _slices(right: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `right` as GEMM operands: whole where no conversion is needed, else a few at a time."""
    if gemm_operand(right[:0]).dtype == right.dtype:
        yield slice(None), right
        return
    step = max(1, _SLICE_BYTES // (4 * max(1, right.shape[1])))
    for start in range(0, right.shape[0], step):
        part = slice(start, start + step)
        yield part, right[part].float()


def mm_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out (+)= a @ b with an fp32 `out`, never rounding the product to the operands' dtype."""
    if a.dtype in (torch.float16, torch.bfloat16):
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def logits_into(tile: Tensor, factors: list[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
    """Fill tile (n, V') with raw logits; the rights and the bias have V' rows."""
    for index, (left, right) in enumerate(factors):
        left = gemm_operand(left)
        for part, w in _slices(right):
            mm_into(tile[:, part], left, w.T, accumulate=index > 0)
    if bias is not None:
        tile.add_(bias)
    return tile


def times_right(matrix: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out (n, K) fp32 (+)= matrix (n, V) @ right (V, K)."""
    for part, w in _slices(right):
        mm_into(out, matrix[:, part], w, accumulate)
        accumulate = True
    return out


# --- one tile ------------------------------------------------------------------------------------------------------


class EagerTile:
    """A tile of logits on the eager path.

    `fold` leaves exp(z - max) k in the tile, unnormalised: 1 / sum and the coefficient c become factors of rows of the
    thin operands, and the one-hot term an exact row of `right`. One pass writes the tile, none is owed to c.
    """

    def __init__(self, rows: int, columns: int, like: Tensor):
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        self.buffer = torch.empty((rows, columns), dtype=dtype, device=like.device)

    def fold(self, factors, bias, labels: Tensor, transform: Transform, stats=(), gradient: bool = True) -> dict:
        """Score the tile's n tokens, labels (n,) int64 in [0, V): name -> (n,) fp32, the log-probs, row_max, log_sum
        and the statistics asked for."""
        self.transform, self.labels, self.factors = transform, labels, factors
        tile = self.tile = logits_into(self.buffer[: labels.numel()], factors, bias)
        n, vocab = tile.shape
        out = {name: tile.new_empty(n) for name in ("logps", "row_max", "log_sum", *stats)}
        self.sum_exp = tile.new_empty((n, 1))
        self.target_slope = None if transform.softcap is None else tile.new_empty((n, 1))
        copies = transform.softcap is not None or "entropy" in stats  # of a block: eight times smaller ones then
        step = max(1, BLOCK_BYTES // (8 if copies else 1) // (vocab * tile.element_size()))
        for start in range(0, n, step):
            self._fold_rows(tile[start : start + step], slice(start, start + step), out, stats, gradient)
        return out

    def _fold_rows(self, z: Tensor, rows: slice, out: dict, stats, gradient: bool) -> None:
        label = self.labels[rows].unsqueeze(1)
        t = transform_(z, self.transform.scale, self.transform.softcap, self.transform.temperature)
        target = z.gather(1, label)
        if "mean_logits" in stats:
            out["mean_logits"][rows] = z.mean(1)
        if "is_top1" in stats:
            out["is_top1"][rows] = (z.argmax(1, keepdim=True) == label).squeeze(1).to(z.dtype)
        row_max = z.amax(1, keepdim=True)
        row_max.masked_fill_(row_max == -torch.inf, torch.finfo(z.dtype).min)  # a row of all -inf sums to 0, not NaN
        z.sub_(row_max)
        shifted = z.clone() if "entropy" in stats else None
        sum_exp = z.exp_().sum(1, keepdim=True)
        log_sum = sum_exp.log()
        if shifted is not None:
            expected = torch.where(z > 0, shifted.mul_(z), 0).sum(1, keepdim=True)
            out["entropy"][rows] = (log_sum - expected / sum_exp).squeeze(1)
        if "log_sum_sq_probs" in stats:
            out["log_sum_sq_probs"][rows] = (z.square().sum(1, keepdim=True).log() - 2 * log_sum).squeeze(1)
        logp = torch.where(sum_exp == 0, -torch.inf, target.sub_(row_max).sub_(log_sum))
        out["logps"][rows] = logp.squeeze(1)
        out["row_max"][rows] = row_max.squeeze(1)
        out["log_sum"][rows] = log_sum.squeeze(1)
        self.sum_exp[rows] = sum_exp.masked_fill_(sum_exp == 0, 1)
        if t is not None and gradient:
            slope = t.square_().neg_().add_(1)
            self.target_slope[rows] = slope.gather(1, label)
            z.mul_(slope)

    def d_left(self, index: int, coefficient: Tensor) -> Tensor:
        """(n, K) fp32 gradient of the factor's left side, for coefficients (n, 1)."""
        right = self.factors[index][1]
        d = times_right(self.tile, right, self.tile.new_empty((self.tile.shape[0], right.shape[1])))
        target = right[self.labels].to(d.dtype)
        if self.target_slope is not None:
            target.mul_(self.target_slope)
        return d.div_(-self.sum_exp).add_(target).mul_(coefficient * self.transform.slope)

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor) -> None:
        """total (V, K) fp32 += the gradient of a factor's right side whose left is (n, K)."""
        left, coefficient = left.to(self.tile.dtype), coefficient * self.transform.slope
        mm_into(total, self.tile.T, left * (coefficient / -self.sum_exp), accumulate=True)
        target = coefficient if self.target_slope is None else coefficient * self.target_slope
        total.index_add_(0, self.labels, left * target)


class TritonTile:
    """A tile of logits with Triton's passes over it: one read to score, one read and write for D with c in it."""

    def __init__(self, rows: int, columns: int, like: Tensor):
        self.buffer = torch.empty((rows, columns), dtype=torch.float32, device=like.device)
        operand = gemm_operand(like[:0]).dtype
        self.twin = self.buffer if operand == torch.float32 else torch.empty_like(self.buffer, dtype=operand)
        self.coefficient = None

    def fold(self, factors, bias, labels: Tensor, transform: Transform, stats=(), gradient: bool = True) -> dict:
        from dpo_fast.kernels.token_logps import token_logps_fwd

        self.transform, self.labels, self.factors = transform, labels, factors
        tile = self.tile = logits_into(self.buffer[: labels.numel()], factors, bias)
        self.out = {name: tile.new_empty(labels.numel()) for name in ("logps", "row_max", "log_sum", *stats)}
        token_logps_fwd(tile, self._rows(tile), labels, self.out, **self._knobs())
        self.coefficient = None
        return self.out

    def _rows(self, tile: Tensor) -> tuple[int, int, int, int]:
        return 1, tile.shape[0], 0, tile.stride(0)

    def _knobs(self) -> dict:
        t = self.transform
        return dict(ignore_index=-1, logit_scale=t.scale, softcap=t.softcap, temperature=t.temperature)

    def _direction(self, coefficient: Tensor) -> Tensor:
        """diag(c) D in the operands' dtype; written on the first call for a tile."""
        from dpo_fast.kernels.token_logps import token_logps_bwd

        d = self.twin[: self.tile.shape[0]]
        if self.coefficient is None:
            self.coefficient = coefficient
            rows, out = self._rows(self.tile), self.out
            c = coefficient.reshape(-1).expand(self.tile.shape[0]).contiguous()
            token_logps_bwd(
                self.tile, d, rows, self._rows(d), self.labels, out["row_max"], out["log_sum"], c, **self._knobs()
            )
        elif coefficient is not self.coefficient:
            raise AssertionError("the tile holds D for other coefficients")
        return d

    def d_left(self, index: int, coefficient: Tensor) -> Tensor:
        right = self.factors[index][1]
        return times_right(
            self._direction(coefficient), right, self.tile.new_empty((self.tile.shape[0], right.shape[1]))
        )

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor) -> None:
        d = self._direction(coefficient)
        mm_into(total, d.T, left.to(d.dtype), accumulate=True)


def make_tile(impl: str, rows: int, columns: int, like: Tensor) -> "EagerTile | TritonTile":
    return (TritonTile if impl == "triton" else EagerTile)(rows, columns, like)
