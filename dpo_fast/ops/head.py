"""The output head as a sum of factors, its GEMMs with fp32 results, and what one tile of logits yields.

    logits = sum_f left_f right_f^T + bias        (hidden, weight), and (hidden A^T, B) for a LoRA update of the head

With D_iv = k_iv ([v = y_i] - p_iv), k the derivative of the logit's transform, and c_i the coefficient of token i:

    d left_f = diag(c) D right_f                  d right_f = D^T diag(c) left_f
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .call import Call, Transform
from .dispatch import fp32_products, free_to_look
from .plan import CPU_COLUMNS, row_stride

_SLICE_BYTES = 8 << 20  # of a 16-bit weight upcast at a time, where its GEMMs take fp32
_PRODUCT_BYTES = 64 << 20  # of an fp32 product at a time, where it cannot be added where it belongs
_COPY_BYTES = 4 << 20  # of a tile copied at a time, by the passes that need a copy of what they overwrite


# --- GEMMs ---------------------------------------------------------------------------------------------------------


def gemm_operand(x: Tensor) -> Tensor:
    """`x` as the GEMMs take it: 16-bit only where an accelerator multiplies it into an fp32 result."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.float() if free_to_look(x) or not fp32_products(x.device, x.dtype)[0] else x


def _slices(right: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `right` in `dtype`: whole where they are in it already, else a few at a time."""
    if right.dtype == dtype:
        yield slice(None), right
        return
    step = max(1, _SLICE_BYTES // (dtype.itemsize * max(1, right.shape[1])))
    for start in range(0, right.shape[0], step):
        part = slice(start, start + step)
        yield part, right[part].to(dtype)


def mm_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out (+)= a @ b with an fp32 `out`, never rounding the product to the operands' dtype."""
    half = a.dtype in (torch.float16, torch.bfloat16)
    if half and not accumulate:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif half and fp32_products(a.device, a.dtype)[1]:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    elif half:
        for part, product in products(a, b):
            out[part].add_(product)
    elif accumulate:
        torch.addmm(out, a, b, out=out)
    else:
        torch.mm(a, b, out=out)


def products(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """a @ b in fp32, some rows at a time, each over the one before."""
    step = max(1, _PRODUCT_BYTES // (4 * b.shape[1]))
    buffer = torch.empty((min(step, a.shape[0]), b.shape[1]), dtype=torch.float32, device=a.device)
    for start in range(0, a.shape[0], step):
        part = slice(start, min(start + step, a.shape[0]))
        product = buffer[: part.stop - start]
        mm_into(product, a[part], b)
        yield part, product


def logits_into(tile: Tensor, factors: list[tuple[Tensor, Tensor]], bias: Tensor | None) -> Tensor:
    """Fill tile (n, V') with raw logits; the rights and the bias have V' rows."""
    for index, (left, right) in enumerate(factors):
        left = gemm_operand(left)
        for part, w in _slices(right, left.dtype):
            mm_into(tile[:, part], left, w.T, accumulate=index > 0)
    if bias is not None:
        tile.add_(bias)
    return tile


def times_right(matrix: Tensor, right: Tensor, out: Tensor, accumulate: bool = False) -> Tensor:
    """out (n, K) fp32 (+)= matrix (n, V) @ right (V, K)."""
    for part, w in _slices(right, matrix.dtype):
        mm_into(out, matrix[:, part], w, accumulate)
        accumulate = True
    return out


def aligned(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns), uninitialised, whose rows are as far apart as an accelerator's GEMMs like them."""
    return torch.empty((rows, row_stride(columns)), dtype=dtype, device=device)[:, :columns]


def logits_buffer(rows: int, columns: int, like: Tensor) -> Tensor:
    """Memory for a tile, which `logits_view` shapes."""
    return like.new_empty(rows * (columns if free_to_look(like) else row_stride(columns)))


def logits_view(buffer: Tensor, rows: int, columns: int) -> Tensor:
    """The start of a `logits_buffer` as (rows, columns), for as many columns as it was made for, or fewer. On CPU
    column by column, in which its GEMM is a fifth faster for a few hundred rows (752 instead of 957 processor ms at
    4 x 256 rows, H=1024, V=32,000)."""
    if free_to_look(buffer):
        return buffer[: rows * columns].view(columns, rows).T
    stride = row_stride(columns)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


def blocks_of_columns(tile: Tensor, copied: bool) -> Iterator[tuple[int, Tensor]]:
    """The tile's columns with where they start: all at once, or a few at a time where passes make copies of them."""
    limit = _COPY_BYTES if free_to_look(tile) else 8 * _COPY_BYTES
    step = max(1, limit // max(1, tile.shape[0] * tile.element_size())) if copied else tile.shape[1]
    for start in range(0, tile.shape[1], step):
        yield start, tile[:, start : start + step]


def column_of(column: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`column` as an address among `width` columns, and whether it is one of them."""
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def _sum_columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(n, 1) sums over columns: a slice's in x's dtype, these in `dtype`, whether slices come singly or together."""
    return torch.cat([part.sum(1, keepdim=True) for part in x.split(CPU_COLUMNS, 1)], 1).sum(1, True, dtype=dtype)


# --- fp16 ----------------------------------------------------------------------------------------------------------
# The fp16 D of a gradient is stored without coefficients: the slope of a loss is small, a GradScaler multiplies it only
# afterwards, and what is below 6e-8 is 0. Lifted so that its largest entry is some thousands, D keeps entries of 1e-11.
# Coefficients go to thin fp32 results, and to a thin operand after division by the largest of them.


def fp16_lift(transform: Transform) -> float:
    """A power of two: |D| times it is at most 4,096, of fp16's 65,504."""
    slope = abs(transform.slope)
    return 2.0 ** (12 - math.ceil(math.log2(slope))) if slope else 1.0


def fp16_weighted(left: Tensor, coefficient: Tensor) -> tuple[Tensor, Tensor]:
    """(n, K) fp16 left x c / s and s (), the largest |c|; coefficient: (n, 1) fp32."""
    largest = coefficient.abs().amax().clamp(min=torch.finfo(coefficient.dtype).tiny)
    return (left * (coefficient / largest)).to(torch.float16), largest


# --- one tile ------------------------------------------------------------------------------------------------------


class EagerTile:
    """A tile of logits on the eager path: n tokens by `columns` vocabulary entries, stored column by column on CPU.

    `fold` leaves exp(z - max) k in the tile, unnormalised: 1 / sum and the coefficient c become factors of rows of the
    thin operands, and the one-hot term an exact row of `right`. One pass writes the tile, none is owed to c.

    With fewer columns than the vocabulary has, a tile passes over it slice by slice and the softmax is online: sums so
    far are rescaled when the maximum grows. exp(z - max) k right is then summed on the way (`d_left`); what needs the
    whole of D at once (`add_d_right`) needs a tile with all columns.
    """

    def __init__(self, rows: int, columns: int, like: Tensor):
        wide = torch.promote_types(like.dtype, torch.float32)
        self.columns = columns
        self.buffer = logits_buffer(rows, columns, like.new_empty(0, dtype=wide))

    def fold(self, factors, bias, labels: Tensor, call: Call, gradient: bool = True) -> dict:
        """Score n tokens, labels (n,) int64 in [0, V): name -> (n,) fp32, the log-probs, row_max, log_sum and the
        statistics asked for. gradient: whether `d_left` or `add_d_right` will be called."""
        self.transform, self.label, self.factors = call.transform, labels.unsqueeze(1), factors
        self.gradient = gradient
        n, vocab = labels.numel(), factors[0][1].shape[0]

        # Sums over slices in fp64, where there is one: which slices there are then changes hardly a bit
        dtype, device = self.buffer.dtype, self.buffer.device
        wide = dtype if device.type == "mps" else torch.float64
        # Not -inf: a row of all -inf then sums to 0, not NaN
        self.row_max = torch.full((n, 1), torch.finfo(dtype).min, dtype=dtype, device=device)
        self.target = torch.zeros_like(self.row_max)
        self.sum_exp = torch.zeros_like(self.row_max, dtype=wide)
        self.running = {name: torch.zeros_like(self.sum_exp) for name in call.outputs}
        self.sums = None
        for start in range(0, vocab, self.columns):
            part = slice(start, min(start + self.columns, vocab))
            rights = [(left, right[part]) for left, right in factors]
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

    def d_left(self, index: int, coefficient: Tensor) -> Tensor:
        """(n, K) fp32 gradient of the factor's left side, for coefficients (n, 1). Once a factor and `fold`."""
        right = self.factors[index][1]
        if self.sums is None:
            d = times_right(self.tile, right, self.tile.new_empty((self.tile.shape[0], right.shape[1])))
        else:
            d = self.sums[index]
        target = right[self.label.squeeze(1)].to(d.dtype)
        if self.target_slope is not None:
            target.mul_(self.target_slope)
        return d.div_(-self.sum_exp).add_(target).mul_(coefficient * self.transform.slope)

    def add_d_right(self, left: Tensor, coefficient: Tensor, total: Tensor) -> None:
        """total (V, K) fp32 += the gradient of a factor's right side whose left is (n, K)."""
        left, coefficient = left.to(self.tile.dtype), coefficient * self.transform.slope
        mm_into(total, self.tile.T, left * (coefficient / -self.sum_exp), accumulate=True)
        if self.target_slope is not None:
            coefficient = coefficient * self.target_slope
        total.index_add_(0, self.label.squeeze(1), left * coefficient)


class TritonTile:
    """A tile of logits with Triton's passes over it: one read to score, one read and write for D.

    D takes the tile's place, and a buffer of its own where GEMMs take 16 bits. c is in it, but in fp16 (above).
    """

    def __init__(self, rows: int, columns: int, like: Tensor):
        self.buffer = aligned(rows, columns, torch.float32, like.device)
        self.operand = gemm_operand(like[:0]).dtype
        self.d_buffer = None  # made by the first gradient

    def fold(self, factors, bias, labels: Tensor, call: Call, gradient: bool = True) -> dict:
        from dpo_fast.kernels.token_logps import token_logps_fwd

        self.labels, self.factors = labels, factors
        self.knobs = call.transform.knobs
        tile = self.tile = logits_into(self.buffer[: labels.numel()], factors, bias)
        self.out = {name: tile.new_empty(labels.numel()) for name in ("logps", "row_max", "log_sum", *call.outputs)}
        token_logps_fwd(tile, _rows_of(tile), labels, self.out, ignore_index=-1, **self.knobs)
        self.lift = fp16_lift(call.transform) if self.operand == torch.float16 else None
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
        from dpo_fast.kernels.token_logps import token_logps_bwd

        tile = d = self.tile
        if self.operand != tile.dtype:
            if self.d_buffer is None:
                self.d_buffer = aligned(*self.buffer.shape, self.operand, tile.device)
            d = self.d_buffer[: tile.shape[0]]
        row_max, log_sum = self.out["row_max"], self.out["log_sum"]
        rows = _rows_of(tile), _rows_of(d)
        token_logps_bwd(tile, d, *rows, self.labels, row_max, log_sum, c, ignore_index=-1, **self.knobs)
        return d

    def d_left(self, index: int, coefficient: Tensor) -> Tensor:
        right = self.factors[index][1]
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


def make_tile(impl: str, rows: int, columns: int, like: Tensor) -> "EagerTile | TritonTile":
    return (TritonTile if impl == "triton" else EagerTile)(rows, columns, like)
