"""`dpo-fast env` and `dpo-fast selftest` as a user sees them."""

import re

import pytest
import torch

import dpo_fast.kernels.token_logps  # noqa: F401, before a test takes away the switch that triton reads then
from dpo_fast import env, selftest
from dpo_fast.ops.roofline import DEVICES


def test_env_says_what_runs_and_why_not_the_rest(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("DPO_FAST_IMPL", raising=False)
    assert env.main(["--N", "1024", "--H", "1024", "--V", "32000", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in out
    if not torch.accelerator.is_available():
        assert "level 3, linear_preference_loss: torch" in out
        assert "triton: not here: the tensors are on 'cpu', Triton needs one of cuda, xpu" in out
        assert "attention over shared prefixes (bfloat16, heads of 128): eager" in out and "varlen: not here: " in out
    for plan, gemms in (("score", 1), ("frozen", 2), ("pairwise", 3), ("recompute", 4)):
        assert f"{plan}: {gemms} GEMMs" in out


def test_env_plans_for_a_device_that_is_not_here(capsys):
    for name in ("h100", "h200"):
        assert env.main(["--device", name, "--V", "131072"]) == 0
        out = capsys.readouterr().out
        device = DEVICES[name]
        assert re.search(
            rf"trained head: pairwise: 3 GEMMs, 26.4 TFLOP, [0-9.]+ ms predicted, tiles of .* on|{device.name}", out
        )
        for model in env.MODELS:
            cells = re.search(rf"    {model} +[0-9,]+ +[0-9,]+((?: +[0-9.]+ / [0-9.]+){{5}}) +([0-9,]+)$", out, re.M)
            assert cells is not None and int(cells[2].replace(",", "")) <= 4096
    assert env.main(["--device", "h100", "--N", "4", "--V", "20000000"]) == 0
    assert "trained head: not here: the head for N=4 tokens" in capsys.readouterr().out


@pytest.mark.thorough
def test_selftest_passes_and_fails(capsys, monkeypatch):
    assert selftest.main([]) == 0
    out = capsys.readouterr().out
    assert "all passed" in out and "triton, bfloat16" in out
    monkeypatch.setattr(selftest, "CHECKS", {"values": selftest.check_logits})

    monkeypatch.setattr("dpo_fast.ops.softmax.Transform.stretch_", lambda _, t: t.mul_(1.001))
    assert selftest.main([]) == 1
    assert re.search("FAIL: values: .* out of bounds", capsys.readouterr().out)


@pytest.mark.parametrize("command", [env.main, selftest.main])
def test_unknown_options_are_refused(command, capsys):
    with pytest.raises(SystemExit):
        command(["--nothing"])
