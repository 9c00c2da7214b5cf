"""Metrics: TRL's numbers, exact sums over micro-steps and ranks, one reduction."""

import pytest
import torch
from loss_cases import make_pairs
from no_sync import no_sync
from trl_loss import make_tokens, our_loss, statistics, trl_loss

from dpo_fast.metrics import MetricSums, pair_metrics, token_metrics
from dpo_fast.objective import Objective
from dpo_fast.ops.stats import TokenStats


def test_pair_metrics_are_trls():
    _, _, theirs = trl_loss(["sigmoid"], beta=0.5)
    _, _, pairs, objective = our_loss(["sigmoid"], beta=0.5)
    sums = MetricSums()
    sums.add(pair_metrics(pairs, objective))
    ours = sums.means()
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name][0], rel=1e-5), name


def test_token_metrics_are_trls():
    *_, theirs = trl_loss(["sigmoid"])
    (logps, *_), mask = make_tokens()
    rows, columns = mask[:, 1:].nonzero(as_tuple=True)
    stats = TokenStats(logps[rows, columns], **{k: v[rows, columns] for k, v in statistics(logps).items()})
    sums = MetricSums()
    sums.add(token_metrics(stats, rows, len(mask) // 2))
    means = sums.means()
    assert set(means) == {"entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    for name, value in means.items():
        assert value == pytest.approx(theirs[name][0], rel=1e-5), name


def test_infinite_logits_of_one_side_stay_there():
    stats = TokenStats(torch.zeros(2), mean_logits=torch.tensor([1.0, -torch.inf]))
    sums = MetricSums()
    sums.add(token_metrics(stats, torch.tensor([0, 1]), 1))
    assert sums.means() == {"logits/chosen": 1.0, "logits/rejected": -torch.inf}


def test_accuracy_is_strict():
    pairs = make_pairs()
    same = type(pairs)(pairs.ref_chosen, pairs.ref_rejected, pairs.ref_chosen, pairs.ref_rejected)
    assert pair_metrics(same, Objective())["rewards/accuracies"][0] == 0


def test_token_metrics_are_means_over_tokens():
    ids = torch.tensor([0, 0, 2, 1, 3])
    stats = TokenStats(
        logps=torch.zeros(5),
        entropy=torch.arange(5.0),
        mean_logits=torch.arange(5.0),
        is_top1=torch.tensor([True, False, True, True, True]),
    )
    sums = MetricSums()
    sums.add(token_metrics(stats, ids, 2))
    assert sums.means() == {
        "entropy": 2.0,
        "logits/chosen": pytest.approx(4 / 3),
        "logits/rejected": 3.0,
        "mean_token_accuracy": pytest.approx(2 / 3),
    }
    assert list(token_metrics(TokenStats(torch.zeros(5), entropy=torch.zeros(5)), ids, 2)) == ["entropy"]


def test_uneven_steps_and_ranks_weigh_by_pairs_with_one_reduction():
    objective, parts = Objective(), [make_pairs(P=5, seed=1), make_pairs(P=2, seed=2), make_pairs(P=1, seed=3)]
    ranks = [MetricSums(), MetricSums()]
    for rank, part in zip((0, 0, 1), parts, strict=True):
        ranks[rank].add(pair_metrics(part, objective))
    calls = []

    def all_reduce(packed):
        calls.append(packed.shape)
        return packed + ranks[1].sums

    means = ranks[0].means(all_reduce)
    assert len(calls) == 1
    everything = torch.cat([part.chosen.double() for part in parts])
    assert means["logps/chosen"] == pytest.approx(everything.mean().item(), rel=1e-6)
    assert ranks[0].means() == {}, "starts over"


def test_a_mean_of_nothing_is_zero_and_names_must_not_change():
    sums = MetricSums()
    sums.add({"entropy": (torch.tensor(0.0), torch.tensor(0.0))})
    with pytest.raises(ValueError, match="must keep their names"):
        sums.add({"other": (torch.tensor(0.0), torch.tensor(0.0))})
    assert sums.means() == {"entropy": 0.0}


def test_launches_of_a_step():
    """10 for metrics of pairs; 3 to add up all metrics, and one more for each count of tokens."""
    pairs, objective, sums = make_pairs(), Objective("sigmoid"), MetricSums()
    stats = TokenStats(torch.zeros(4), entropy=torch.ones(4), is_top1=torch.ones(4, dtype=torch.bool))
    ids = torch.tensor([0, 1, 2, 3])
    nothing = TokenStats(torch.zeros(4))
    with no_sync() as stream:
        assert token_metrics(nothing, ids, 2) == {} and not stream.kernels
        of_pairs, of_tokens = pair_metrics(pairs, objective), token_metrics(stats, ids, 2)
        sums.add(of_pairs | of_tokens)
        before = stream.kernels.total()
        sums.add(of_pairs | of_tokens)
        assert stream.kernels.total() - before == 3 + 2
        before = stream.kernels.total()
        pair_metrics(pairs, objective)
        assert stream.kernels.total() - before == 10


def test_counts_stay_exact():
    """2**24 + 1 tokens, which fp32 does not hold, beside sums in fp32."""
    sums = MetricSums()
    sums.add({"entropy": (torch.ones(()), torch.tensor(2**24 + 1)), "loss": (torch.ones(()), torch.ones(()))})
    assert sums.sums[1].tolist() == [2**24 + 1, 1]
