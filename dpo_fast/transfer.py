"""A batch's tensors to a device in one copy: each copy costs a launch, and one from pageable memory a wait."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_ALIGNED = 16  # bytes: the widest load of a kernel
_IN_ONE_COPY = ("cuda",)  # types of devices; tests put others there


def mover(tensors: Sequence[Tensor], device, non_blocking: bool = False) -> Callable[[Tensor], Tensor]:
    """Copies `tensors` to `device`; returns what gives each one's copy. What is there already is its own.

    To CUDA, those of the host travel in one pinned buffer, and their copies are views of another. The host waits for
    nothing: nobody else writes into the buffer, and torch keeps it until the device has read it.
    non_blocking: what `pinned` has made is read in place; it must stay as it is until then.
    """
    device = torch.device(device)
    hosts = [x for x in tensors if x.device.type == "cpu" and device.type in _IN_ONE_COPY and _is_plain(x)]
    moved = {}
    if hosts:
        packed = _buffer_of(hosts) if non_blocking else None
        there = (_filled(hosts) if packed is None else packed).to(device, non_blocking=True)
        moved = dict(zip(map(id, hosts), _views(there, hosts), strict=True))
    moved |= {id(x): x.to(device, non_blocking=non_blocking) for x in tensors if id(x) not in moved}
    return lambda x: moved[id(x)]


def pinned(tensors: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Copies `tensors` into one pinned buffer; returns what gives each one's copy."""
    plain = [x for x in tensors if _is_plain(x)]
    copies = dict(zip(map(id, plain), _views(_filled(plain), plain), strict=True)) if plain else {}
    copies |= {id(x): x.pin_memory() for x in tensors if id(x) not in copies}
    return lambda x: copies[id(x)]


def _is_plain(x: Tensor) -> bool:
    """Whether its bytes are all there is to it."""
    return x.layout == torch.strided and not x.requires_grad


def _filled(tensors: Sequence[Tensor]) -> Tensor:
    """A pinned buffer with their values."""
    buffer = _pinned_bytes(_places(tensors)[1])
    for view, x in zip(_views(buffer, tensors), tensors, strict=True):
        view.copy_(x)
    return buffer


def _pinned_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each begins in a buffer, and the buffer's size, in bytes."""
    starts, end = [], 0
    for x in tensors:
        starts.append(end)
        end += -(-x.nbytes // _ALIGNED) * _ALIGNED
    return starts, end


def _views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    places = zip(_places(tensors)[0], tensors, strict=True)
    # `data`: what is written to one does not count as written to the others
    return [buffer[start : start + x.nbytes].view(x.dtype).view(x.shape).data for start, x in places]


def _buffer_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """The pinned buffer that `pinned` has put these into, if it has."""
    storage, (starts, size) = tensors[0].untyped_storage(), _places(tensors)
    one = all(x.untyped_storage().data_ptr() == storage.data_ptr() and x.is_contiguous() for x in tensors)
    if not one or storage.nbytes() != size or [x.storage_offset() * x.itemsize for x in tensors] != starts:
        return None
    return torch.empty(0, dtype=torch.uint8).set_(storage) if tensors[0].is_pinned() else None
