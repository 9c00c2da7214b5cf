"""Each loss against hand-computed numbers, at extremes, on parts of a batch, and by gradcheck."""

import math

import pytest
import torch
from loss_cases import SMOOTHING, make_pairs, objective

from dpo_fast import LOSSES, PairLogps, preference_loss
from dpo_fast.logps import pair_logps
from dpo_fast.losses import F_DIVERGENCES, log1mexp


def s(x):
    return 1 / (1 + math.exp(-x))


# policy -10, -12, reference -11, -11.5: c = 1, r = -0.5, margin 1.5; lengths 4 and 5; beta 0.1 unless said
HAND = {
    "sigmoid": -math.log(s(0.15)),
    "hinge": 1 - 0.15,
    "ipo": (1 / 4 + 0.5 / 5 - 5) ** 2,
    "exo_pair": s(0.15) * math.log(s(0.15) / 0.999) + s(-0.15) * math.log(s(-0.15) / 0.001),
    "nca_pair": -math.log(s(0.1)) - (math.log(s(-0.1)) + math.log(s(0.05))) / 2,
    "robust": (-0.9 * math.log(s(0.15)) + 0.1 * math.log(s(-0.15))) / 0.8,
    "bco_pair": -math.log(s(0.1)) - math.log(s(0.05)),
    "sppo_hard": (1 - 5) ** 2 + (-0.5 + 5) ** 2,
    "aot": -math.log(s(0.15)),
    "aot_unpaired": -math.log(s(0.15)),
    "apo_zero": s(-0.1) + s(-0.05),
    "apo_down": s(0.1) + s(-0.15),
    "discopop": s(-3) * -math.log(s(0.15)) + s(3) * math.exp(-0.15),
    "sft": 10 / 4,
    "sigmoid_norm": -math.log(s(0.1 * (1 / 4 + 0.5 / 5))),
    "simpo": -math.log(s(0.1 * (-10 / 4 + 12 / 5) - 0.5)),
    "cpo": -math.log(s(0.1 * 2)) + 10 / 4,
    "orpo": 10 / 4 - 0.1 * math.log(s((-2.5 + 2.4) - (math.log(1 - math.exp(-2.5)) - math.log(1 - math.exp(-2.4))))),
}


def test_every_loss_has_a_hand_computed_number_and_a_source():
    assert set(HAND) == set(LOSSES)
    for name, function in LOSSES.items():
        assert name == "sft" or "arXiv:" in function.__doc__, f"{name} cites no paper"


@pytest.mark.parametrize("name", LOSSES)
def test_hand_computed(name):
    one = [torch.tensor([x], dtype=torch.float64) for x in (-10, -12, -11, -11.5)]
    lengths = dict(chosen_lengths=torch.tensor([4]), rejected_lengths=torch.tensor([5]))
    value = preference_loss(*one, loss=name, label_smoothing=SMOOTHING.get(name, 0.0), **lengths)
    assert value.shape == (1,) and value.item() == pytest.approx(HAND[name], rel=1e-12)


def test_step_zero_is_ln_2():
    logps = torch.tensor([-123.456, -7.0])
    loss = preference_loss(logps, logps - 1, logps, logps - 1, reduction="mean")
    assert abs(loss.item() - math.log(2)) < 1e-6


VALID = [(name, d) for name in LOSSES for d in F_DIVERGENCES if d == "reverse_kl" or LOSSES[name].f_divergence]


@pytest.mark.parametrize("name, divergence", VALID)
def test_gradcheck(name, divergence):
    pairs = make_pairs(dtype=torch.float64)
    loss = objective(name, f_divergence_type=divergence)

    def run(chosen, rejected):
        return loss(PairLogps(chosen, rejected, pairs.ref_chosen, pairs.ref_rejected, *_lengths(pairs)))

    inputs = (pairs.chosen.clone().requires_grad_(), pairs.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs)


def _lengths(pairs):
    return pairs.chosen_lengths, pairs.rejected_lengths


@pytest.mark.parametrize("name, divergence", VALID)
@pytest.mark.parametrize("sign", [(1, -1), (-1, 1), (1, 1), (-1, -1)], ids=str)
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_large_log_ratios_stay_finite(name, divergence, sign, size):
    """exp(1e4) overflows at once, exp(50) where it is squared or multiplied by another."""
    loss, gradients = at_extremes(name, divergence, sign, size, torch.float32)
    assert torch.isfinite(loss).all(), loss
    assert all(torch.isfinite(gradient).all() for gradient in gradients), gradients


def test_discopop_stays_finite_where_nothing_modulates():
    """With a large tau both factors are there, and the exponential is on its own."""
    loss, gradients = at_extremes("discopop", "reverse_kl", (-1, 1), 1e4, torch.float32, discopop_tau=100.0)
    assert torch.isfinite(loss).all() and all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sign", [(1, -1), (-1, 1), (1, 1), (-1, -1)], ids=str)
def test_large_log_ratios_are_right(name, sign):
    """Where nothing is clamped, fp32 agrees with fp64."""
    loss, gradients = at_extremes(name, "reverse_kl", sign, 1e4, torch.float32)
    truth, true = at_extremes(name, "reverse_kl", sign, 1e4, torch.float64)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, true, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name, divergence", VALID)
@pytest.mark.parametrize("sign", [(1, -1), (-1, 1), (1, 1), (-1, -1)], ids=str)
def test_slopes_keep_their_digits_where_a_loss_is_flat(name, divergence, sign):
    """1 - s(x) has one digit left in fp32 at x = 15, and expm1(-x) + 1 has no more."""
    knobs = dict(beta=1.0, discopop_tau=1.0, f_alpha_divergence_coef=-1.0)
    _, gradients = at_extremes(name, divergence, sign, 7.5, torch.float32, **knobs)
    _, true = at_extremes(name, divergence, sign, 7.5, torch.float64, **knobs)
    for ours, theirs in zip(gradients, true, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2.0**-126)


def at_extremes(name, divergence, sign, size, dtype, **knobs):
    reference = torch.full((2,), -size - 50, dtype=dtype)
    chosen = (reference + size * sign[0]).requires_grad_()
    rejected = (reference + size * sign[1]).requires_grad_()
    lengths = torch.tensor([3, 3])
    loss = objective(name, f_divergence_type=divergence, **knobs)(
        PairLogps(chosen, rejected, reference, reference, lengths, lengths)
    )
    return loss, torch.autograd.grad(loss.sum(), (chosen, rejected), materialize_grads=True)


@pytest.mark.parametrize("name, divergence", VALID)
@pytest.mark.parametrize("impossible", ["chosen", "rejected"])
def test_impossible_completions(name, divergence, impossible):
    """A log-prob of -inf: what a very small one tends to, and no NaN; the same for log-ratios summed by token."""
    loss, gradients = {}, {}
    for log_prob in (-torch.inf, -1e7):
        for exact in (False, True):
            x = {"chosen": torch.full((2,), -5.0), "rejected": torch.full((2,), -6.0)}
            x[impossible] = torch.full((2,), log_prob)
            leaves = [v.requires_grad_() for v in x.values()]
            reference, lengths = torch.full((2,), -5.5), torch.tensor([3, 3])
            ratios = tuple(v.detach() - reference for v in leaves) if exact else None
            pairs = PairLogps(*leaves, reference, reference, lengths, lengths, None, ratios)
            value = objective(name, f_divergence_type=divergence)(pairs)
            gradients[log_prob, exact] = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
            loss[log_prob, exact] = value.detach()
    assert torch.equal(loss[-torch.inf, False], loss[-torch.inf, True])
    for d, d_exact in zip(gradients[-torch.inf, False], gradients[-torch.inf, True], strict=True):
        assert torch.equal(d, d_exact) and not d.isnan().any()
    limit, near = loss[-torch.inf, False], loss[-1e7, False]
    torch.testing.assert_close(limit.clamp(-1e5, 1e5), near.clamp(-1e5, 1e5), rtol=1e-5, atol=1e-5)


def test_probability_one_is_finite_in_orpo():
    ones = torch.zeros(2, requires_grad=True)
    lengths = torch.tensor([3, 3])
    loss = objective("orpo")(PairLogps(ones, ones - torch.tensor([0.0, 50.0]), None, None, lengths, lengths))
    (gradient,) = torch.autograd.grad(loss.sum(), ones)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
    x = torch.tensor([-1e-3, -0.5, -1.0, -50.0], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), torch.log(1 - torch.exp(x)))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.couples_pairs])
def test_a_separable_loss_is_the_same_on_a_part_of_the_batch(name):
    """What the fused head relies on: it sees a few pairs at a time."""
    pairs, loss = make_pairs(P=6), objective(name)
    mean_length = pairs.chosen_lengths.float().mean()
    values = [getattr(pairs, f) for f in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    whole = loss(pairs)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        lengths = (x[part] for x in _lengths(pairs))
        some = PairLogps(*(v[part] for v in values), *lengths, mean_chosen_length=mean_length)
        assert torch.equal(loss(some), whole[part])


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.couples_pairs])
def test_a_coupled_loss_is_not(name):
    pairs, loss = make_pairs(P=6, std=8.0), objective(name)
    parts = [loss(pair_logps(*(torch.cat(v) for v in _halves(pairs, part)))) for part in (slice(0, 3), slice(3, 6))]
    assert not torch.allclose(torch.cat(parts).sort().values, loss(pairs).sort().values)


def _halves(pairs, part):
    yield pairs.chosen[part], pairs.rejected[part]
    yield pairs.ref_chosen[part], pairs.ref_rejected[part]


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.likelihood])
def test_likelihood_is_a_mean_over_the_batch_s_tokens(name):
    """Empty completions count for nothing; when all are empty the term is 0, not NaN."""
    chosen, rejected = torch.tensor([-6.0, 0.0]), torch.tensor([-4.0, -2.0])
    knobs = dict(beta=1e-9)  # leaves the likelihood, and a constant in cpo
    rest = math.log(2) if name == "cpo" else 0.0
    loss = objective(name, **knobs)(PairLogps(chosen, rejected, None, None, torch.tensor([4, 0]), torch.tensor([2, 2])))
    assert loss.mean().item() == pytest.approx(6 / 4 + rest, abs=1e-6)
    empty = torch.zeros(2, dtype=torch.int64)
    loss = objective(name, **knobs)(PairLogps(chosen * 0, rejected * 0, None, None, empty, empty))
    assert loss.mean().item() == pytest.approx(rest, abs=1e-6)
