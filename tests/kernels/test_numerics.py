"""What the kernels' arithmetic keeps: differences are taken of the logits as they are, before anything scales them."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from dpo_fast.kernels import token_logps
from dpo_fast.kernels.numerics import Knobs
from dpo_fast.ops.oracle import oracle_transform

if torch.cuda.is_available():
    pytest.skip("these look at the interpreter's arithmetic", allow_module_level=True)


@pytest.fixture
def fused(monkeypatch):
    """fma rounds once, as hardware does; the interpreter rounds twice."""

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


def forward_backward(logits, labels, knobs, d_logps):
    N, V = logits.shape
    out = {name: torch.full((N,), torch.nan) for name in ("logps", "row_max", "log_sum", "entropy", "mean_logits")}
    token_logps.token_logps_fwd(logits, (1, N, 0, V), labels, out, knobs)
    d = torch.full((N, V), torch.nan)
    saved = labels, out["row_max"], out["log_sum"], d_logps
    token_logps.token_logps_bwd(logits, d, (1, N, 0, V), (1, N, 0, V), *saved, knobs)
    return out, d


def oracle(logits, labels, knobs, d_logps):
    x = logits.double().requires_grad_()
    z = oracle_transform(x, knobs.softcap, knobs.temperature, knobs.logit_scale)
    logps = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return logps.detach(), torch.autograd.grad((logps * d_logps.double()).sum(), x)[0]


@pytest.mark.parametrize("scale, temperature", [(0.3, 0.7), (-0.3, 0.7), (1.0, 0.7), (1.0, 1.0)])
def test_a_large_maximum_costs_no_digits(fused, scale, temperature):
    """z reaches 10,000, of which half a unit in the last place is 5e-4 nats; rounding z itself would show."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 300, generator=generator) * 3 + 10_000
    labels, ones = torch.randint(300, (8,), generator=generator), torch.ones(8)
    knobs = Knobs(logit_scale=scale, temperature=temperature)
    out, d = forward_backward(logits, labels, knobs, ones)
    logps, d_true = oracle(logits, labels, knobs, ones)
    assert (out["logps"] - logps).abs().max() < 2e-6
    assert (d - d_true).abs().max() < 2e-6 * abs(scale) / temperature


@pytest.mark.parametrize("softcap", [None, 5.0, 30.0])
@pytest.mark.parametrize("scale", [1.0, -0.7])
def test_extreme_logits(softcap, scale):
    """A soft-cap makes numbers of infinities; without one the largest takes all, and a row without any has none."""
    least = torch.inf if scale < 0 else -torch.inf  # of the largest z
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    logits[0, :9], logits[1, 3], logits[1, 5] = least, 1e30, -1e30
    logits[2, 3] = -least if softcap else logits[2, 3]
    logits[3] = least
    labels, ones = torch.tensor([20, 3 if scale > 0 else 5, 3, 0]), torch.ones(4)
    knobs = Knobs(logit_scale=scale, softcap=softcap)
    out, d = forward_backward(logits, labels, knobs, ones)
    if softcap is None:
        assert out["logps"][3] == -torch.inf and d[3].tolist() == pytest.approx([scale] + [0.0] * 69)
        logits, labels, ones, d = logits[:3], labels[:3], ones[:3], d[:3]
    logps, d_true = oracle(logits, labels, knobs, ones)
    torch.testing.assert_close(out["logps"][: len(logps)], logps.float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(d, d_true.nan_to_num(0.0).float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale, softcap", [(1.0, 30.0), (-2.0, 30.0), (1.0, 50.0), (0.125, 1.0), (0.0, 5.0)])
def test_the_two_terms_of_a_factor(scale, softcap):
    first, rest = Knobs(logit_scale=scale, softcap=softcap).factor
    assert np.float32(first) == first and first * rest >= 0 and (rest != 0) == (scale != 0)
    assert abs(first + float(np.float32(rest)) - scale / softcap) <= 2**-46 * abs(scale / softcap)


@pytest.mark.parametrize(
    "knobs", [dict(logit_scale=0.0), dict(logit_scale=1e-30, temperature=1e30), dict(softcap=1e-20, temperature=1e30)]
)
def test_a_slope_of_zero_is_a_uniform_softmax(knobs):
    """Of a vocabulary that leaves a part of the last step empty."""
    logits = torch.randn(2, 6)
    out, d_logits = forward_backward(logits, torch.tensor([1, 2]), Knobs(**knobs), torch.ones(2))
    assert torch.allclose(out["logps"], torch.full((2,), 1 / 6).log())
    assert d_logits.abs().max() < 1e-30
