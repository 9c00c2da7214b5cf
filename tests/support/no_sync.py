"""What a device's stream sees of code that runs without one: reads by the host are refused, kernels are counted.

    with no_sync() as stream:                 # CPU tensors stand in for the device's, all of them
        loss.backward()
    with FakeTensorMode(), no_sync("cuda"):   # or fake tensors on 'cuda'; no backward without a driver
        ...
    stream.kernels                            # Counter, operator -> launches

Refused, with `Sync`, are operators whose result or its size the host must know (`item`, `nonzero`, masks as indices,
`bincount`, `equal` ...: torch's own tags say which), copies between device and host that block, and what never reaches
an operator on the CPU: `tolist`, `numpy`, `cpu`. Everything is allowed inside `stream.paused()`, and on the host's own
tensors where the device is no CPU. Operators that dpo_fast registers are executed, so that what is in them is seen.

Inside dpo_fast the CPU counts as a host, whose values are free to look at; `emulated_cuda.on_cuda` changes that, and
has the GEMMs and kernels that a CPU has not.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import torch
from torch._library.custom_ops import _maybe_get_opdef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_READERS = {"tolist", "numpy", "cpu", "__array__", "__dlpack__"}  # methods that read a CPU tensor below the dispatcher
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "_unsafe_view"}


class Sync(AssertionError):
    """The host waited for the device."""


@contextlib.contextmanager
def no_sync(device: str = "cpu") -> Iterator["Stream"]:
    """device: the type of the tensors that are the device's."""
    stream = Stream(device)
    with _Methods(stream), stream:
        yield stream


class Stream(TorchDispatchMode):
    """Operators on the device's tensors: counted, or refused."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.off, self.kernels = device, False, Counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The host may look: while a step is logged, or a batch collated."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before

    def refuse(self, what: str) -> None:
        if not self.off:
            raise Sync(f"{what} makes the host wait for the device")

    def tensors(self, values) -> list[torch.Tensor]:
        """Those of the device."""
        leaves = pytree.tree_leaves(values)
        return [x for x in leaves if isinstance(x, torch.Tensor) and x.device.type == self.device]

    def written(self, result) -> bool:
        return any(x.numel() for x in self.tensors(result))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "dpo_fast":
            with self:  # a mode is left while it handles an operator
                return _maybe_get_opdef(func)._init_fn(*args, **kwargs)
        if func.namespace == "prim":  # what a fake tensor is asked about itself
            return func(*args, **kwargs)
        if func._can_decompose():  # below autograd they arrive whole, `is_nonzero` among them
            with self:
                return func.decompose(*args, **kwargs)
        if self.tensors((args, kwargs)) and self._waits(func, args, kwargs):
            self.refuse(str(func))
        result = func(*args, **kwargs)
        if self._copies_between(func, args, kwargs, result):
            self.refuse(f"{func}, a copy that blocks,")
        if not self.off and self.written(result) and not func.is_view and func._opname not in _NO_KERNEL:
            self.kernels[func._opname] += 1
        return result

    @staticmethod
    def _waits(func, args, kwargs) -> bool:
        if func._opname in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            # One scalar where a mask holds is a masked_fill
            fills = "put" in func._opname and len(masks) == 1 and args[2].numel() == 1 and args[2].ndim == 0
            return bool(masks) and not fills
        if func._opname == "repeat_interleave":
            return kwargs.get("output_size") is None
        return bool(_DEPENDENT.intersection(func.tags))

    def _copies_between(self, func, args, kwargs, result) -> bool:
        if func._opname not in ("_to_copy", "copy_", "copy"):
            return False
        source = args[1] if func._opname != "_to_copy" else args[0]
        blocks = not (kwargs.get("non_blocking") or (func._opname != "_to_copy" and args[2:3] == (True,)))
        moves = source.device.type != result.device.type and self.device in (source.device.type, result.device.type)
        return moves and blocks


class _Methods(TorchFunctionMode):
    """Reads that a CPU tensor answers without an operator."""

    def __init__(self, stream: Stream):
        super().__init__()
        self.stream = stream

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in _READERS and self.stream.device == "cpu" and resolve_name(func) == f"torch.Tensor.{name}":
            self.stream.refuse(f"Tensor.{name}")
        return func(*args, **(kwargs or {}))
