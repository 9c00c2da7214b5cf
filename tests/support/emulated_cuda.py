"""Code for CUDA, executed on CPU tensors: what it computes is judged, not how fast.

Inside `on_cuda()` the library takes CPU tensors for a device's: it looks at no values, keeps 16-bit GEMM operands,
plans the tiles of an accelerator. The GEMMs that CUDA has and a CPU has not are stood in for, with torch's checks and
a count of what would make them slow. Triton's interpreter runs the programs of a launch in a random order and rounds
fp32 to bf16 to nearest even, as the hardware does, not by truncation. Memory that nobody wrote holds NaN.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from dpo_fast.ops import dispatch, plan

HALF = (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def on_cuda(seed: int = 0, *, tile_rows: int = 8, adds: bool = True) -> Iterator[Counter]:
    """Yields counts of what ran. tile_rows: rows of a tile, where the planner would take 2,048 and more. adds: whether
    torch adds 16-bit products to an fp32 matrix (2.10) or only makes them (2.8)."""
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch, poisoned():
        patch.setattr(dispatch, "_HOST_DEVICES", ())
        patch.setattr(plan, "TILE_ROWS", (tile_rows,))
        patch.setattr(torch, "mm", _mm(counts, torch.mm))
        patch.setattr(torch, "addmm", _addmm(counts, torch.mm, torch.addmm, adds))
        _random_programs(patch, counts, random.Random(seed))
        _rounding_to_bf16(patch)
        dispatch.fp32_products.cache_clear()
        try:
            yield counts
        finally:
            dispatch.fp32_products.cache_clear()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _checked(a, b, out, counts: Counter) -> None:
    """What cuBLAS takes without a copy, and on its fast path: 16-byte rows, unless the matrix itself is narrower."""
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected m1 and m2 to have the same dtype, but got: {a.dtype} != {b.dtype}")
    for x in (a, b, out):
        if min(x.shape) > 1:
            assert 1 in x.stride(), f"strides {x.stride()} need a copy"
            counts["unaligned"] += max(x.stride()) * x.element_size() % 16 != 0


def _mm(counts, mm):
    def emulated(a, b, *, out=None, out_dtype=None):
        if out_dtype is None:
            return mm(a, b) if out is None else mm(a, b, out=out)
        assert a.dtype in HALF and out_dtype == out.dtype == torch.float32
        _checked(a, b, out, counts)
        counts["16-bit product"] += 1
        return out.copy_(mm(a.float(), b.float()))

    return emulated


def _addmm(counts, mm, addmm, adds):
    def emulated(c, a, b, *, out=None, out_dtype=None, **scales):
        if out_dtype is None:
            return addmm(c, a, b, out=out, **scales)
        if not adds:
            raise RuntimeError(f"self and mat2 must have the same dtype, but got {c.dtype} and {b.dtype}")
        assert a.dtype in HALF and out_dtype == out.dtype == c.dtype == torch.float32
        _checked(a, b, out, counts)
        counts["16-bit product, added"] += 1
        return out.copy_(c + mm(a.float(), b.float()))

    return emulated


def _random_programs(patch, counts, rng: random.Random) -> None:
    """Each program of a grid once, in any order."""
    from triton.runtime.interpreter import InterpreterBuilder

    set_dim, set_idx, order = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx, {}

    def shuffled(self, *grid):
        order.clear()
        inside = [(x, y, z) for x in range(grid[0]) for y in range(grid[1]) for z in range(grid[2])]
        order.update(zip(inside, rng.sample(inside, len(inside)), strict=True))
        counts["launches"] += 1
        set_dim(self, *grid)

    patch.setattr(InterpreterBuilder, "set_grid_dim", shuffled)
    patch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: set_idx(self, *order[x, y, z]))


def _rounding_to_bf16(patch) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def rounded(self, source, target):
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        values = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32)).to(torch.bfloat16)
        return TensorHandle(
            values.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(source.data)), tl.bfloat16
        )

    patch.setattr(InterpreterBuilder, "cast_impl", rounded)
