"""Each loss, divergence, weighting and combination against TRL 1.16's own code, and where TRL is wrong."""

import math
from types import SimpleNamespace

import pytest
import torch
from loss_cases import SMOOTHING, make_pairs, objective
from trl_loss import make_tokens, our_loss, trl_loss

from dpo_fast import LOSSES
from dpo_fast.losses import F_DIVERGENCES
from dpo_fast.objective import Objective

SHARED = [name for name in LOSSES if name not in ("simpo", "orpo", "cpo")]


def assert_alike(names, **knobs):
    theirs, their_gradient, _ = trl_loss(names, **knobs)
    ours, our_gradient, *_ = our_loss(names, **knobs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("seed, scale", [(3, 3.0), (4, 12.0)])
def test_losses(name, beta, seed, scale):
    tokens = make_tokens(seed=seed, scale=scale)
    assert_alike([name], tokens=tokens, beta=beta, label_smoothing=SMOOTHING.get(name, 0.0))


@pytest.mark.parametrize("name", ["exo_pair", "robust", "aot", "aot_unpaired"])
def test_label_smoothing(name):
    assert_alike([name], label_smoothing=0.2)


@pytest.mark.parametrize("name", [name for name in SHARED if LOSSES[name].f_divergence])
@pytest.mark.parametrize(
    "divergence", [dict(f_divergence_type=d) for d in F_DIVERGENCES]
    + [dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=a) for a in (-0.5, 1.0, 2.0)], ids=str
)  # fmt: skip
def test_divergences(name, divergence):
    assert_alike([name], label_smoothing=SMOOTHING.get(name, 0.0), **divergence)


def test_divergences_fit_the_same_losses():
    """TRL's list is local to `DPOTrainer.__init__`."""
    theirs = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
    assert {name for name, loss in LOSSES.items() if loss.f_divergence} == theirs


@pytest.mark.parametrize("knobs", [dict(ld_alpha=0.3), dict(ld_alpha=0.0), dict(use_weighting=True)], ids=str)
@pytest.mark.parametrize("name", [name for name in SHARED if name != "sft"])
def test_weightings(name, knobs):
    if "use_weighting" in knobs and (LOSSES[name].couples_pairs or name == "hinge"):
        return  # refused by both; hinge: see below
    assert_alike([name], label_smoothing=SMOOTHING.get(name, 0.0), **knobs)


@pytest.mark.parametrize("knobs", [{}, dict(use_weighting=True, loss_weights=[0.5, 2.0, 0.0])], ids=str)
def test_combinations(knobs):
    assert_alike(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])
    assert_alike(["sigmoid", "bco_pair", "ipo"], **knobs)


def test_reference_free_losses():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer.cpo_loss
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer.odds_ratio_loss
    pairs = make_pairs()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    knobs = SimpleNamespace(
        alpha=0.0, beta=0.3, simpo_gamma=0.5, label_smoothing=0.1, loss_type="simpo", accelerator=accelerator
    )
    averages = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    simpo = objective("simpo", beta=0.3, label_smoothing=0.1)
    theirs, *rewards = cpo(knobs, *averages)
    torch.testing.assert_close(simpo(pairs), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(simpo.rewards(without_reference(pairs)), tuple(rewards))
    knobs.loss_type = "sigmoid"
    ours = objective("cpo", beta=0.3, label_smoothing=0.1, cpo_alpha=0.0)(pairs)
    theirs, *rewards = cpo(knobs, pairs.chosen, pairs.rejected)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective("cpo", beta=0.3).rewards(without_reference(pairs)), tuple(rewards))
    theirs, *rewards = orpo(knobs, *averages)[:3]
    ours = objective("orpo", beta=0.3)(pairs) - objective("sft")(pairs)
    torch.testing.assert_close(ours, -theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(objective("orpo", beta=0.3).rewards(without_reference(pairs)), tuple(rewards))


def without_reference(pairs):
    return type(pairs)(pairs.chosen, pairs.rejected, None, None, pairs.chosen_lengths, pairs.rejected_lengths)


# --- where TRL is wrong --------------------------------------------------------------------------------------------


def far_apart():
    """Tokens whose log-ratios are in the hundreds: chosen of half the pairs less likely than under the reference."""
    (logps, reference, sum_sq), mask = make_tokens()
    shift = torch.tensor([100.0, -100.0] * 4)[:, None]
    return [logps, reference + shift * (reference != 0), sum_sq], mask


@pytest.mark.parametrize("name, knobs", [("sigmoid", dict(f_divergence_type="forward_kl")), ("discopop", {})])
def test_trl_overflows(name, knobs):
    """Its exp has no bound in forward_kl, and in discopop it meets a factor that is 0: inf and NaN."""
    theirs, their_gradient, _ = trl_loss([name], tokens=far_apart(), beta=1.0, **knobs)
    ours, our_gradient, *_ = our_loss([name], tokens=far_apart(), beta=1.0, **knobs)
    assert not (theirs.isfinite() and their_gradient.isfinite().all())
    assert ours.isfinite() and our_gradient.isfinite().all()


def test_trl_ignores_label_smoothing_of_sigmoid():
    assert torch.equal(trl_loss(["sigmoid"])[0], trl_loss(["sigmoid"], label_smoothing=0.2)[0])
    assert our_loss(["sigmoid"], label_smoothing=0.2)[0] > our_loss(["sigmoid"])[0]


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm"])
def test_trl_counts_a_token_that_it_does_not_score(name):
    """Without a prompt nothing predicts the first token. TRL divides by a count that includes it."""
    tokens = make_tokens(shortest_prompt=0)
    assert tokens[1][:, 0].any()
    theirs, ours = trl_loss([name], tokens=tokens)[0], our_loss([name], tokens=tokens)
    pairs, one_more = ours[2], tokens[1][:, 0].chunk(2)
    counted = [pairs.chosen_lengths + one_more[0], pairs.rejected_lengths + one_more[1]]
    as_theirs = type(pairs)(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, *counted)
    torch.testing.assert_close(ours[3](as_theirs).mean(), theirs, rtol=1e-5, atol=1e-5)
    assert not math.isclose(ours[0].item(), theirs.item(), rel_tol=1e-4)


@pytest.mark.parametrize("name, reason", [("sft", "single memory location"), ("hinge", "inplace operation")])
def test_trl_cannot_weigh_pairs_of(name, reason):
    """It multiplies in place what is an expanded scalar (sft) or what relu's backward needs (hinge)."""
    with pytest.raises(RuntimeError, match=reason):
        trl_loss([name], use_weighting=True)
    value, gradient, *_ = our_loss([name], use_weighting=True)
    assert value.isfinite() and gradient.isfinite().all()


def test_trl_leaves_token_weights_out_of_sft():
    """So does the likelihood that it adds; one sum per sequence cannot do both, and the combination is refused."""
    assert torch.equal(trl_loss(["sft"], ld_alpha=0.3)[0], trl_loss(["sft"])[0])
    with pytest.raises(ValueError, match="ld_alpha=0.3 does not fit loss sft"):
        Objective(["sigmoid", "sft"], ld_alpha=0.3)


def test_trl_runs_robust_outside_its_range():
    """At a flip rate of a half the loss is 0 / 0; TRL warns and trains on NaN. Here it is refused."""
    assert trl_loss(["robust"], label_smoothing=0.5)[0].isnan()
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        our_loss(["robust"], label_smoothing=0.5)
