"""Objectives: what fits together, what is refused, weights of tokens and pairs; `preference_loss` on plain tensors."""

import dataclasses
import math

import pytest
import torch
from loss_cases import make_pairs, objective

from dpo_fast import LOSSES, PairLogps, preference_loss
from dpo_fast.objective import Objective, ld_dpo_token_weights, wpo_weights


def test_callables_and_weights():
    pairs = make_pairs()

    def square(pairs):
        return pairs.margin**2

    both = Objective(["sigmoid", square], weights=[1.0, 0.5])
    torch.testing.assert_close(both(pairs), objective("sigmoid")(pairs) + 0.5 * pairs.margin**2)
    assert both.names == ("sigmoid", "square") and both.couples_pairs, "what nobody knows may look at the whole batch"
    square.couples_pairs = False
    assert not Objective(["sigmoid", square]).couples_pairs
    Objective(lambda pairs: pairs.margin, use_weighting=True)
    assert torch.equal(Objective(LOSSES["ipo"])(pairs), objective("ipo")(pairs)), "a registered function, not its name"
    for wrong in (lambda pairs: pairs.margin.mean(), lambda pairs: pairs.margin[:, None]):
        with pytest.raises(ValueError, match=r"loss <lambda> must return one value per pair, \(5,\), got"):
            Objective(["sigmoid", wrong])(pairs)


def test_terms_add_up_to_the_losses():
    pairs = make_pairs()
    for weights in (None, torch.rand_like(pairs.chosen)):
        weighed = dataclasses.replace(pairs, weights=weights)
        mixed = Objective(["sigmoid", "sft", "sigmoid"], weights=[1.0, 0.5, -2.0], use_weighting=weights is not None)
        terms = mixed.terms(weighed)
        assert list(terms) == ["sigmoid", "sft"] and not any(term.requires_grad for term in terms.values())
        torch.testing.assert_close(sum(terms.values()), mixed(weighed).detach())


def test_a_function_that_shares_a_loss_s_name_is_not_that_loss():
    def robust(pairs):
        return pairs.margin**2

    pairs = make_pairs()
    assert torch.equal(Objective(robust, label_smoothing=0.7)(pairs), pairs.margin**2)


def test_rewards():
    pairs = make_pairs()
    chosen, rejected = objective("sigmoid", beta=0.5).rewards(pairs)
    torch.testing.assert_close(chosen - rejected, 0.5 * pairs.margin)
    free = PairLogps(pairs.chosen, pairs.rejected, None, None, pairs.chosen_lengths, pairs.rejected_lengths)
    assert torch.equal(objective("cpo").rewards(free)[0], 0.1 * pairs.chosen)
    assert torch.equal(objective("simpo").rewards(free)[0], 0.1 * (pairs.chosen / pairs.chosen_lengths))


@pytest.mark.parametrize("others, averages", [([], True), (["sft"], True), (["sft", "orpo"], True), (["cpo"], False)])
def test_rewards_are_those_of_the_losses_that_have_one(others, averages):
    pairs = make_pairs()
    free = PairLogps(pairs.chosen, pairs.rejected, None, None, pairs.chosen_lengths, pairs.rejected_lengths)
    for parts in (["simpo", *others], [*others, "simpo"]):
        found = Objective(parts).rewards(free)[0]
        assert torch.equal(found, 0.1 * (pairs.chosen / pairs.chosen_lengths if averages else pairs.chosen))
    assert torch.equal(Objective("sft").rewards(free)[0], 0.1 * pairs.chosen)


def test_numpy_scalars_are_numbers():
    numpy = pytest.importorskip("numpy")
    pairs = make_pairs()
    for kind in (numpy.float32, numpy.float64):
        found = Objective("sigmoid", beta=kind(0.25), label_smoothing=kind(0.5), weights=[kind(2)])(pairs)
        assert torch.equal(found, 2 * Objective("sigmoid", beta=0.25, label_smoothing=0.5)(pairs))
    with pytest.raises(ValueError, match="beta must be a finite number, got tensor"):
        Objective("sigmoid", beta=torch.tensor(0.1))


def test_what_others_know_about_losses():
    assert {n for n, f in LOSSES.items() if f.couples_pairs} == {"aot", "aot_unpaired"}
    assert {n for n, f in LOSSES.items() if not f.needs_reference} == {"simpo", "orpo", "cpo", "sft"}
    mixed = Objective(["sft", "aot"])
    assert mixed.couples_pairs and mixed.needs_reference and mixed.needs_lengths


def test_token_weights_of_interleaved_sequences():
    ids = torch.tensor([0, 2, 0, 1, 2, 2, 3, 2])  # lengths 2, 1, 4, 1: pairs (2, 4) and (1, 1)
    weights = ld_dpo_token_weights(ids, torch.bincount(ids), 0.25)
    assert weights.tolist() == [1, 1, 1, 1, 1, 0.25, 1, 0.25] and weights.dtype == torch.float32


def test_token_weights_count_scored_tokens_only():
    ids = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    scored = torch.tensor([False, True, False, True, True, True, True])  # 2 of chosen, 3 of rejected
    weights = ld_dpo_token_weights(ids, torch.tensor([2, 3]), 0.25, scored)
    assert weights[scored].tolist() == [1, 1, 1, 1, 0.25]


def test_pair_weights():
    """exp(mean(log p - log sum p^2)), of both completions together; an empty one weighs 1."""
    weights = wpo_weights(torch.tensor([-2.0, 1.0, -3.0, 0.0], requires_grad=True), torch.tensor([4, 2, 3, 0]))
    assert not weights.requires_grad
    torch.testing.assert_close(weights, torch.tensor([math.exp(-0.5 - 1), math.exp(0.5)]))
    pairs = make_pairs(P=2)
    weighted = PairLogps(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected, weights=weights)
    assert torch.equal(Objective()(weighted), Objective()(pairs) * weights)


@pytest.mark.parametrize("name", LOSSES)
def test_token_weights_do_not_fit_likelihoods(name):
    if LOSSES[name].likelihood:
        with pytest.raises(ValueError, match=f"ld_alpha=0.5 does not fit loss {name}"):
            Objective(["sigmoid", name], ld_alpha=0.5)
        objective(name, ld_alpha=1.0)
    else:
        objective(name, ld_alpha=0.5)
    assert objective(name).with_ld_alpha(None).ld_alpha is None
    with pytest.raises(ValueError, match=r"ld_alpha must be in \[0, 1\] or None, got -0.1"):
        objective(name).with_ld_alpha(-0.1)


BAD = {
    "unknown loss": (dict(loss="dpo"), "loss must be one of sigmoid, hinge"),
    "no loss": (dict(loss=[]), r"non-empty sequence of them, got \[\]"),
    "None": (dict(loss=None), "non-empty sequence of them, got None"),
    "nested": (dict(loss=[["sigmoid"]]), "loss must be one of sigmoid, hinge"),
    "one weight": (dict(loss_weights=0.5), "loss weights must be 1 finite numbers, one per loss, got 0.5"),
    "infinite weight": (dict(loss_weights=[math.inf]), "loss weights must be 1 finite numbers"),
    "text": (dict(beta="0.1"), "beta must be a finite number, got '0.1'"),
    "beta": (dict(beta=0.0), "beta must be positive, got 0.0"),
    "beta nan": (dict(beta=float("nan")), "beta must be a finite number, got nan"),
    "smoothing": (dict(label_smoothing=-0.1), r"label_smoothing must be in \[0, 1\), got -0.1"),
    "robust": (dict(loss="robust", label_smoothing=0.5), r"\[0, 0.5\) for loss 'robust', got 0.5"),
    "exo": (dict(loss="exo_pair"), "label_smoothing must be above 0 for loss 'exo_pair'"),
    "divergence": (dict(f_divergence_type="kl"), "f_divergence_type must be one of reverse_kl"),
    "misfit": (dict(loss="aot", f_divergence_type="forward_kl"), "does not fit loss aot.*it fits sigmoid, hinge"),
    "weights": (dict(loss=["sigmoid", "sft"], loss_weights=[1.0]), "loss weights must be 2 finite numbers"),
    "weighted aot": (dict(loss="aot", weights=torch.ones(3)), "sorts across pairs"),
    "tau": (dict(discopop_tau=0.0), "discopop_tau must be positive"),
    "reduction": (dict(reduction="avg"), "reduction must be 'none', 'mean' or 'sum'"),
    "lengths": (dict(loss="ipo"), "loss ipo needs chosen_lengths, got None"),
    "reference": (dict(ref_chosen_logps=None), "loss sigmoid needs ref_chosen_logps, got None"),
    "shape": (dict(rejected_logps=torch.zeros(2)), r"rejected_logps must have shape \(3,\), got \(2,\)"),
    "device": (dict(rejected_logps=torch.zeros(3, device="meta")), "rejected_logps is on meta"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    wrong, message = BAD[case]
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    with pytest.raises(ValueError, match=message):
        preference_loss(**{**{name: torch.zeros(3) for name in names}, **wrong})


def test_wrong_types_are_named():
    zeros = torch.zeros(3)
    with pytest.raises(TypeError, match="chosen_logps must be floating"):
        preference_loss(zeros.long(), zeros, zeros, zeros)
    with pytest.raises(TypeError, match="chosen_lengths must be int64, int32 or fp32, got torch.bfloat16"):
        preference_loss(zeros, zeros, zeros, zeros, loss="ipo", chosen_lengths=zeros.bfloat16(), rejected_lengths=zeros)
    with pytest.raises(TypeError, match="rejected_logps must be a tensor, got list"):
        preference_loss(zeros, [0.0] * 3, zeros, zeros)
    with pytest.raises(ValueError, match="ld_alpha must be in"):
        ld_dpo_token_weights(torch.tensor([0]), torch.tensor([1, 0]), 1.5)
    with pytest.raises(ValueError, match="needs reference log-probs"):
        Objective("sigmoid")(PairLogps(zeros, zeros))
    with pytest.raises(ValueError, match="PairLogps.rejected_lengths is None"):
        Objective("simpo")(PairLogps(zeros, zeros, chosen_lengths=zeros))


def test_sixteen_bit_logps_are_computed_in_fp32():
    logps = [torch.full((1,), x, dtype=torch.bfloat16, requires_grad=True) for x in (-2.0, -3.0, -2.5, -2.5)]
    loss = preference_loss(*logps)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(math.log1p(math.exp(-0.1)), rel=1e-6)
    loss.sum().backward()
    assert logps[0].grad is not None and logps[2].grad is None


def test_compiles_without_a_graph_break():
    names = ["sigmoid", "orpo", "aot"]
    inputs = [getattr(make_pairs(), name) for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]
    counts = dict(zip(("chosen_lengths", "rejected_lengths"), torch.full((2, 5), 7), strict=True))
    compiled = torch.compile(lambda *x: preference_loss(*x, loss=names, **counts), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), preference_loss(*inputs, loss=names, **counts))


def test_an_unknown_knob_is_named():
    with pytest.raises(TypeError, match="a loss has no knob betaa; knobs are beta, label_smoothing"):
        Objective("sigmoid", betaa=0.2)
