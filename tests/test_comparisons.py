"""Comparisons that are not pairs: losses and gradients against fp64 sums, groups, and what is refused."""

import itertools

import pytest
import torch
from tiny import tiny_model

from dpo_fast import Objective, PreferenceBatch, attach, linear_preference_loss, linear_token_logps
from dpo_fast.batch import TokenPair
from dpo_fast.comparisons import Comparisons, pairs_of
from dpo_fast.functional import preference_step, step_metrics
from dpo_fast.layout import pack, shared_prefix_batch
from dpo_fast.logps import PairLogps
from dpo_fast.metrics import token_metrics
from dpo_fast.objective import ld_dpo_token_weights
from dpo_fast.ops.plan import plan_head
from dpo_fast.ops.stats import TokenStats

LENGTHS = [3, 5, 2, 4, 1, 6, 3, 2, 4, 3, 1, 2]
SEVERAL = [(0, 1), (0, 2), (0, 3), (4, 5), (7, 6), (6, 5)]  # 8 to 11 are in none
TWO = [(2, 9), (5, 4)]
GRAPHS = {"several per prompt": SEVERAL, "a few of many": TWO, "one against one": [(11, 0)]}
N, H, V, S = sum(LENGTHS), 12, 37, len(LENGTHS)


def make(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[4] = -100
    ids = torch.arange(S).repeat_interleave(torch.tensor(LENGTHS))
    order = torch.randperm(N, generator=generator)
    reference = -5 + torch.randn(S, generator=generator, dtype=torch.float64)
    return hidden, weight, labels[order], ids[order], reference


def by_hand(hidden, weight, labels, ids, reference, comparisons, loss, **knobs):
    logps = linear_token_logps(hidden, weight, labels, impl="reference")
    scored = (labels != -100).to(torch.int64)
    sums = torch.stack([logps[ids == s].sum() for s in range(S)])
    counts = torch.stack([scored[ids == s].sum() for s in range(S)])
    a, b = torch.tensor(comparisons).T
    pairs = PairLogps(sums[a], sums[b], reference[a], reference[b], counts[a], counts[b])
    return Objective(loss, **knobs)(pairs)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "sft", "orpo", "aot"])
@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("tile", [None, "tiny"])
def test_losses_and_gradients(name, loss, tile, monkeypatch):
    comparisons = GRAPHS[name]
    if tile:
        monkeypatch.setattr("dpo_fast.ops.call.plan_head", with_rows(8))
    found, true = [], []
    for results, run in ((found, linear_preference_loss), (true, by_hand)):
        hidden, weight, labels, ids, reference = make()
        if run is by_hand:
            losses = run(hidden, weight, labels, ids, reference, comparisons, loss)
            loss_value = losses.mean()
        else:
            out = run(
                hidden,
                weight,
                labels,
                ids,
                len(comparisons),
                comparisons=comparisons,
                num_sequences=S,
                reference_logps=reference,
                loss=loss,
            )
            losses, loss_value = out.losses, out.loss
        loss_value.backward()
        results += [losses.detach(), hidden.grad, weight.grad]
    for ours, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def with_rows(rows):
    """`plan_head` whose tiles have few rows: groups are longer than a tile, or share one."""
    import dataclasses

    def plan(*sizes, sequences=2, pair_lengths=None, **knobs):
        found = plan_head(*sizes, sequences=sequences, pair_lengths=pair_lengths, **knobs)
        if found.name != "pairwise":
            return found
        most = max(pair_lengths) if sequences > 2 else rows
        return dataclasses.replace(found, chunk_rows=max(rows, most))

    return plan


@pytest.mark.parametrize("use_weighting", [False, True])
@pytest.mark.parametrize("tokens", [False, True])
def test_pairs_said_as_comparisons_change_no_bit(use_weighting, tokens):
    P, results = S // 2, []
    for knobs in ({}, dict(comparisons=pairs_of(P, "cpu"))):
        hidden, weight, labels, ids, reference = make(torch.float32)
        given = dict(reference_token_logps=-torch.ones(N)) if tokens else dict(reference_logps=reference)
        out = linear_preference_loss(hidden, weight, labels, ids, P, use_weighting=use_weighting, **given, **knobs)
        out.loss.backward()
        results.append([out.losses, out.chosen_logps, out.rejected_rewards, hidden.grad, weight.grad])
    assert all(map(torch.equal, *results))


def test_a_sequence_in_two_comparisons_gets_both_gradients():
    hidden, weight, labels, ids, reference = make()
    knobs = dict(num_sequences=S, reference_logps=reference)
    gradients = []
    for comparisons in ([(0, 1), (0, 2)], [(0, 1)], [(0, 2)]):
        out = linear_preference_loss(hidden, weight, labels, ids, len(comparisons), comparisons=comparisons, **knobs)
        gradients.append(torch.autograd.grad(out.loss, hidden)[0])
    both, first, second = gradients
    torch.testing.assert_close(both, (first + second) / 2)


def test_groups_are_what_comparisons_connect():
    groups = Comparisons.make("op", 6, SEVERAL, S, "cpu").groups()
    assert groups.sequences == list(range(12))
    assert groups.sequence_ends == [0, 4, 8, 9, 10, 11, 12] and groups.comparison_ends == [0, 3, 6, 6, 6, 6, 6]
    groups = Comparisons.make("op", 3, [(5, 0), (2, 3), (0, 4)], 6, "cpu").groups()
    assert groups.sequences == [0, 4, 5, 1, 2, 3] and groups.rank.tolist() == [0, 3, 4, 5, 1, 2]
    assert groups.order.tolist() == [0, 2, 1] and groups.comparison_ends == [0, 2, 2, 3]
    pairs = Comparisons.make("op", 3, None, None, "cpu").groups()
    said = Comparisons.make("op", 3, pairs_of(3, "cpu"), None, "cpu").groups()
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(pairs, said, strict=True))


def test_the_token_weights_of_ld_dpo_need_one_partner():
    hidden, weight, labels, ids, reference = make()
    call = dict(num_sequences=S, reference_logps=reference, ld_alpha=0.5)
    with pytest.raises(ValueError, match="of which a sequence in several comparisons has several"):
        linear_preference_loss(hidden, weight, labels, ids, 6, comparisons=SEVERAL, **call)
    linear_preference_loss(hidden, weight, labels, ids, 2, comparisons=TWO, **call)
    lengths, which = torch.tensor([3, 1, 2, 2]), torch.tensor([[0, 2]])
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3])
    weights = ld_dpo_token_weights(ids, lengths, 0.5, comparisons=which)
    assert weights.tolist() == [1, 1, 0.5, 1, 1, 1, 1, 1]  # who is in no comparison keeps its weights


def test_large_groups_longer_than_a_tile_do_not_pend():
    plan = dict(N=4096, H=64, V=32_000, pair_lengths=[2500], device_type="cpu")
    assert plan_head(**plan).name == "pending"
    assert plan_head(**plan, sequences=4).name == "recompute"


def test_means_over_tokens_count_a_sequence_per_comparison():
    stats = TokenStats(torch.zeros(4), mean_logits=torch.tensor([1.0, 2.0, 3.0, 10.0]))
    ids = torch.tensor([0, 1, 2, 3])
    three = Comparisons.make("op", 3, [(0, 1), (0, 2), (1, 2)], 4, "cpu")
    found = token_metrics(stats, ids, 3, three)
    assert [x.item() for x in found["logits/chosen"]] == [1 + 1 + 2, 3]
    assert [x.item() for x in found["logits/rejected"]] == [2 + 3 + 3, 3]


@pytest.mark.parametrize(
    "given, sequences, message",
    [
        ([(0, 0)], None, "two different sequences"),
        ([(0, 9)], 4, "in \\[0, 4\\)"),
        ([(-1, 1)], 4, "in \\[0, 4\\)"),
        ([(0, 1), (2, 3)], None, "shape \\(num_pairs, 2\\)"),
        ([(0.0, 1.0)], None, "must be integers"),
        (None, 3, "1 pairs are of 2 sequences"),
    ],
)
def test_comparisons_out_of_range(given, sequences, message):
    with pytest.raises(ValueError, match=message):
        Comparisons.make("op", 1, given, sequences, "cpu")


def test_a_batch_with_comparisons_through_a_model():
    """Four completions of one prompt in one row, compared with each other, are as pairs that are laid out apart."""
    model = attach(tiny_model())
    prompt, answers = [3, 4, 5, 6], [[7, 8], [9], [10, 11, 12], [13, 7]]
    comparisons = [(0, 1), (0, 2), (3, 2)]
    row, layout = pack([[prompt + answer for answer in answers]])
    lengths = torch.tensor([len(answer) for answer in answers])
    starts = layout.key_ends.tolist()
    batch = PreferenceBatch(
        input_ids=row,
        position_ids=layout.positions.long()[None],
        targets=torch.tensor([token for answer in answers for token in answer]),
        sequence_ids=torch.arange(4).repeat_interleave(lengths),
        predictors=torch.cat([layout.index[a + 3 : b - 1] for a, b in itertools.pairwise(starts)]),
        lengths=lengths,
        host_lengths=tuple(lengths.tolist()),
        reference_logps=None,
        layout=layout,
        comparisons=tuple(comparisons),
    )
    assert batch.num_pairs == 3 and batch.num_chosen_tokens == 2 + 2 + 2
    pairs = [TokenPair(prompt, answers[a], prompt, answers[b]) for a, b in comparisons]
    apart, objective, found = shared_prefix_batch(pairs), Objective("ipo"), []
    for one, reference in ((batch, -torch.arange(4.0)), (apart, -torch.tensor([0.0, 0, 3, 1, 2, 2]))):
        step = preference_step(model, one, objective, reference)
        gradients = torch.autograd.grad(step.loss, list(model.parameters()))
        metrics = step_metrics(step, one, objective)
        found.append([step.losses.detach(), *gradients, *(total / weight for total, weight in metrics.values())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
