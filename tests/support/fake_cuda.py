"""Sizes of real models without their memory: fake CPU tensors, taken for a device's, whose kernels are counted.

A product of 16-bit matrices with an fp32 result and a launch of Triton are one kernel each, and compute nothing.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from no_sync import Stream, no_sync
from torch._subclasses.fake_tensor import FakeTensorMode

from dpo_fast.ops import dispatch


@contextlib.contextmanager
def fake_cuda() -> Iterator[Stream]:
    """Make tensors inside, and ask for impl="triton". A read by the host is refused."""
    from triton.runtime.interpreter import InterpretedFunction

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), no_sync() as stream:

        def launch(kernel, *_, **__):
            stream.kernels["triton"] += 1

        def product(name, multiply):
            def fake(*operands, out=None, out_dtype=None, **scales):
                if out_dtype is None:
                    return multiply(*operands, **scales) if out is None else multiply(*operands, out=out, **scales)
                stream.kernels[name] += 1
                return out

            return fake

        for name in ("mm", "addmm"):
            patch.setattr(torch, name, product(name, getattr(torch, name)))
        patch.setattr(InterpretedFunction, "run", launch)
        patch.setattr(dispatch, "_HOST_DEVICES", ())
        patch.setattr(dispatch, "fp32_products", lambda device, dtype: (True, True))
        patch.setattr("dpo_fast.ops.gemm.fp32_products", lambda device, dtype: (True, True))
        yield stream
