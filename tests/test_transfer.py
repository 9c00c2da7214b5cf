"""One copy per batch to a device, and the same bits there. No GPU: other devices stand in, and memory is not pinned."""

import pickle
from collections import Counter

import pytest
import torch
from accelerate.utils import send_to_device
from tiny import tiny_pairs
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_fast import transfer
from dpo_fast.batch import PreferenceBatch, padded_batch
from dpo_fast.layout import SharedPrefixLayout, shared_prefix_batch

MAKE = {"packed": shared_prefix_batch, "padded": lambda pairs: padded_batch(pairs, 0)}


class Copies(TorchDispatchMode):
    """Counts copies between two devices, as (operator, whether the host does not wait)."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func._opname in ("_to_copy", "copy_"):
            source = args[1] if func._opname == "copy_" else args[0]
            if source.device != result.device:
                waits_not = kwargs.get("non_blocking", False) or args[2:3] == (True,)
                self.seen[func._opname, waits_not] += 1
        return result


@pytest.fixture
def unpinned(monkeypatch):
    monkeypatch.setattr(transfer, "_pinned_bytes", lambda size: torch.full((size,), 255, dtype=torch.uint8))


def to(monkeypatch, *types: str) -> None:
    monkeypatch.setattr(transfer, "_IN_ONE_COPY", types)


def batch_of(kind: str) -> PreferenceBatch:
    batch = MAKE[kind](tiny_pairs(3))
    batch["reference_logps"] = torch.linspace(-9, -1, 6).to(torch.float32)
    batch["reference_token_logps"] = torch.rand(4, 8).to(torch.bfloat16)[:, ::2]  # lies apart
    batch["switch"] = torch.tensor(True)  # of one byte, and without a dimension
    batch["empty"] = torch.empty(0, 3)
    return batch


def assert_same(found: PreferenceBatch, true: PreferenceBatch) -> None:
    assert type(found) is PreferenceBatch and found.keys() == true.keys()
    for name, value in true.items():
        if isinstance(value, SharedPrefixLayout):
            assert_same(PreferenceBatch(vars(found[name])), PreferenceBatch(vars(value)))
        elif isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
        elif name not in ("copies", "kept", "called"):  # not of the layout, but of its users
            assert found[name] == value, name


@pytest.mark.parametrize("kind", MAKE)
def test_what_arrives_is_what_was_sent(kind, monkeypatch, unpinned):
    to(monkeypatch, "cpu")
    batch = batch_of(kind)
    for found in (batch.to("cpu"), batch.pin_memory(), batch.pin_memory().to("cpu"), batch.to("cpu").to("cpu")):
        assert_same(found, batch)
        tensors = found.tensors()
        assert len({x.untyped_storage().data_ptr() for x in tensors}) == 1
        assert all(x.storage_offset() * x.itemsize % 16 == 0 and x.is_contiguous() for x in tensors)
    assert_same(pickle.loads(pickle.dumps(batch.pin_memory())), batch)


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("non_blocking", [False, True])
def test_accelerate_sends_a_batch_in_one_copy_that_does_not_block(kind, non_blocking, monkeypatch, unpinned):
    to(monkeypatch, "meta")
    batch = batch_of(kind)
    with Copies() as copies:
        found = send_to_device(batch, torch.device("meta"), non_blocking=non_blocking)
    assert copies.seen == {("_to_copy", True): 1}
    assert {x.device.type for x in found.tensors()} == {"meta"}
    assert [x.shape for x in found.tensors()] == [x.shape for x in batch.tensors()]
    with Copies() as copies:  # what is there stays there
        again = send_to_device(found, torch.device("meta"), non_blocking=non_blocking)
    assert not copies.seen and all(a is b for a, b in zip(again.tensors(), found.tensors(), strict=True))


def test_a_pinned_batch_is_sent_from_where_it_is(monkeypatch, unpinned):
    to(monkeypatch, "meta")
    batch = batch_of("packed").pin_memory()
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: True)
    monkeypatch.setattr(transfer, "_filled", None)
    with Copies() as copies:
        found = batch.to("meta", non_blocking=True)
    assert copies.seen == {("_to_copy", True): 1}
    assert [x.storage_offset() for x in found.tensors()] == [x.storage_offset() for x in batch.tensors()]
    others = PreferenceBatch({**batch, "more": torch.ones(2)})
    with pytest.raises(TypeError):  # one that lies elsewhere: all are put together anew
        others.to("meta", non_blocking=True)
    with pytest.raises(TypeError):  # and where the host may go on writing
        batch.to("meta")


def test_of_a_batch_that_is_there_in_part_the_rest_is_sent(monkeypatch, unpinned):
    to(monkeypatch, "meta")
    there = torch.ones(1, device="meta")
    batch = PreferenceBatch(a=torch.ones(3), b=there, c=torch.ones(2, 5, dtype=torch.int64)[:, 1:], n=3)
    with Copies() as copies:
        found = batch.to("meta")
    assert copies.seen == {("_to_copy", True): 1} and found.n == 3
    assert found.b is there and found.c.shape == (2, 4) and found.c.device.type == "meta"


def test_elsewhere_nothing_is_put_together(monkeypatch):
    monkeypatch.setattr(transfer, "_filled", None)
    batch = batch_of("packed")
    there, here = batch.to("meta"), batch.to("cpu")
    assert there.layout.index.device.type == "meta" and there.host_lengths == batch.host_lengths
    assert all(a is b for a, b in zip(here.tensors(), batch.tensors(), strict=True))


def test_what_arrives_is_as_apart_as_it_was(monkeypatch, unpinned):
    """One buffer, but a field that is written to is not noted on the others; what is more than bytes goes by itself."""
    to(monkeypatch, "cpu")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    sent = batch_of("padded")
    sent["sparse"], sent["leaf"] = torch.eye(2).to_sparse(), torch.ones(2, requires_grad=True)
    sent["inner"] = batch_of("packed")
    arrived = sent.to("cpu")
    weight = torch.ones(1000, 3, requires_grad=True)
    summed = weight[arrived.input_ids].sum()
    arrived.lengths.clamp_(min=1)
    summed.backward()
    assert arrived.leaf.requires_grad and torch.equal(arrived.sparse.to_dense(), torch.eye(2))
    assert sent.pin_memory().leaf.requires_grad
    assert sent.to("meta")["inner"].input_ids.device.type == "meta"
