"""Rows, scored tokens and where they are predicted."""

import pickle

import pytest
import torch

from dpo_fast.batch import PreferenceBatch, TokenPair, padded_batch

PAIRS = [TokenPair([5, 6, 7], [8, 9], [5, 6, 7], [10]), TokenPair([11], [12], [11], [13, 14, 15])]


def test_padded_rows():
    batch = padded_batch(PAIRS, pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9], [11, 12, 0, 0, 0], [5, 6, 7, 10, 0], [11, 13, 14, 15, 0]]
    assert batch.attention_mask.sum(1).tolist() == [5, 2, 4, 4]
    assert batch.targets.tolist() == [8, 9, 12, 10, 13, 14, 15]
    assert batch.sequence_ids.tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert batch.lengths.tolist() == [2, 1, 1, 3]
    assert batch.num_pairs == 2 and "reference_logps" not in batch and batch.position_ids is None


def test_predictors_point_at_the_token_before():
    batch = padded_batch(PAIRS, pad_token_id=0, pad_to_multiple_of=4)
    assert batch.input_ids.shape == (4, 8)
    flat = batch.input_ids.flatten()
    assert flat[batch.predictors].tolist() == [7, 8, 11, 7, 11, 13, 14]
    assert flat[batch.predictors + 1].tolist() == batch.targets.tolist()


def test_a_first_token_without_prompt_is_not_scored():
    batch = padded_batch([TokenPair([], [5, 6], [], [7])], pad_token_id=0)
    assert batch.targets.tolist() == [6] and batch.lengths.tolist() == [1, 0]


def test_different_prompts():
    batch = padded_batch([TokenPair([5, 6], [7], [6], [8])], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7], [6, 8, 0]] and batch.targets.tolist() == [7, 8]


def test_the_batch_is_a_dict_that_moves():
    batch = padded_batch(PAIRS, pad_token_id=0)
    for copy in (batch.to("cpu"), pickle.loads(pickle.dumps(batch))):
        assert type(copy) is PreferenceBatch and torch.equal(copy.targets, batch.targets) and copy.layout is None
    with pytest.raises(AttributeError, match="no field 'labels'; fields: input_ids"):
        batch.labels  # noqa: B018
    with pytest.raises(ValueError, match="got no pairs"):
        padded_batch([], pad_token_id=0)
