"""The mode by which other tests prove that nothing waits: it sees each kind of read."""

import pytest
import torch
from no_sync import Sync, no_sync

from dpo_fast import linear_token_logps

x, mask, ids = torch.arange(6.0), torch.arange(6) > 2, torch.tensor([0, 2, 2])
READS = {
    "item": lambda: x.sum().item(),
    "float": lambda: float(x[0]),
    "int": lambda: int(ids[0]),
    "if": lambda: 1 if mask.any() else 0,
    "index": lambda: [1, 2, 3][ids[0]],
    "tolist": lambda: ids.tolist(),
    "numpy": lambda: ids.numpy(),
    "cpu": lambda: x.cpu(),
    "nonzero": lambda: mask.nonzero(),
    "where": lambda: torch.where(mask),
    "masked_select": lambda: x.masked_select(mask),
    "mask as index": lambda: x[mask],
    "mask and index": lambda: torch.stack([x, x])[torch.tensor([0, 1, 1]), mask],
    "assignment by mask": lambda: x.clone().__setitem__(mask, x[:3]),
    "unique": lambda: ids.unique(),
    "unique_consecutive": lambda: ids.unique_consecutive(),
    "bincount": lambda: ids.bincount(minlength=9),
    "equal": lambda: torch.equal(x, x),
    "allclose": lambda: torch.allclose(x, x),
    "in": lambda: 2 in ids,
    "repeat_interleave": lambda: x[:3].repeat_interleave(ids),
    "one_hot": lambda: torch.nn.functional.one_hot(ids),
}
FREE = {
    "arithmetic": lambda: (x * 2 + 1).softmax(0),
    "where": lambda: torch.where(mask, x, 0),
    "a scalar by mask": lambda: x.clone().__setitem__(mask, 0.0),
    "gather": lambda: x[ids],
    "scatter": lambda: x.clone().index_add_(0, ids, x[:3]),
    "repeat_interleave": lambda: x[:3].repeat_interleave(ids, output_size=4),
    "sort": lambda: ids.argsort(stable=True),
    "sizes": lambda: (len(x), x.shape, x.stride(), x.data_ptr()),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_is_refused(read):
    with no_sync(), pytest.raises(Sync, match="wait for the device"):
        READS[read]()
    with no_sync() as stream, stream.paused():
        READS[read]()
    assert not stream.kernels
    with no_sync("cuda"):
        READS[read]()  # of the host's own


@pytest.mark.parametrize("work", FREE)
def test_work_is_none(work):
    with no_sync():
        FREE[work]()


def test_kernels_are_counted_also_in_registered_operators_and_backwards():
    with no_sync() as stream:
        y = x.clone().requires_grad_()
        (y.view(2, 3).square() + 1).sum().backward()
    assert stream.kernels["clone"] == 1 and stream.kernels["pow"] == 2 and stream.kernels["view"] == 0
    with no_sync() as stream:
        torch.ops.dpo_fast.linear_token_logps_scale(x.view(2, 3), torch.ones(2), torch.bfloat16)
    assert stream.kernels == {"ones": 1, "mul": 1}
    with no_sync(), pytest.raises(Sync):  # on a host, labels are looked at
        linear_token_logps(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 2]))


def test_copies_that_block():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        there, here = torch.empty(3, device="cuda"), torch.empty(3)
        copy_ = torch.ops.aten.copy_  # the method wants a build for CUDA
        copies = [lambda: there.to("cpu"), lambda: there.cpu(), lambda: here.to("cuda:0"), lambda: copy_(there, here)]
        for copy in copies:
            with no_sync("cuda"), pytest.raises(Sync, match="a copy that blocks"):
                copy()
        with no_sync("cuda") as stream:
            there.to("cpu", non_blocking=True), here.to("cuda:0", non_blocking=True)
            copy_(there, here, non_blocking=True), there.to(torch.bfloat16)
        assert stream.kernels == {"_to_copy": 2, "copy_": 1}
