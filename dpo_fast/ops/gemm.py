"""Matrix products of the head with fp32 results, and the memory of a tile of logits."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import fp32_products, free_to_look
from .plan import row_stride
from .softmax import Transform

_SLICE_BYTES = 8 << 20  # of a 16-bit weight upcast at a time, where its GEMMs take fp32
_PRODUCT_BYTES = 64 << 20  # of an fp32 product at a time, where it cannot be added where it belongs


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


def logits_buffer(rows: int, columns: int, like: Tensor, columnwise: bool) -> Tensor:
    """Memory for a tile, which `logits_view` shapes."""
    return like.new_empty(rows * (columns if columnwise else row_stride(columns)))


def logits_view(buffer: Tensor, rows: int, columns: int, columnwise: bool) -> Tensor:
    """The start of a `logits_buffer` as (rows, columns), for as many columns as it was made for, or fewer. On CPU
    column by column, in which its GEMM is a fifth faster for a few hundred rows (752 instead of 957 processor ms at
    4 x 256 rows, H=1024, V=32,000)."""
    if columnwise:
        return buffer[: rows * columns].view(columns, rows).T
    stride = row_stride(columns)
    return buffer[: rows * stride].view(rows, stride)[:, :columns]


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
