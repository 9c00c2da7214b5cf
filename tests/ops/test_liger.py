"""Liger's forward for Hopper as a candidate for plan `score`: a stand-in with its interface, as it cannot run here."""

import sys
from types import ModuleType

import pytest
import torch
from no_sync import no_sync

from dpo_fast import linear_token_logps, linear_token_stats
from dpo_fast.ops import dispatch, liger
from dpo_fast.ops.call import Call, Head
from dpo_fast.ops.softmax import Transform
from dpo_fast.testing import make_generator

N, H, V = 9, 64, 77


@pytest.fixture
def calls(monkeypatch):
    """What Liger's function was called with, on a machine that has it, with the check of labels left out."""
    seen = []

    def forward(_input, weight, target, temperature=1.0, ignore_index=-100):
        """As liger-kernel 0.8.5 has it: (nll, entropy, lse, and both operands padded)."""
        assert _input.dtype == weight.dtype == torch.bfloat16 and target.dtype == torch.int64
        scored = target != ignore_index
        assert _input.shape[1] % 64 == 0 and temperature > 0
        logits = (_input.float() @ weight.float().T).half().float() / temperature
        lse = logits.logsumexp(1)
        nll = lse - logits.gather(1, target.masked_fill(~scored, 0)[:, None])[:, 0]
        seen.append(target)
        return nll.where(scored, 0), None, lse, _input, weight, _input.shape[1]

    module = ModuleType("liger_kernel.ops.cutedsl.ops")
    module.fused_scaled_cross_entropy_forward = forward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(liger, "reasons_against_machine", lambda device: [])
    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    monkeypatch.setenv(liger.SWITCH, "1")
    return seen


def make(dtype=torch.bfloat16):
    generator = make_generator()
    hidden, weight = torch.randn(N, H, generator=generator), torch.randn(V, H, generator=generator) / 4
    labels = torch.randint(V, (N,), generator=generator)
    labels[2], labels[4], labels[5] = -7, V, -1  # ignored, and two out of range
    return hidden.to(dtype), weight.to(dtype), labels


@pytest.mark.parametrize("autocast", [False, True])
def test_it_returns_what_the_plan_does(calls, autocast):
    hidden, weight, labels = make(torch.float32 if autocast else torch.bfloat16)
    knobs = dict(ignore_index=-7, logit_scale=0.5, temperature=1.3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), no_sync():
        found = linear_token_logps(hidden, weight, labels, impl="triton", **knobs)
    assert len(calls) == 1 and calls[0].tolist()[4:6] == [-100, -100]
    assert found[2] == 0 and not found[2].signbit() and found[[4, 5]].isnan().all()
    inside = [0, 1, 3, 6, 7, 8]
    rounded = hidden.bfloat16().double()[inside], weight.bfloat16().double(), labels[inside]
    true = linear_token_logps(*rounded, impl="reference", **knobs)
    largest = (rounded[0] @ rounded[1].T * 0.5 / 1.3).abs().max()
    assert (found[inside] - true).abs().max() <= 2 * 2**-11 * largest + 1e-4  # two logits, rounded to fp16


def test_it_scores_nothing_unless_it_is_asked_for(calls, monkeypatch):
    hidden, weight, labels = make()
    linear_token_logps(hidden.requires_grad_(), weight, labels.clamp(0), impl="triton")  # another plan
    monkeypatch.setenv(liger.SWITCH, "0")
    linear_token_logps(hidden.detach(), weight, labels.clamp(0), impl="triton")
    assert not calls


def test_what_it_lacks_is_said_in_one_error(calls):
    hidden, weight, labels = make()
    arguments = dict(bias=weight[:, 0], low_rank=(hidden[:, :2], weight[:, :2]), logit_softcap=30.0, logit_scale=-1.0)
    with pytest.raises(ValueError) as error:
        linear_token_stats(
            hidden.float()[:, :63], weight.float()[:, :63], labels, outputs=["entropy"], impl="torch", **arguments
        )
    for reason in (
        "linear_token_logps: DPO_FAST_FUSED_SCORE=1 cannot run: ",
        "impl is 'torch', not 'triton'",
        "it takes bfloat16, not float32",
        "it has no bias",
        "it has no low-rank update",
        "it has no soft-cap",
        "it takes logits with a positive scale, not -1.0",
        "it has no entropy in fp32",
        "it would pad a width that is no multiple of 64",
        "it would copy a weight that is not contiguous",
    ):
        assert reason in str(error.value), reason
    assert not calls


def test_each_reason_stands_for_itself(calls):
    hidden, weight, labels = make()
    head = Head.make("test", hidden, weight, None, None, labels)
    fits = Call(Transform(), -100, (), "triton", "score", None, torch.bfloat16)
    assert liger.reasons_against(fits, head) == []
    assert len(liger.reasons_against(fits, head._replace(bias=weight[:, 0]))) == 1


def test_a_machine_without_it_is_told_why(monkeypatch):
    monkeypatch.delenv(liger.VALIDATION, raising=False)
    reasons = liger.reasons_against_machine(torch.device("cpu"))
    assert any("compute capability 9.0, the tensors are on 'cpu'" in reason for reason in reasons)
    assert any(f"{liger.VALIDATION}=0 is not set" in reason for reason in reasons)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [r for r in liger.reasons_against_machine(torch.device("cpu")) if "not installed" in r] == [
        "the package liger-kernel is not installed",
        "the package nvidia-cutlass-dsl is not installed",
    ]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for version, old in (("0.8.4", True), ("0.8.5", False), ("0.10.0.dev1", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert any("no such forward" in r for r in liger.reasons_against_machine(torch.device("cpu"))) is old
    monkeypatch.setenv(liger.SWITCH, "1")
    with pytest.raises(ValueError, match="DPO_FAST_FUSED_SCORE=1 cannot run: .*compute capability"):
        linear_token_logps(*make()[:2], torch.zeros(N, dtype=torch.int64))
