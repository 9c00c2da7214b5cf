"""What each op does with numbers that are none, and with modes of autograd that it has no mathematics for."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from dpo_fast import (
    linear_preference_loss,
    linear_token_logps,
    linear_token_stats,
    logits_token_logps,
    logits_token_stats,
    sequence_logps,
)

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = (torch.randn(n, 8, generator=GENERATOR) for n in (6, 50))
LABELS, IDS = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([0, 0, 1, 2, 3, 3])
REFERENCE = torch.tensor([-9.0, -4.0, -5.0, -8.0])


def level_3(x, weight=WEIGHT, **knobs):
    return linear_preference_loss(x, weight, LABELS, IDS, 2, reference_logps=REFERENCE, **knobs).loss


OPS = {
    "logits_token_logps": lambda x, **knobs: logits_token_logps(x @ WEIGHT.T, LABELS, **knobs).sum(),
    "logits_token_stats": lambda x, **knobs: logits_token_stats(x @ WEIGHT.T, LABELS, **knobs).logps.sum(),
    "linear_token_logps": lambda x, **knobs: linear_token_logps(x, WEIGHT, LABELS, **knobs).sum(),
    "linear_token_stats": lambda x, **knobs: linear_token_stats(x, WEIGHT, LABELS, **knobs).logps.sum(),
    "linear_preference_loss": level_3,
}
TRAINED = {  # with a head that trains: other plans
    "linear_token_logps, trained": lambda x: linear_token_logps(x, WEIGHT.clone().requires_grad_(), LABELS).sum(),
    "linear_preference_loss, trained": lambda x: level_3(x, WEIGHT.clone().requires_grad_()),
}
KNOBS = {name: ("temperature", "logit_softcap", *(["logit_scale"] if "linear" in name else [])) for name in OPS}
CASES = [(name, knob) for name, knobs in KNOBS.items() for knob in knobs]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("name, knob", CASES)
def test_a_tensor_as_a_number_is_refused_by_name(name, knob, impl):
    """It would get no gradient: a learned one, one per token, and a constant, for which there is `.item()`."""
    for value in (torch.nn.Parameter(torch.tensor(0.7)), torch.full((6,), 0.7), torch.tensor(0.7)):
        with pytest.raises(TypeError, match=rf"{name}: {knob} must be a number, got a tensor.*{knob}\.item\(\)"):
            OPS[name](HIDDEN, impl=impl, **{knob: value})


@pytest.mark.parametrize("value", ["1", True, 1j, [1.0]], ids=str)
@pytest.mark.parametrize("name, knob", CASES)
def test_what_is_no_number_is_refused_by_name(name, knob, value):
    with pytest.raises(TypeError, match=f"{name}: {knob} must be a number, got"):
        OPS[name](HIDDEN, **{knob: value})


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name, knob", CASES)
def test_what_is_not_finite_is_refused_by_name(name, knob, value):
    with pytest.raises(ValueError, match=f"{name}: {knob} must be"):
        OPS[name](HIDDEN, **{knob: value})


@pytest.mark.parametrize("name, knob", CASES)
def test_numpy_s_numbers_are_numbers(name, knob):
    numpy = pytest.importorskip("numpy")
    expected = OPS[name](HIDDEN, **{knob: 2.0})
    for kind in (numpy.float32, numpy.float64, numpy.int64, int):
        assert torch.equal(OPS[name](HIDDEN, **{knob: kind(2)}), expected)
    if "linear" in name:
        OPS[name](HIDDEN, tile_mib=numpy.int64(3))
    assert torch.equal(OPS[name](HIDDEN, ignore_index=numpy.int64(-100)), OPS[name](HIDDEN))


@pytest.mark.parametrize("value", [None, 1.5, "-100", 2**70, True], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_an_ignore_index_is_an_int(name, value):
    with pytest.raises(TypeError, match=f"{name}: ignore_index must be an int of 64 bits, got"):
        OPS[name](HIDDEN, ignore_index=value)


def penalty(f):
    x = HIDDEN.clone().requires_grad_()
    value = f(x)
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    (value + gradient.square().sum()).backward()
    return x.grad


def penalty_of_a_scaled_loss(f):
    scale = torch.tensor(2.0, requires_grad=True)
    return penalty(lambda x: scale * f(x))


def hessian(f):
    return torch.autograd.functional.hessian(f, HIDDEN)


def forward_mode(f):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(HIDDEN, torch.ones_like(HIDDEN)))


def jvp(f):
    return torch.func.jvp(f, (HIDDEN,), (torch.ones_like(HIDDEN),))


def functional_gradient(f):
    return torch.func.grad(f)(HIDDEN)


MODES = [penalty, penalty_of_a_scaled_loss, hessian, forward_mode, jvp, functional_gradient]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("name", [*OPS, *TRAINED])
def test_modes_of_autograd_that_are_not_there_raise(name, mode):
    """None gives zeros, or the gradient without the penalty."""
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        mode({**OPS, **TRAINED}[name])
    if mode in (penalty, penalty_of_a_scaled_loss, hessian):
        assert "its gradient has no derivative" in str(caught.value)
    if mode is forward_mode:
        assert "there is no forward-mode derivative" in str(caught.value) or "jvp" in str(caught.value)


@pytest.mark.parametrize("name", OPS)
def test_the_oracle_has_second_derivatives(name):
    found = penalty(lambda x: OPS[name](x, impl="reference"))
    assert not torch.equal(found, torch.autograd.grad(OPS[name](x := HIDDEN.clone().requires_grad_()), x)[0])


def test_sums_of_sequences_have_second_derivatives():
    def squares(x):
        return sequence_logps(x.square().sum(1), IDS, 4).square().sum()

    def plain(x):
        return torch.zeros(4).index_add(0, IDS, x.square().sum(1)).square().sum()

    torch.testing.assert_close(penalty(squares), penalty(plain))
    with pytest.raises(NotImplementedError, match="token_logps has a tangent"):
        forward_mode(squares)


@pytest.mark.parametrize("name", OPS)
def test_vmap_gives_what_a_loop_gives(name):
    two = torch.stack([HIDDEN, -HIDDEN])
    torch.testing.assert_close(torch.func.vmap(OPS[name])(two), torch.stack([OPS[name](x) for x in two]))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPS)
def test_a_compiled_op_follows_its_knobs(name):
    """Beyond the first value, which a graph may take for a constant, and the second, which opens it."""
    torch.compiler.reset()
    compiled = torch.compile(lambda x, **knobs: OPS[name](x, **knobs), fullgraph=True, backend="aot_eager")
    for temperature, softcap in ((1.0, None), (0.7, None), (0.9, 3.0), (0.8, 4.0), (1.3, None), (1.1, 5.0)):
        knobs = dict(temperature=temperature, logit_softcap=softcap)
        torch.testing.assert_close(compiled(HIDDEN, **knobs), OPS[name](HIDDEN, **knobs))
    if name == "linear_preference_loss":
        for beta in (0.1, 0.2, 0.5, 0.7):
            torch.testing.assert_close(compiled(HIDDEN, beta=beta), OPS[name](HIDDEN, beta=beta))
