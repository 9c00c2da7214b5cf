"""Level 3: loss and gradients of each plan against the fp64 oracle; any order of tokens; what it costs."""

import math
import re

import pytest
import torch
from loss_cases import SMOOTHING
from preference_bounds import bounds_of, check_within_bounds
from random_head import random_head
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast import LOSSES, Objective, linear_preference_loss
from dpo_fast.comparisons import Comparisons
from dpo_fast.logps import pair_logps
from dpo_fast.ops import plan as plans
from dpo_fast.ops.pairwise import chunks_of_groups, group_tokens
from dpo_fast.ops.plan import plan_head
from dpo_fast.testing import assert_within_bound, assert_within_budget, fp32_linear, head_bounds, make_generator

NAMES = ("hidden", "weight", "bias", "down", "up")


def make(lengths=(5, 3, 7, 4, 6, 2), H=16, V=301, dtype=torch.float32, seed=0, shuffled=True):
    """P = len(lengths) / 2 pairs; lengths are [chosen ..., rejected ...]."""
    generator = make_generator(seed)
    N = sum(lengths)
    tensors = random_head(generator, N, H, V, dtype, 3, up_std=0.3)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    if shuffled:
        ids = ids[torch.randperm(N, generator=generator)]
    labels = torch.randint(V, (N,), generator=generator)
    reference = torch.randn(len(lengths), generator=generator) * 3 - 5 * torch.tensor(lengths)
    return tensors, labels, ids, reference


def run(tensors, labels, ids, needs=NAMES, loss="sigmoid", scale=1.0, **knobs):
    leaves = {k: v.clone().requires_grad_(k in needs) for k, v in tensors.items()}
    knobs = {"label_smoothing": SMOOTHING.get(loss, 0.0) if isinstance(loss, str) else 0.0, **knobs}
    out = linear_preference_loss(
        leaves["hidden"],
        leaves["weight"],
        labels,
        ids,
        knobs.pop("num_pairs", (int(ids.max()) + 2) // 2),
        bias=leaves["bias"],
        low_rank=(leaves["down"], leaves["up"]),
        loss=loss,
        **knobs,
    )
    gradients = torch.autograd.grad(out.loss * scale, [leaves[k] for k in needs], allow_unused=True) if needs else ()
    return out, dict(zip(needs, gradients, strict=True))


def wide(tensors):
    return {k: v.double() for k, v in tensors.items()}


def make_objective(loss="sigmoid", **params):
    return Objective(loss, label_smoothing=SMOOTHING.get(loss, 0.0) if isinstance(loss, str) else 0.0, **params)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_gradient(impl, loss):
    tensors, labels, ids, reference = make()
    knobs = dict(loss=loss, reference_logps=reference, beta=0.3, tile_mib=1)
    out, gradients = run(tensors, labels, ids, impl=impl, **knobs)
    truth, true = run(wide(tensors), labels, ids, impl="reference", **knobs)
    assert out.plan.name == ("recompute" if LOSSES[loss].couples_pairs else "pairwise")
    bounds = bounds_of(tensors, labels, ids, truth, make_objective(loss, beta=0.3))
    check_within_bounds(out, gradients, truth, true, bounds)
    for name, bound in zip(("chosen_rewards", "rejected_rewards"), bounds["sums"].tensor_split(2), strict=True):
        assert_within_bound(getattr(out, name), getattr(truth, name), 0.3 * bound, what=name)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_token_weights_have_the_digits_of_fp64(impl):
    tensors, labels, ids, reference = make(dtype=torch.float64, shuffled=False)
    out, _ = run(tensors, labels, ids, impl=impl, reference_logps=reference.double(), ld_alpha=0.3)
    lengths, shorter = [5, 3, 7, 4, 6, 2], 2 * [4, 3, 2]
    tokens = zip(out.stats.logps.split(lengths), shorter, strict=True)
    by_hand = [t[:shared].sum() + 0.3 * t[shared:].sum() for t, shared in tokens]
    assert (torch.cat([out.chosen_logps, out.rejected_logps]) - torch.stack(by_hand)).abs().max() < 1e-12


PLANS = {
    "score": dict(needs=()),
    "frozen": dict(needs=("hidden", "down")),
    "pairwise": dict(needs=NAMES),
    "pending": dict(needs=NAMES, lengths=(2, 40, 3, 3, 50, 1), V=5003),
    "recompute": dict(needs=NAMES, loss="aot"),
}


def run_plan(plan, impl, tensors, labels, ids, reference):
    """-> ours, the oracle's, each with gradients."""
    case = {"loss": "sigmoid", **PLANS[plan]}
    knobs = dict(needs=case["needs"], loss=case["loss"], reference_logps=reference, tile_mib=1, logit_softcap=20.0)
    out, gradients = run(tensors, labels, ids, impl=impl, **knobs)
    assert out.plan.name == plan, out.plan
    assert all(gradients[name].dtype == tensors[name].dtype for name in case["needs"])
    return out, gradients, *run(wide(tensors), labels, ids, impl="reference", **knobs)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_within_its_bounds(impl, dtype, plan, monkeypatch):
    monkeypatch.setattr(plans, "pending_pays", lambda *_: True)
    case = {"loss": "sigmoid", "lengths": (5, 3, 7, 4, 6, 2), **PLANS[plan]}
    tensors, labels, ids, reference = make(lengths=case["lengths"], V=case.get("V", 1001), dtype=dtype)
    *found, truth, true = run_plan(plan, impl, tensors, labels, ids, reference)
    bounds = bounds_of(tensors, labels, ids, truth, make_objective(case["loss"]), logit_softcap=20.0)
    check_within_bounds(*found, truth, true, bounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_within_the_budget(dtype, plan):
    """Many pairs, as tokens of a pair share the error of their coefficient."""
    lengths = [2, 1] * 300
    lengths[0] = lengths[301] = 60 if plan == "pending" else 2
    tensors, labels, ids, reference = make(lengths=lengths, V=5003 if plan == "pending" else 301, dtype=dtype)
    out, gradients, truth, true = run_plan(plan, "torch", tensors, labels, ids, reference)
    losses, peer = run_eager(tensors, labels, ids, reference, PLANS[plan]["needs"], PLANS[plan].get("loss", "sigmoid"))
    assert_within_budget(out.losses, losses, truth.losses, what="losses")
    for name in gradients:
        assert_within_budget(gradients[name], peer[name], true[name], what=name)


def run_eager(tensors, labels, ids, reference, needs, loss):
    """Full logits in fp32, gradients by autograd and rounded once."""
    leaves = {k: v.clone().requires_grad_(k in needs) for k, v in tensors.items()}
    z = fp32_linear(leaves["hidden"], leaves["weight"], leaves["bias"].float())
    z = 20.0 * torch.tanh((z + fp32_linear(leaves["down"], leaves["up"])) / 20.0)
    logps = torch.log_softmax(z, -1).gather(1, labels[:, None])[:, 0]
    sums = torch.zeros(len(reference)).index_add(0, ids, logps)
    losses = Objective(loss)(pair_logps(sums, reference))
    gradients = torch.autograd.grad(losses.mean(), [leaves[k] for k in needs]) if needs else ()
    return losses.detach(), dict(zip(needs, gradients, strict=True))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_order_of_tokens_does_not_matter(impl):
    tensors, labels, ids, reference = make(shuffled=False)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
    moved = {k: v[order] if k in ("hidden", "down") else v for k, v in tensors.items()}
    a, da = run(tensors, labels, ids, reference_logps=reference, impl=impl)
    b, db = run(moved, labels[order], ids[order], reference_logps=reference, impl=impl)
    torch.testing.assert_close(a.losses, b.losses)
    torch.testing.assert_close(da["hidden"][order], db["hidden"])
    torch.testing.assert_close(da["weight"], db["weight"])


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_ignored_tokens_and_empty_sequences(loss):
    tensors, labels, ids, reference = make(lengths=(5, 0, 7, 4, 6, 0), shuffled=True)
    labels[::3] = -100
    knobs = dict(reference_logps=reference, loss=loss, num_pairs=3)
    out, gradients = run(tensors, labels, ids, **knobs)
    truth, true = run(wide(tensors), labels, ids, impl="reference", **knobs)
    check_within_bounds(out, gradients, truth, true, bounds_of(tensors, labels, ids, truth, make_objective(loss)))
    assert (gradients["hidden"][::3] == 0).all() and out.rejected_logps[2] == 0


def test_ignored_tokens_do_not_shift_token_weights():
    tensors, labels, ids, reference = make()
    labels[::3] = -100
    scored = labels != -100
    kept = {k: v[scored] if k in ("hidden", "down") else v for k, v in tensors.items()}
    knobs = dict(reference_logps=reference, ld_alpha=0.3, needs=(), num_pairs=3)
    with_ignored, _ = run(tensors, labels, ids, **knobs)
    without, _ = run(kept, labels[scored], ids[scored], **knobs)
    torch.testing.assert_close(with_ignored.losses, without.losses)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_tokens_and_all_ignored(impl):
    for labels in (torch.zeros(0, dtype=torch.int64), torch.full((4,), -100)):
        n = len(labels)
        hidden, weight = torch.randn(n, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
        ids = torch.arange(4)[:n]
        out = linear_preference_loss(hidden, weight, labels, ids, 2, reference_logps=torch.zeros(4), impl=impl)
        assert out.loss.item() == pytest.approx(math.log(2))
        out.loss.backward()
        assert (weight.grad == 0).all() and (hidden.grad == 0).all()


@pytest.mark.parametrize("knobs", [dict(ld_alpha=0.3), dict(use_weighting=True)], ids=str)
@pytest.mark.parametrize("plan", ["pairwise", "pending"])
def test_weightings(knobs, plan):
    case = {"lengths": (5, 3, 7, 4, 6, 2), **PLANS[plan]}
    tensors, labels, ids, reference = make(lengths=case["lengths"], V=case.get("V", 301))
    knobs = dict(reference_logps=reference, tile_mib=1, **knobs)
    out, gradients = run(tensors, labels, ids, **knobs)
    truth, true = run(wide(tensors), labels, ids, impl="reference", **knobs)
    assert out.plan.name == plan
    objective = make_objective(use_weighting=knobs.get("use_weighting", False))
    check_within_bounds(out, gradients, truth, true, bounds_of(tensors, labels, ids, truth, objective))


@pytest.mark.parametrize("plan", PLANS)
def test_fp64_is_fp64_throughout(plan):
    case = {"lengths": (5, 3, 7, 4, 6, 2), "V": 301, "loss": "sigmoid", **PLANS[plan]}
    tensors, labels, ids, reference = make(lengths=case["lengths"], V=case["V"], dtype=torch.float64)
    needs, loss = case["needs"], case["loss"]
    knobs = dict(reference_logps=reference.double(), ld_alpha=0.3, logit_scale=0.7, logit_softcap=3.0, tile_mib=1)
    out, gradients = run(tensors, labels, ids, needs=needs, loss=loss, **knobs)
    truth, true = run(tensors, labels, ids, needs=needs, loss=loss, impl="reference", **knobs)
    assert out.plan.name == plan
    torch.testing.assert_close(out.losses, truth.losses, rtol=1e-12, atol=1e-12)
    for name in needs:
        torch.testing.assert_close(gradients[name], true[name], rtol=1e-9, atol=1e-12)


def test_token_references_keep_the_digits_of_small_log_ratios():
    """The same model as policy and reference: ln 2 exactly, though each sum is thousands of nats."""
    tensors, labels, ids, _ = make(lengths=(900, 800, 950, 700), V=101)
    scored, _ = run(tensors, labels, ids, needs=(), reference_logps=torch.zeros(4))
    knobs = dict(reference_token_logps=scored.stats.logps + 1e-7)
    out, _ = run(tensors, labels, ids, **knobs)
    truth, _ = run(wide(tensors), labels, ids, impl="reference", **knobs)
    assert abs(out.chosen_logps).max() > 2000
    assert abs(out.loss.item() - math.log(2)) < 1e-5
    tokens = head_bounds(tensors["hidden"], tensors["weight"], labels, bias=tensors["bias"],
                         low_rank=(tensors["down"], tensors["up"]))["logps"]  # fmt: skip
    bound = 0.1 * torch.zeros(4, dtype=torch.float64).index_add_(0, ids, tokens)[:2]
    assert_within_bound(out.chosen_rewards, truth.chosen_rewards, bound)


@pytest.mark.parametrize("needs", [("hidden", "weight"), ("hidden",)], ids=["pairwise", "frozen"])
def test_certain_tokens_keep_their_references(needs):
    """A log-prob of exactly 0 is a token's own, not a mark of an ignored one; references get no gradient."""
    tensors, _, ids, _ = make()
    tensors["hidden"] *= 1000  # the gaps between logits are hundreds of nats
    labels = (tensors["hidden"] @ tensors["weight"].T).argmax(-1)
    labels[::5] = -100
    references = (-torch.rand(27, generator=torch.Generator().manual_seed(1))).requires_grad_()
    hidden, weight = (tensors[k].requires_grad_(k in needs) for k in ("hidden", "weight"))
    out = linear_preference_loss(hidden, weight, labels, ids, 3, reference_token_logps=references)
    assert (out.stats.logps[labels != -100] == 0).sum() > 10 and not out.pairs.ref_chosen.requires_grad
    expected = torch.zeros(6).index_add(0, ids, references.detach() * (labels != -100))
    torch.testing.assert_close(torch.cat([out.pairs.ref_chosen, out.pairs.ref_rejected]), expected)
    out.loss.backward()
    assert references.grad is None


def test_functions_and_combinations_as_losses():
    tensors, labels, ids, reference = make()

    def square(pairs):
        return pairs.margin**2

    square.couples_pairs = False
    knobs = dict(reference_logps=reference, loss=["sigmoid", square], loss_weights=[1.0, 0.01])
    out, gradients = run(tensors, labels, ids, **knobs)
    truth, true = run(wide(tensors), labels, ids, impl="reference", **knobs)
    assert out.plan.name == "pairwise"
    bounds = bounds_of(tensors, labels, ids, truth, Objective(knobs["loss"], weights=knobs["loss_weights"]))
    check_within_bounds(out, gradients, truth, true, bounds)
    free, _ = run(tensors, labels, ids, loss=lambda pairs: pairs.chosen)
    assert free.loss.requires_grad


def test_statistics_come_along():
    tensors, labels, ids, reference = make()
    knobs = dict(reference_logps=reference, outputs=("entropy", "is_top1"))
    out, _ = run(tensors, labels, ids, **knobs)
    truth, _ = run(wide(tensors), labels, ids, impl="reference", **knobs)
    bounds = bounds_of(tensors, labels, ids, truth, make_objective())
    assert_within_bound(out.stats.entropy, truth.stats.entropy, bounds["entropy"])
    assert torch.equal(out.stats.is_top1, truth.stats.is_top1) and out.stats.mean_logits is None


def test_what_carries_gradients():
    tensors, labels, ids, reference = make()
    pairwise, _ = run(tensors, labels, ids, reference_logps=reference)
    frozen, _ = run(tensors, labels, ids, needs=("hidden",), reference_logps=reference)
    for out in (pairwise, frozen):
        assert out.loss.requires_grad and out.losses.requires_grad and out.chosen_logps.requires_grad
        assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


TERMS = {
    "log-probs of sequences": lambda out: out.chosen_logps,
    "a margin": lambda out: out.pairs.margin,
    "losses of pairs": lambda out: out.losses,
    "log-probs of tokens": lambda out: out.stats.logps,
}


@pytest.mark.parametrize("term", TERMS)
def test_another_term_beside_the_loss_is_trained_or_raises(term):
    """It never counts for nothing."""
    tensors, labels, ids, reference = make()
    truth = total_gradient(wide(tensors), labels, ids, reference, TERMS[term], ("hidden",), impl="reference")
    found = total_gradient(tensors, labels, ids, reference, TERMS[term], ("hidden",))
    assert (found - truth).norm() <= 1e-5 * truth.norm()
    with pytest.raises(
        RuntimeError, match=r"`loss` alone has one: name the term as a loss, as in loss=\['sigmoid', 'sft'\]"
    ):
        total_gradient(tensors, labels, ids, reference, TERMS[term], NAMES)


def test_a_statistic_beside_the_loss_raises():
    tensors, labels, ids, reference = make()
    with pytest.raises(RuntimeError, match="by way of log-probs, statistics or losses"):
        total_gradient(tensors, labels, ids, reference, lambda out: out.stats.entropy, NAMES, outputs=("entropy",))


def total_gradient(tensors, labels, ids, reference, term, needs, **knobs):
    leaves = {k: v.clone().requires_grad_(k in needs) for k, v in tensors.items()}
    hidden, weight, bias, *low_rank = leaves.values()
    knobs |= dict(bias=bias, low_rank=tuple(low_rank), reference_logps=reference)
    out = linear_preference_loss(hidden, weight, labels, ids, 3, **knobs)
    (out.loss - 0.5 * term(out).mean()).backward()
    return hidden.grad


def adaptive(pairs):
    """A strength that depends on the mean margin of the batch, arXiv:2407.08639."""
    beta = 0.1 * (1 + 0.6 * pairs.margin.detach().mean()).clamp(min=0.1)
    return torch.nn.functional.softplus(-beta * pairs.margin)


@pytest.mark.parametrize("needs", [("hidden",), NAMES], ids=["frozen", "trained"])
def test_a_function_gets_the_whole_batch_unless_it_says_that_it_need_not(needs):
    tensors, labels, ids, reference = make(lengths=(50, 30, 70, 40, 60, 20), V=5000)
    calls = []

    def loss(pairs):
        calls.append(pairs.num_pairs)
        return adaptive(pairs)

    out, gradients = run(tensors, labels, ids, needs=needs, loss=loss, reference_logps=reference, tile_mib=1)
    truth, true = run(
        wide(tensors), labels, ids, needs=needs, loss=adaptive, reference_logps=reference, impl="reference"
    )
    assert calls == [3] and out.plan.name == ("frozen" if needs == ("hidden",) else "recompute")
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-5)
    for name in needs:
        assert (gradients[name] - true[name]).norm() <= 1e-5 * true[name].norm(), name
    loss.couples_pairs = False
    calls.clear()
    run(tensors, labels, ids, needs=NAMES, loss=loss, reference_logps=reference, tile_mib=1)
    assert calls == [1, 1, 1]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("couples", [False, True])
@pytest.mark.parametrize("needs", [("hidden",), NAMES], ids=["frozen", "trained"])
def test_parameters_of_a_loss_function_are_trained(impl, couples, needs):
    """A learned beta, by way of what was computed from it before; chunk by chunk, and scaled as the loss is."""
    tensors, labels, ids, reference = make(lengths=(50, 30, 70, 40, 60, 20), V=5000)
    log_beta = torch.nn.Parameter(torch.tensor(-1.5))
    offset = torch.nn.Parameter(torch.tensor(0.3))
    beta = log_beta.exp()

    def loss(pairs):
        return torch.nn.functional.softplus(-beta * (pairs.margin - offset))

    loss.couples_pairs = couples
    leaves = {k: tensors[k].requires_grad_(k in needs) for k in ("hidden", "weight")}
    out = linear_preference_loss(
        *leaves.values(), labels, ids, 3, loss=loss, reference_logps=reference, tile_mib=1, impl=impl
    )
    (3 * out.loss).backward()
    margin = out.pairs.margin.detach().double()
    b, o = (x.detach().double().requires_grad_() for x in (log_beta, offset))
    (3 * torch.nn.functional.softplus(-b.exp() * (margin - o)).mean()).backward()
    assert log_beta.grad.item() == pytest.approx(b.grad.item(), rel=1e-5)
    assert offset.grad.item() == pytest.approx(o.grad.item(), rel=1e-5)


def test_a_loss_that_does_not_depend_on_the_pairs_says_so():
    tensors, labels, ids, reference = make()

    def constant(pairs):
        return pairs.margin.detach()

    constant.couples_pairs = False
    with pytest.raises(RuntimeError, match="the loss does not depend on pairs.chosen"):
        run(tensors, labels, ids, loss=constant, reference_logps=reference)
    with pytest.raises(TypeError, match="loss <lambda> must return a tensor, one value per pair, got NoneType"):
        run(tensors, labels, ids, loss=lambda pairs: None, reference_logps=reference)


def test_the_oracle_says_that_it_ran():
    tensors, labels, ids, reference = make()
    out, _ = run(tensors, labels, ids, reference_logps=reference, impl="reference")
    assert out.plan.name == "reference" and out.plan.gemms == 3


@pytest.mark.parametrize("impossible", ["chosen", "rejected"])
@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "trained"])
def test_an_impossible_completion_has_one_loss(impossible, needs):
    """Of probability 0, as a masked vocabulary makes it: from sums of the reference and from its tokens."""
    tensors, labels, ids, _ = make(lengths=(2, 2), V=50, shuffled=False)
    bias = torch.zeros(50)
    bias[labels[0 if impossible == "chosen" else 3]] = -torch.inf
    tokens, found = -torch.ones(4), {}
    for name, reference in dict(reference_logps=torch.tensor([-2.0, -2.0]), reference_token_logps=tokens).items():
        leaves = {k: tensors[k].clone().requires_grad_(k in needs) for k in ("hidden", "weight")}
        out = linear_preference_loss(*leaves.values(), labels, ids, 1, bias=bias, **{name: reference})
        out.loss.backward()
        found[name] = out.loss.item(), leaves["hidden"].grad
        assert torch.isfinite(leaves["hidden"].grad).all()
    (a, d_a), (b, d_b) = found.values()
    assert a == b == (torch.inf if impossible == "chosen" else 0.0)
    assert torch.equal(d_a, d_b) and (d_a != 0).any() == (impossible == "chosen")


@pytest.mark.parametrize("needs", [("hidden",), NAMES], ids=["frozen", "trained"])
@pytest.mark.parametrize("loss", ["sft", "orpo", "cpo", ["sigmoid", "sft"]], ids=str)
def test_micro_batches_of_one_mean(loss, needs):
    """Pairs one by one, each told the mean length of all, add up to the batch."""
    lengths = (5, 3, 7, 4, 6, 2)
    tensors, labels, ids, reference = make(lengths=lengths)
    reference = reference if "sigmoid" in loss else None
    whole, gradients = run(tensors, labels, ids, needs=needs, loss=loss, reference_logps=reference)
    total, added = 0.0, {name: 0.0 for name in needs}
    for pair in range(3):
        rows = (ids % 3 == pair).nonzero().squeeze(1)
        part = {k: v if k in ("weight", "bias", "up") else v[rows] for k, v in tensors.items()}
        its = None if reference is None else reference[[pair, 3 + pair]]
        knobs = dict(num_pairs=1, mean_chosen_length=sum(lengths[:3]) / 3, reference_logps=its)
        out, theirs = run(part, labels[rows], ids[rows] // 3, needs=needs, loss=loss, **knobs)
        total += out.loss.item() / 3
        for name in needs:
            d = theirs[name] / 3
            added[name] += (
                d if d.shape == gradients[name].shape else torch.zeros_like(gradients[name]).index_copy_(0, rows, d)
            )
    assert total == pytest.approx(whole.loss.item(), rel=1e-5)
    for name in needs:
        assert (added[name] - gradients[name]).norm() <= 1e-5 * gradients[name].norm(), name


@pytest.mark.parametrize("needs", [("hidden",), NAMES], ids=["frozen", "trained"])
def test_references_of_any_dtype_leave_that_of_the_results(needs):
    tensors, labels, ids, reference = make()
    for dtype in (torch.bfloat16, torch.float64):
        out, _ = run(tensors, labels, ids, needs=needs, reference_logps=reference.to(dtype))
        found = (out.loss, out.losses, out.chosen_logps, out.pairs.ref_chosen, out.pairs.margin, out.chosen_rewards)
        assert {x.dtype for x in found} == {torch.float32}


def test_a_pair_of_fp16_references_under_autocast():
    tensors, labels, ids, reference = make()
    halves = reference.half().tensor_split(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = run(tensors, labels, ids, reference_logps=halves)
    assert torch.equal(torch.cat([out.pairs.ref_chosen, out.pairs.ref_rejected]), reference.half().float())


def test_a_mean_length_keeps_the_digits_of_fp64():
    tensors, labels, ids, _ = make(dtype=torch.float64)
    out, _ = run(tensors, labels, ids, loss="sft", mean_chosen_length=10 / 3)
    assert out.loss.item() == pytest.approx(-out.chosen_logps.mean().item() * 0.3, rel=1e-12)


@pytest.mark.parametrize("wrong", ["4", -1.0, math.nan, torch.ones(2)], ids=str)
def test_a_mean_length_is_a_number(wrong):
    tensors, labels, ids, _ = make()
    with pytest.raises((ValueError, TypeError), match="mean_chosen_length"):
        run(tensors, labels, ids, loss="sft", mean_chosen_length=wrong)


def test_scaled_loss_double_use_and_second_backward():
    tensors, labels, ids, reference = make()
    _, once = run(tensors, labels, ids, reference_logps=reference)
    _, thrice = run(tensors, labels, ids, reference_logps=reference, scale=3.0)
    torch.testing.assert_close(thrice["weight"], 3 * once["weight"])
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"]
    weight.requires_grad_()
    out = linear_preference_loss(hidden, weight, labels, ids, 3, reference_logps=reference)
    (out.loss + out.loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward.*call the function again"):
        out.loss.backward()


def test_a_frozen_backbone():
    tensors, labels, ids, reference = make()
    out, gradients = run(tensors, labels, ids, needs=("weight",), reference_logps=reference)
    _, everything = run(tensors, labels, ids, reference_logps=reference)
    assert out.plan.gemms == 2
    torch.testing.assert_close(gradients["weight"], everything["weight"])


def test_pairs_beyond_the_hinge_cost_no_backward_gemm():
    tensors, labels, ids, reference = make()
    pushed = reference.clone()
    pushed[:3] -= 1e4  # chosen far above the reference: margin far beyond 1 / beta
    for reference_logps, gemms in ((reference, 3), (pushed, 1)):
        with FlopCounterMode(display=False) as counter:
            hidden, weight = (tensors[k].clone().requires_grad_() for k in ("hidden", "weight"))
            linear_preference_loss(hidden, weight, labels, ids, 3, reference_logps=reference_logps, loss="hinge")
        assert counter.get_total_flops() == gemms * 2 * len(labels) * 16 * 301


@pytest.mark.parametrize("plan", PLANS)
def test_flops_are_the_plans(plan):
    case = {"loss": "sigmoid", "lengths": (50, 30, 70, 40, 60, 20), **PLANS[plan]}
    tensors, labels, ids, reference = make(lengths=case["lengths"], H=32, V=case.get("V", 301))
    needs = [k for k in case["needs"] if k in ("hidden", "weight")]
    leaves = {k: tensors[k].requires_grad_(k in needs) for k in ("hidden", "weight")}
    with FlopCounterMode(display=False) as counter:
        out = linear_preference_loss(
            *leaves.values(), labels, ids, 3, reference_logps=reference, loss=case["loss"], tile_mib=1
        )
        if needs:
            out.loss.backward()
    assert out.plan.name == plan
    assert abs(counter.get_total_flops() / out.plan.flops - 1) < 0.02


def test_work_space_is_one_tile():
    """Beyond inputs and returned gradients nothing of the size of (N, V) or a second (V, H) is ever allocated."""
    from torch.profiler import ProfilerActivity, profile

    tensors, labels, ids, reference = make(lengths=(100,) * 20, H=64, V=4000)
    hidden, weight = (tensors[k].requires_grad_() for k in ("hidden", "weight"))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        out = linear_preference_loss(hidden, weight, labels, ids, 10, reference_logps=reference, tile_mib=4)
        out.loss.backward()
    sizes = sorted((e.cpu_memory_usage for e in trace.events() if e.cpu_memory_usage > 0), reverse=True)
    assert max(sizes) <= 4.4 * 2**20
    plan = plan_head(2000, 64, 4000, pair_lengths=[200] * 10, tile_mib=4, device_type="cpu")
    assert plan.workspace_bytes <= 4.4 * 2**20


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "recompute"])
def test_compile_has_no_graph_break(needs):
    tensors, labels, ids, reference = make()
    leaves = {k: tensors[k].requires_grad_(k in needs) for k in ("hidden", "weight")}

    def loss(hidden, weight):
        return linear_preference_loss(hidden, weight, labels, ids, 3, reference_logps=reference).loss

    expected = loss(**leaves)
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(**leaves)
    torch.testing.assert_close(found, expected)
    pair = [torch.autograd.grad(x, [leaves[k] for k in needs]) for x in (expected, found)]
    for a, b in zip(*pair, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast():
    tensors, labels, ids, reference = make()
    hidden, weight = (tensors[k].requires_grad_() for k in ("hidden", "weight"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_preference_loss(hidden, weight, labels, ids, 3, reference_logps=reference)
    rounded = hidden.detach().bfloat16(), weight.detach().bfloat16().requires_grad_()
    half = linear_preference_loss(*rounded, labels, ids, 3, reference_logps=reference)
    assert torch.equal(out.losses, half.losses)
    out.loss.backward()
    assert weight.grad.dtype == torch.float32


def test_grouping_and_chunks():
    ids = torch.tensor([3, 0, 1, 1, 2, 0])  # pairs (0, 2) and (1, 3)
    pairs = Comparisons.make("op", 2, None, None, "cpu")
    tokens = group_tokens(torch.zeros(6, dtype=torch.int64), torch.ones(6) > 0, ids, pairs, None)
    assert tokens.sizes == ((2, 1), (2, 1)) and ids[tokens.order].tolist() == [0, 0, 2, 1, 1, 3]
    assert (
        group_tokens(torch.zeros(3, dtype=torch.int64), torch.ones(3) > 0, torch.tensor([0, 2, 3]), pairs, None).order
        is None
    )
    sizes = [(2, 1), (0, 0), (3, 3), (9, 9), (1, 1)]
    found = [(p.start, p.stop, t.start, t.stop) for p, t in chunks_of_groups(sizes, 9)]
    assert found == [(0, 3, 0, 9), (3, 4, 9, 27), (4, 5, 27, 29)]


@pytest.mark.parametrize("name", [*NAMES, "reference_logps", "reference_token_logps"])
def test_checking_refuses_what_is_not_finite(name, monkeypatch):
    monkeypatch.setenv("DPO_FAST_CHECK", "1")
    tensors, labels, ids, reference = make()
    references = dict(reference_logps=reference, reference_token_logps=-torch.ones(27))
    kept = name if name in references else "reference_logps"
    references = {kept: references[kept]}
    run(tensors, labels, ids, **references)
    {**tensors, **references}[name].view(-1)[0] = float("nan")
    said = {"down": "low_rank[0]", "up": "low_rank[1]"}.get(name, name)
    for needs in (NAMES, ()):
        with pytest.raises(ValueError, match=re.escape(f"{said} holds 1 non-finite")):
            run(tensors, labels, ids, needs=needs, **references)


BAD = {
    "pairs": (dict(num_pairs=0), "num_pairs must be a positive int"),
    "ids": (dict(num_pairs=2), r"sequence_ids must be in \[0, 4\) for num_pairs=2, got 0 to 5"),
    "reference shape": (dict(reference_logps=torch.zeros(3)), r"reference_logps must have shape \(6\), got \(3,\)"),
    "reference halves": (dict(reference_logps=(torch.zeros(3), torch.zeros(2))), r"reference_logps\[1\] must have"),
    "reference thirds": (dict(reference_logps=[torch.zeros(2)] * 3), "a pair of them, got 3 elements"),
    "knob beside an objective": (
        dict(loss=Objective(), beta=0.5),
        "loss is an Objective, which has its own beta; give it there",
    ),
    "reference missing": (dict(reference_logps=None), "loss sigmoid needs reference_logps, got None"),
    "both": (dict(reference_token_logps=torch.zeros(27)), "not both"),
    "lengths": (dict(sequence_lengths=[1] * 6), "sequence_lengths must be 6 counts that sum to N=27"),
    "other lengths": (dict(sequence_lengths=[4, 4, 7, 4, 6, 2]), r"counts in sequence_ids, \[5, 3, 7, 4, 6, 2\], got"),
    "order that is none": (dict(sequence_order=[0, 1, 2, 3, 4, 4]), r"a list of all sequences in \[0, 6\), got \[0, 1"),
    "order of others": (dict(sequence_order=[5, 4, 3, 2, 1, 0]), "must be the order of runs in sequence_ids, "),
    "order on a device": (dict(sequence_order=torch.arange(6)), "must be a list of all sequences"),
    "loss": (dict(loss="dpo"), "loss must be one of"),
    "outputs": (dict(outputs=("entropi",)), "outputs must be"),
    "labels": (dict(labels=torch.full((27,), 301)), "outside"),
    "knob": (dict(ld_alpha=2.0), "ld_alpha must be in"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    tensors, labels, ids, reference = make()
    tensors["weight"].requires_grad_()
    wrong, message = BAD[case]
    arguments = dict(labels=labels, sequence_ids=ids, num_pairs=3, reference_logps=reference)
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(tensors["hidden"], tensors["weight"], **{**arguments, **wrong})
