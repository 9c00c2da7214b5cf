"""What kernels/tuned.py holds replaces the constants of a rule, and nothing else."""

import pytest
import torch

pytest.importorskip("triton")
from dpo_fast import logits_token_logps
from dpo_fast.kernels import token_logps, tuned
from dpo_fast.testing import make_logits


@pytest.fixture
def measured(monkeypatch):
    entry = {"device": "none", "token_logps_fwd": (64, 2), "token_logps_bwd": (256, 1)}
    monkeypatch.setitem(tuned.TUNED, "other", entry)
    monkeypatch.setitem(tuned.TUNED, "cuda:120", entry)


def test_entries_replace_the_rules_constants(measured):
    wide = {"LANES": 64, "WIDTH": 8, "ADJACENT": True, "num_warps": 2}
    assert token_logps.forward_config(4096, 2) == token_logps.forward_config(4099, 2) == wide
    assert token_logps.forward_config(4099, 2, aligned=False) == wide | {"LANES": 32, "ADJACENT": False}
    assert token_logps.backward_config(4096, "cuda:89")["BLOCK_V"] == 256, "a relative of sm_120"
    assert token_logps.backward_config(4096, "cuda:90")["BLOCK_V"] == 4096, "not measured"


def test_numbers_stay(measured):
    logits, labels = make_logits(3, 1000)
    results = []
    for impl in ("triton", "torch"):
        leaf = logits.clone().requires_grad_()
        logps = logits_token_logps(leaf, labels, impl=impl)
        results.append((logps, *torch.autograd.grad(logps.sum(), leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
