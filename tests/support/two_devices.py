"""A model whose head is on a second device, without one: "meta" stands in, and mixing the two raises as it would."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import terms
from dpo_fast.ops import call, dispatch, logits, sequence


class _BackAsZeros(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._opname == "_to_copy" and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    """What comes back from "meta" is zeros. No values are looked at, on the CPU neither."""

    def without_its_refusal(check):
        return lambda op, name, value, shape, dtypes, device=None: check(
            op, name, value, shape, dtypes, value.device if device is None else device
        )

    with pytest.MonkeyPatch.context() as patch, _BackAsZeros():
        patch.setattr(dispatch, "_HOST_DEVICES", ())
        for module in (call, logits, sequence, terms):
            patch.setattr(module, "check_tensor", without_its_refusal(module.check_tensor))
        yield
