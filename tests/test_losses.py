"""Each loss against hand-computed numbers, against TRL's own code, at extremes, and by gradcheck."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch

from dpo_fast import LOSSES, PairLogps, preference_loss
from dpo_fast.logps import pair_logps
from dpo_fast.losses import F_DIVERGENCES, LossParams, log1mexp
from dpo_fast.objective import Objective, ld_dpo_token_weights, wpo_weights
from dpo_fast.ops.reference import sequence_logps_reference

SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}  # where the default does not do


def objective(name, **params):
    return Objective(name, **{"label_smoothing": SMOOTHING.get(name, 0.0), **params})


def make_pairs(P=5, dtype=torch.float32, seed=0, std=3.0):
    generator = torch.Generator().manual_seed(seed)
    logps = -20 + std * torch.randn(2 * P, generator=generator, dtype=torch.float64)
    reference = logps + torch.randn(2 * P, generator=generator, dtype=torch.float64)
    lengths = torch.randint(3, 12, (2 * P,), generator=generator)
    return pair_logps(logps.to(dtype), reference.to(dtype), lengths)


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
    "orpo": 10 / 4
    - 0.1 * math.log(s((-2.5 + 2.4) - (math.log(1 - math.exp(-2.5)) - math.log(1 - math.exp(-2.4))))),
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
def test_log_ratios_of_ten_thousand_stay_finite(name, divergence, sign):
    if divergence in ("forward_kl", "alpha_divergence") and name == "ipo" and sign != (1, 1):
        return  # the square of exp(5,000) is not finite in any arithmetic
    reference = torch.full((2,), -10_050.0)
    chosen = (reference + 1e4 * sign[0]).requires_grad_()
    rejected = (reference + 1e4 * sign[1]).requires_grad_()
    lengths = torch.tensor([3, 3])
    loss = objective(name, f_divergence_type=divergence)(
        PairLogps(chosen, rejected, reference, reference, lengths, lengths)
    )
    assert torch.isfinite(loss).all(), loss
    for gradient in torch.autograd.grad(loss.sum(), (chosen, rejected), allow_unused=True):
        assert gradient is None or torch.isfinite(gradient).all(), gradient


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


# --- TRL 1.16 ------------------------------------------------------------------------------------------------------


def make_tokens(P=4, T=9, seed=3):
    """Per-token log-probs in TRL's layout: (2P, T - 1), right-padded, the first one or two positions a prompt."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, T - 2, (2 * P,), generator=generator)
    prompt = torch.randint(1, 3, (P,), generator=generator).repeat(2)
    position = torch.arange(T)
    mask = (position >= prompt[:, None]) & (position < (prompt + lengths)[:, None])
    logps = -torch.rand(2 * P, T - 1, generator=generator) * 3
    reference = logps + torch.randn(2 * P, T - 1, generator=generator) * 0.5
    sum_sq = -torch.rand(2 * P, T - 1, generator=generator)
    scored = mask[:, 1:]
    return [x * scored for x in (logps, reference, sum_sq)], mask.long()


def trl_loss(names, *, loss_weights=None, ld_alpha=None, use_weighting=False, **params):
    """TRL's own `_compute_loss` and its gradient for the token log-probs, with stand-ins for the models."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    (logps, reference, sum_sq), mask = make_tokens()
    leaf = logps.clone().requires_grad_()
    zeros = torch.zeros_like(logps)
    outputs = SimpleNamespace(
        log_probs=leaf, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=sum_sq, aux_loss=None
    )
    known = {**vars(LossParams()), **params}
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        ref_model=lambda **_: SimpleNamespace(log_probs=reference),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x),
        args=SimpleNamespace(discopop_tau=known["discopop_tau"], gradient_checkpointing_kwargs=None),
        loss_types=names,
        loss_weights=loss_weights or [1.0] * len(names),
        ld_alpha=ld_alpha,
        use_weighting=use_weighting,
        precompute_ref_logps=False,
        aux_loss_enabled=False,
        _metrics={"train": {}, "eval": {}},
        _total_train_tokens=0,
        _tp_size=1,
        **{k: known[k] for k in ("beta", "label_smoothing", "f_divergence_type", "f_alpha_divergence_coef")},
    )
    trainer.model.is_gradient_checkpointing = False
    from collections import defaultdict

    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    compute = inspect.unwrap(trl.DPOTrainer._compute_loss)
    loss = compute(trainer, lambda **_: outputs, inputs, return_outputs=False)
    # It sums over padding too, where a model's forward gives constant zeros
    return loss, torch.autograd.grad(loss, leaf)[0] * mask[:, 1:], trainer._metrics["train"]


def our_loss(names, *, loss_weights=None, ld_alpha=None, use_weighting=False, **params):
    (logps, reference, sum_sq), mask = make_tokens()
    leaf = logps.clone().requires_grad_()
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    lengths = mask[:, 1:].sum(1)
    weights = None if ld_alpha is None else ld_dpo_token_weights(rows, lengths, ld_alpha)

    def sums(x, w=weights):
        return sequence_logps_reference(x[rows, columns], rows, mask.shape[0], w).float()

    pair_weights = wpo_weights(sums(leaf - sum_sq, None), lengths) if use_weighting else None
    loss = Objective(names, weights=loss_weights, use_weighting=use_weighting, **params)
    pairs = pair_logps(sums(leaf), sums(reference), lengths, pair_weights)
    value = loss(pairs).mean()
    return value, torch.autograd.grad(value, leaf)[0], pairs, loss


SHARED = [name for name in LOSSES if name not in ("simpo", "orpo", "cpo")]


def assert_like_trl(names, **knobs):
    theirs, their_gradient, _ = trl_loss(names, **knobs)
    ours, our_gradient, *_ = our_loss(names, **knobs)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_trl_agrees(name, beta):
    assert_like_trl([name], beta=beta, label_smoothing=SMOOTHING.get(name, 0.0))


@pytest.mark.parametrize("name", ["exo_pair", "robust", "aot", "aot_unpaired"])
def test_trl_agrees_on_label_smoothing(name):
    assert_like_trl([name], label_smoothing=0.2)


@pytest.mark.parametrize("divergence", F_DIVERGENCES)
@pytest.mark.parametrize("name", [name for name in SHARED if LOSSES[name].f_divergence])
def test_trl_agrees_on_divergences(name, divergence):
    smoothing = SMOOTHING.get(name, 0.0)
    assert_like_trl([name], f_divergence_type=divergence, label_smoothing=smoothing)


@pytest.mark.parametrize("knobs", [dict(ld_alpha=0.3), dict(use_weighting=True)], ids=str)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "apo_zero"])
def test_trl_agrees_on_weightings(name, knobs):
    assert_like_trl([name], **knobs)


def test_trl_agrees_on_combinations():
    assert_like_trl(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0])


def test_where_trl_is_wrong():
    """forward_kl and discopop overflow in TRL; WPO weights with sft crash there; sigmoid ignores label smoothing."""
    with pytest.raises(RuntimeError, match="single memory location"):
        trl_loss(["sft"], use_weighting=True)
    our_loss(["sft"], use_weighting=True)
    plain, smooth = trl_loss(["sigmoid"])[0], trl_loss(["sigmoid"], label_smoothing=0.2)[0]
    assert torch.equal(plain, smooth)  # theirs: the argument is accepted and has no effect
    assert our_loss(["sigmoid"], label_smoothing=0.2)[0] > our_loss(["sigmoid"])[0]


def test_trl_agrees_on_reference_free_losses():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer.cpo_loss
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer.odds_ratio_loss
    pairs = make_pairs()
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    knobs = SimpleNamespace(
        alpha=0.0, beta=0.3, simpo_gamma=0.5, label_smoothing=0.1, loss_type="simpo", accelerator=accelerator
    )
    averages = pairs.chosen / pairs.chosen_lengths, pairs.rejected / pairs.rejected_lengths
    ours = objective("simpo", beta=0.3, label_smoothing=0.1)(pairs)
    torch.testing.assert_close(ours, cpo(knobs, *averages)[0], rtol=1e-5, atol=1e-5)
    knobs.loss_type = "sigmoid"
    ours = objective("cpo", beta=0.3, label_smoothing=0.1, cpo_alpha=0.0)(pairs)
    torch.testing.assert_close(ours, cpo(knobs, pairs.chosen, pairs.rejected)[0], rtol=1e-5, atol=1e-5)
    ours = objective("orpo", beta=0.3)(pairs) - objective("sft")(pairs)
    torch.testing.assert_close(ours, -orpo(knobs, *averages)[0], rtol=1e-5, atol=1e-5)


# --- the objective -------------------------------------------------------------------------------------------------


def test_callables_and_weights():
    pairs = make_pairs()

    def square(pairs):
        return pairs.margin**2

    both = Objective(["sigmoid", square], weights=[1.0, 0.5])
    torch.testing.assert_close(both(pairs), objective("sigmoid")(pairs) + 0.5 * pairs.margin**2)
    assert both.names == ("sigmoid", "square") and not both.couples_pairs
    with pytest.raises(ValueError, match="must return one value per pair"):
        Objective(lambda pairs: pairs.margin.mean())(pairs)


def test_rewards():
    pairs = make_pairs()
    chosen, rejected = objective("sigmoid", beta=0.5).rewards(pairs)
    torch.testing.assert_close(chosen - rejected, 0.5 * pairs.margin)
    free = PairLogps(pairs.chosen, pairs.rejected, None, None, *_lengths(pairs))
    assert torch.equal(objective("cpo").rewards(free)[0], 0.1 * pairs.chosen)
    assert torch.equal(objective("simpo").rewards(free)[0], 0.1 * (pairs.chosen / pairs.chosen_lengths))


def test_what_others_know_about_losses():
    assert {n for n, f in LOSSES.items() if f.couples_pairs} == {"aot", "aot_unpaired"}
    assert {n for n, f in LOSSES.items() if not f.needs_reference} == {"simpo", "orpo", "cpo", "sft"}
    mixed = Objective(["sft", "aot"])
    assert mixed.couples_pairs and mixed.needs_reference and mixed.needs_lengths


def test_token_weights_of_interleaved_sequences():
    ids = torch.tensor([0, 2, 0, 1, 2, 2, 3, 2])  # lengths 2, 1, 4, 1: pairs (2, 4) and (1, 1)
    weights = ld_dpo_token_weights(ids, torch.bincount(ids), 0.25)
    assert weights.tolist() == [1, 1, 1, 1, 1, 0.25, 1, 0.25]


BAD = {
    "unknown loss": (dict(loss="dpo"), "loss must be one of sigmoid, hinge"),
    "no loss": (dict(loss=[]), "non-empty sequence"),
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
    with pytest.raises(TypeError, match="rejected_logps must be a tensor, got list"):
        preference_loss(zeros, [0.0] * 3, zeros, zeros)
    with pytest.raises(ValueError, match="ld_alpha must be in"):
        ld_dpo_token_weights(torch.tensor([0]), torch.tensor([1, 0]), 1.5)
    with pytest.raises(ValueError, match="needs reference log-probs"):
        Objective("sigmoid")(PairLogps(zeros, zeros))


def test_sixteen_bit_logps_are_computed_in_fp32():
    logps = [torch.full((1,), x, dtype=torch.bfloat16, requires_grad=True) for x in (-2.0, -3.0, -2.5, -2.5)]
    loss = preference_loss(*logps)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-math.log(s(0.1)), rel=1e-6)
    loss.sum().backward()
    assert logps[0].grad is not None and logps[2].grad is None
