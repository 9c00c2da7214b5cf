"""Which implementation runs on a device, and why others cannot."""

import pytest
import torch

from dpo_fast.ops import dispatch

CUDA = torch.device("cuda")


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "torch"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_a_gpu_that_is_too_old_for_triton(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.delenv("DPO_FAST_IMPL", raising=False)
    assert dispatch.choose_impl("op", "auto", CUDA) == chosen
    reasons = dispatch.reasons_against("triton", CUDA)
    assert reasons == ([] if chosen == "triton" else ["Triton needs compute capability 8.0, this GPU has 7.5"])
    if reasons:
        with pytest.raises(ValueError, match="op: impl='triton' cannot run: Triton needs compute capability 8.0"):
            dispatch.choose_impl("op", "triton", CUDA)


def test_without_a_gpu_to_ask_its_code_can_be_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dispatch.reasons_against("triton", CUDA) == []
