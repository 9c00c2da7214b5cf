"""TRL's padded batches as shared-prefix rows, packed in the data loader where that can be, else in the forward.

    PackingCollator   what TRL's collator makes, as a `PairBatch`: the same dict, which carries its packed rows along
    handed_over       while TRL computes a loss, `handed` finds them for the tensors that they were made from

The packing is rows.py's.
TRL's code sees no key that it does not know. What cuts, joins or rewrites a batch on its way (accelerate's dispatcher,
a user's own code) makes or changes tensors, and the forward then packs those.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import transfer
from .batch import PreferenceBatch
from .ops.dispatch import readable
from .rows import packed_rows

_SOURCES = ("input_ids", "attention_mask", "completion_mask")  # (2P, T), chosen above rejected
_OTHERS = {"ref_chosen_logps", "ref_rejected_logps"}
_WITH_ASSERTIONS = ("cuda", "cpu")  # types of devices that check a value without the host; cpu: in tests, for a GPU
_OTHER_LABELS = (
    "dpo_fast.trl: the labels are not those of the batch's completion_mask; layout='padded' scores what labels say"
)


class PairBatch(dict[str, Any]):
    """A batch of TRL's collator, and its packed rows as long as they are of the tensors in it."""

    def __init__(self, values: dict, rows: PreferenceBatch | None = None):
        super().__init__(values)
        self._rows = rows
        sources: Iterable[str] = () if rows is None else _SOURCES
        self._made_of: list[tuple[str, Tensor, int]] = [(name, self[name], _version(self[name])) for name in sources]

    def rows(self) -> PreferenceBatch | None:
        """None if a tensor that they were made from was replaced or written to."""
        same = all(self.get(name) is x and _version(x) == version for name, x, version in self._made_of)
        return self._rows if same else None

    def to(self, device, non_blocking: bool = False) -> "PairBatch":
        """A copy with every tensor on `device`, where they arrive in one piece (see transfer.py)."""
        return self._map(transfer.mover(self._tensors(), device, non_blocking))

    def pin_memory(self) -> "PairBatch":
        return self._map(transfer.pinned(self._tensors()))

    def _tensors(self) -> list[Tensor]:
        rows = self.rows()
        own = [value for value in self.values() if isinstance(value, Tensor)]
        return [*own, *([] if rows is None else rows.tensors())]

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PairBatch":
        rows = self.rows()
        values = {name: function(value) if isinstance(value, Tensor) else value for name, value in self.items()}
        return PairBatch(values, None if rows is None else rows.map(function))

    def __reduce__(self):
        return PairBatch, (dict(self), self.rows())


def _version(x: Tensor) -> int:
    """Counts what was written into a tensor, where torch does."""
    return 0 if x.is_inference() else x._version


@dataclass
class PackingCollator:
    """`collator`, a collator of TRL's kind, whose batches of text pairs are packed as well: in the loader's workers,
    if it has any. Its attributes are `collator`'s."""

    collator: Any

    def __call__(self, rows: list) -> Any:
        batch = self.collator(rows)
        if type(batch) is not dict or not set(_SOURCES) <= batch.keys() <= {*_SOURCES, *_OTHERS}:
            return batch
        if not all(isinstance(x, Tensor) and x.device.type == "cpu" for x in batch.values()):
            return batch
        ids, mask, completion = (batch[name] for name in _SOURCES)
        if not (ids.ndim == 2 and ids.shape == mask.shape == completion.shape and len(ids) % 2 == 0):
            return batch
        packed = packed_rows(ids, mask, labels_of(batch))
        return PairBatch(batch, None if isinstance(packed, str) else packed)

    def __getattr__(self, name: str):
        if name == "collator" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __setattr__(self, name: str, value):
        if name == "collator":
            super().__setattr__(name, value)
        else:
            setattr(self.collator, name, value)


def labels_of(batch: dict) -> Tensor:
    """As TRL makes them: (2P, T), -100 where no completion is."""
    return batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)


def prepared(given: Any, found: Any) -> Any:
    """`found`, into which Trainer has copied `given` key by key, with its packed rows if the tensors are the same."""
    if not isinstance(given, PairBatch) or any(given.get(name) is not found.get(name) for name in _SOURCES):
        return found
    return PairBatch(found, given.rows())


_HANDED: ContextVar[PairBatch | None] = ContextVar("handed", default=None)


@contextlib.contextmanager
def handed_over(batch: Any) -> Iterator[None]:
    """Let `handed` find the packed rows of a batch inside."""
    token = _HANDED.set(batch if isinstance(batch, PairBatch) else None)
    try:
        yield
    finally:
        _HANDED.reset(token)


def handed(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> PreferenceBatch | None:
    """The packed rows of these tensors; None where there are none, or where the labels are not those that TRL makes of
    the batch. On a GPU the host does not wait to know that: other labels stop the run there."""
    batch = _HANDED.get()
    rows = None if batch is None else batch.rows()
    if batch is None or rows is None:
        return None
    if batch["input_ids"] is not input_ids or batch["attention_mask"] is not attention_mask:
        return None
    same = (labels == labels_of(batch)).all()
    if readable(labels) or labels.device.type not in _WITH_ASSERTIONS:
        return rows if same else None
    torch._assert_async(same, _OTHER_LABELS)
    return rows
