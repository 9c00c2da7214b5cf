"""Batches by a budget of tokens: each pair once, within the budget, as many for each rank."""

import itertools

import pytest
import torch
from tiny import tiny_rows
from trainers import fast_trainer

pytest.importorskip("datasets")

from dpo_fast.training.sampler import TokenBudgetBatchSampler

LENGTHS = [5, 90, 7, 3, 40, 41, 12, 200, 9, 30]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_pair_once_within_the_budget(grouped, ranks):
    sampler = TokenBudgetBatchSampler(LENGTHS, 100, group_by_length=grouped, multiple_of=ranks)
    batches = list(sampler)
    assert sorted(itertools.chain(*batches)) == list(range(10))
    assert len(batches) == len(sampler) and len(batches) % ranks == 0
    assert all(sum(LENGTHS[i] for i in batch) <= 100 or len(batch) == 1 for batch in batches)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("ranks", [1, 3])
def test_padded_batches_are_as_long_as_their_longest_pair(grouped, ranks):
    sampler = TokenBudgetBatchSampler(LENGTHS, 100, group_by_length=grouped, multiple_of=ranks, padded=True)
    batches = list(sampler)
    assert sorted(itertools.chain(*batches)) == list(range(10)) and len(batches) % ranks == 0
    assert all(len(b) * max(LENGTHS[i] for i in b) <= 100 or len(b) == 1 for b in batches)
    assert max(map(len, batches)) > 2


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_no_batch_of_the_trainer_has_more_positions(tmp_path, layout):
    settings = dict(tokens_per_batch=90, layout=layout, pad_to_multiple_of=4)
    trainer = fast_trainer(tmp_path, train_dataset=tiny_rows(40), **settings)
    batches = list(trainer.get_train_dataloader())
    assert sum(batch.num_pairs for batch in batches) == 40 and max(batch.num_pairs for batch in batches) > 1
    assert all(batch.input_ids.numel() <= 90 or batch.num_pairs == 1 for batch in batches)


def test_like_lengths_share_a_batch():
    batches = TokenBudgetBatchSampler(LENGTHS, 100, group_by_length=True).batches
    spreads = sum(max(LENGTHS[i] for i in b) - min(LENGTHS[i] for i in b) for b in batches)
    mixed = TokenBudgetBatchSampler(LENGTHS, 100).batches
    assert spreads < sum(max(LENGTHS[i] for i in b) - min(LENGTHS[i] for i in b) for b in mixed)


def test_epochs_differ_in_order_alone_and_seeds_in_batches():
    sampler = TokenBudgetBatchSampler(LENGTHS * 5, 100, seed=1)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first and sorted(sampler) == sorted(first)
    assert sorted(TokenBudgetBatchSampler(LENGTHS * 5, 100, seed=2)) != sorted(first)


def test_fewer_pairs_than_ranks_come_twice():
    batches = list(TokenBudgetBatchSampler([4, 5], 100, multiple_of=3))
    assert len(batches) == 3 and {i for b in batches for i in b} == {0, 1}
    with pytest.raises(ValueError, match="tokens_per_batch must be at least 1"):
        TokenBudgetBatchSampler([4], 0)


def train(tmp_path, **options):
    settings = dict(learning_rate=1e-3, num_train_epochs=1, per_device_train_batch_size=4)
    trainer = fast_trainer(tmp_path, **{**settings, **options})
    trainer.train()
    return trainer


def test_the_trainer_fills_batches_and_weighs_pairs_alike(tmp_path):
    """Eight pairs in one optimizer step, in batches of whatever size: the same parameters."""
    whole = train(tmp_path, per_device_train_batch_size=8)
    filled = train(tmp_path, tokens_per_batch=60, gradient_accumulation_steps=100)
    sizes = [len(batch) for batch in filled.get_train_dataloader().batch_sampler.batches]
    assert len(set(sizes)) > 1 and sum(sizes) == 8
    assert filled.state.global_step == whole.state.global_step == 1
    for a, b in zip(whole.model.parameters(), filled.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [dict(), dict(tokens_per_batch=60)], ids=["pairs", "tokens"])
def test_length_grouped_sampling(tmp_path, options):
    trainer = train(tmp_path, train_sampling_strategy="group_by_length", **options)
    assert trainer.state.global_step >= 2
    rows = trainer.train_dataset[:]
    assert rows["length"][0] <= len(rows["prompt_ids"][0]) + len(rows["chosen_ids"][0]) + len(rows["rejected_ids"][0])
