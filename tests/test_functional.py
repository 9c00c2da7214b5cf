"""A whole DPO step against one written independently: separate rows, full logits, fp64 log-softmax."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model, tiny_pairs

from dpo_fast import attach
from dpo_fast.batch import padded_batch
from dpo_fast.functional import preference_step, score, step_metrics
from dpo_fast.metrics import MetricSums
from dpo_fast.objective import Objective

PAIRS = tiny_pairs(4, seed=1)
BATCH = padded_batch(PAIRS, pad_token_id=0)
SUMS_ROUNDED = 2e-5  # of a difference of log-probs: four sums of up to 64 nats, each rounded to 4e-6


def models(kind="llama"):
    policy, reference = tiny_model(kind, seed=0), tiny_model(kind, seed=1)
    for p in [*policy.parameters(), *reference.parameters()]:
        p.data.mul_(10 if p.ndim > 1 else 1)  # so that log-probs differ by more than rounding
    return policy, reference.requires_grad_(False)


def plain_token_logps(model, prompt, completion):
    """One row, no padding, all logits: (len(completion),) fp64."""
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    at = torch.arange(len(prompt) - 1, ids.shape[1] - 1)
    return logps[at, ids[0, len(prompt) :]]


def plain_dpo_loss(policy, reference, beta):
    losses = []
    for pair in PAIRS:
        chosen = plain_token_logps(policy, pair.chosen_prompt, pair.chosen).sum()
        rejected = plain_token_logps(policy, pair.rejected_prompt, pair.rejected).sum()
        ref_chosen = plain_token_logps(reference, pair.chosen_prompt, pair.chosen).sum()
        ref_rejected = plain_token_logps(reference, pair.rejected_prompt, pair.rejected).sum()
        losses.append(-F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))))
    return torch.stack(losses).mean()


def our_loss(policy, reference, **options):
    with torch.no_grad():
        ref = score(attach(reference), BATCH, ld_alpha=options.get("ld_alpha")).logps
    ld_alpha = options.pop("ld_alpha", None)
    return preference_step(attach(policy), BATCH, Objective(**options), ref, ld_alpha=ld_alpha)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_loss_and_all_gradients_of_a_plain_step(kind):
    policy, reference = models(kind)
    expected = plain_dpo_loss(policy, reference, 0.2)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    step = our_loss(policy, reference, beta=0.2)
    step.loss.backward()
    assert step.pairs.margin.abs().max() > 0.5
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in policy.named_parameters():
        error = (p.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 1e-5, f"{name}: {error:.2e}"


def test_first_loss_is_ln_2():
    policy, _ = models()
    step = our_loss(policy, policy)
    assert abs(step.loss.item() - math.log(2)) < 1e-6
    assert torch.equal(step.pairs.margin, torch.zeros(4))


def test_ld_dpo_weighs_the_tail():
    policy, reference = models()
    step = our_loss(policy, reference, ld_alpha=0.25)
    for i, pair in enumerate(PAIRS):
        shared = min(len(pair.chosen), len(pair.rejected))
        logps = plain_token_logps(policy, pair.rejected_prompt, pair.rejected)
        expected = logps[:shared].sum() + 0.25 * logps[shared:].sum()
        assert step.pairs.rejected[i].item() == pytest.approx(expected.item(), rel=1e-5)
        logps = plain_token_logps(reference, pair.chosen_prompt, pair.chosen)
        expected = logps[:shared].sum() + 0.25 * logps[shared:].sum()
        assert step.pairs.ref_chosen[i].item() == pytest.approx(expected.item(), rel=1e-5)


def test_wpo_weighs_pairs():
    policy, reference = models()
    step, plain = our_loss(policy, reference, use_weighting=True), our_loss(policy, reference)
    for i, pair in enumerate(PAIRS):
        weight = 1.0
        for prompt, completion in ((pair.chosen_prompt, pair.chosen), (pair.rejected_prompt, pair.rejected)):
            ids = torch.tensor([[*prompt, *completion]])
            p = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().softmax(-1)
            picked = p.gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)
            weight *= (picked.log() - p.square().sum(-1).log()).mean().exp().item()
        assert step.losses[i].item() == pytest.approx(weight * plain.losses[i].item(), rel=1e-4)


def test_losses_without_reference():
    policy, _ = models()
    step = preference_step(attach(policy), BATCH, Objective("simpo"))
    step.loss.backward()
    assert step.pairs.ref_chosen is None and policy.lm_head.weight.grad.abs().sum() > 0


def test_metrics_of_a_step():
    policy, reference = models()
    ref = score(attach(reference), BATCH).logps
    step = preference_step(
        attach(policy), BATCH, Objective(beta=0.5), ref, extra_metrics=["entropy", "logits", "mean_token_accuracy"]
    )
    sums = MetricSums()
    sums.add(step_metrics(step, BATCH, Objective(beta=0.5)))
    means = sums.means()
    margin = 0.5 * (step.pairs.chosen - step.pairs.ref_chosen - step.pairs.rejected + step.pairs.ref_rejected)
    assert means["rewards/margins"] == pytest.approx(margin.mean().item(), rel=1e-5, abs=SUMS_ROUNDED)
    assert means["rewards/accuracies"] == (margin > 0).float().mean().item()
    chosen = [i for i, s in enumerate(BATCH.sequence_ids.tolist()) if s < 4]
    assert means["logits/chosen"] == pytest.approx(step.tokens.mean_logits[chosen].mean().item(), rel=1e-4, abs=1e-6)
    assert means["entropy"] == pytest.approx(step.tokens.entropy.mean().item(), rel=1e-5)
    assert "mean_token_accuracy" in means


def test_metrics_of_the_first_pairs_only():
    """As if the batch had held no others: what evaluation needs where ranks are handed repeats."""
    policy, reference = models()
    extra = ["entropy", "logits", "mean_token_accuracy"]

    def means(pairs, first=None):
        batch = padded_batch(pairs, pad_token_id=0)
        ref = score(attach(reference), batch)
        step = preference_step(attach(policy), batch, Objective(), ref, extra_metrics=extra)
        sums = MetricSums()
        sums.add(step_metrics(step, batch, Objective(), first=first))
        return sums.means()

    assert means(PAIRS, first=3) == pytest.approx(means(PAIRS[:3]), rel=1e-5, abs=SUMS_ROUNDED)
    assert means(PAIRS, first=0)["loss"] == 0.0 and means(PAIRS)["loss"] != means(PAIRS[:3])["loss"]
