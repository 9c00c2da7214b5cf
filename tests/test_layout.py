"""The packed row: what lies where, what is scored, and that it is the same as in padded rows."""

import dataclasses
import random

import numpy as np
import plain_rows
import pytest
import torch

from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.layout import common_prefix, make_layout, packed_batch, separate_rows, shared_prefix_batch


def pair(prompt, chosen, rejected, rejected_prompt=None, **more):
    return TokenPair(prompt, chosen, prompt if rejected_prompt is None else rejected_prompt, rejected, **more)


CASES = {
    "plain": [pair([1, 2, 3], [4, 5], [6, 7, 8])],
    "two pairs": [pair([1, 2, 3], [4, 5], [6]), pair([9], [8], [7, 6, 5])],
    "completions share a beginning": [pair([1, 2], [3, 4, 5], [3, 4, 6, 7])],
    "one is the beginning of the other": [pair([1, 2], [3, 4], [3, 4, 5])],
    "empty prompt": [pair([], [1, 2, 3], [4, 5])],
    "empty prompt, shared beginning": [pair([], [1, 2, 3], [1, 5])],
    "empty completion": [pair([1, 2], [3, 4], [])],
    "prompts cut differently": [pair([2, 3], [4, 5], [6], rejected_prompt=[1, 2, 3])],
    "prompts that differ and agree at first": [pair([2, 3], [4, 5], [6], rejected_prompt=[2, 9, 3])],
}


def sequences(batch):
    """What a model that sees only a token's own sequence is asked, as a set: (sequence, context, target)."""
    found = []
    ids, positions = batch.input_ids, batch.position_ids
    if positions is None:  # padded rows: the model's own
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
    ids, positions = ids.flatten().tolist(), positions.flatten().tolist()
    for target, sequence, predictor in zip(
        batch.targets.tolist(), batch.sequence_ids.tolist(), batch.predictors.tolist(), strict=True
    ):
        found.append((sequence, positions[predictor], ids[predictor], target))
    return sorted(found)


@pytest.mark.parametrize("name", CASES)
def test_scores_the_same_tokens_as_padded_rows(name):
    packed, padded = shared_prefix_batch(CASES[name]), padded_batch(CASES[name], pad_token_id=0)
    assert sequences(packed) == sequences(padded)
    assert torch.equal(packed.lengths, padded.lengths) and packed.num_pairs == padded.num_pairs
    assert packed.input_ids.shape == (1, packed.layout.length)
    assert packed.input_ids.shape[1] <= int(padded.attention_mask.sum())


@pytest.mark.parametrize("name", CASES)
def test_separate_rows_of_a_packed_one_are_the_padded_batch(name):
    packed, padded = shared_prefix_batch(CASES[name]), padded_batch(CASES[name], pad_token_id=0)
    apart = separate_rows(packed)
    assert apart.layout is None and apart.position_ids is None
    assert torch.equal(apart.input_ids, padded.input_ids)
    assert torch.equal(apart.attention_mask, padded.attention_mask)
    assert sequences(apart) == sequences(padded)
    for name in ("targets", "sequence_ids", "lengths"):
        assert torch.equal(apart[name], packed[name])
    rows = apart.predictors // apart.input_ids.shape[1]
    assert torch.equal(rows, apart.sequence_ids)


def test_copies_of_a_layout_note_in_one_place():
    """Wrappers copy what they hand to layers, some of them field by field."""
    layout = make_layout([(3, 2, 1)])
    for other in (layout.to("cpu"), layout.on(torch.device("meta")), dataclasses.replace(layout)):
        other.called.modules.add(len(layout.called.modules))
    assert len(layout.called.modules) == 3


def test_rows_positions_and_lengths():
    batch = shared_prefix_batch([pair([1, 2, 3], [4, 5], [6, 7, 8]), pair([9], [8, 1], [8, 6])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 1, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 2]]
    assert batch.layout.lengths == (5, 6, 3, 3) and batch.layout.shared == (0, 3, 0, 2)
    assert batch.layout.ids == (0, 2, 1, 3)
    assert batch.predictors.tolist() == [2, 3, 2, 5, 6, 8, 9, 8, 9]
    assert batch.sequence_ids.tolist() == [0, 0, 2, 2, 2, 1, 1, 3, 3]


def test_keys_of_variable_length_attention():
    layout = make_layout([(3, 2, 1), (0, 1, 2)])
    assert layout.query_ends.tolist() == [0, 5, 6, 7, 9]
    assert layout.key_ends.tolist() == [0, 5, 9, 10, 12]
    assert layout.index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8]
    assert layout.longest == (5, 5) and layout.length == 9


def test_moves_between_devices_with_its_batch():
    batch = shared_prefix_batch([pair([1], [2], [3])])
    moved = batch.to("meta")
    assert moved.layout.index.device.type == "meta" and moved.layout.lengths == batch.layout.lengths


def test_layers_on_other_devices_share_one_copy():
    layout = make_layout([(3, 2, 1)])
    elsewhere = layout.on(torch.device("meta"))
    assert layout.on(torch.device("cpu")) is layout and elsewhere is layout.on(torch.device("meta"))
    assert elsewhere.index.device.type == "meta" and elsewhere.shared == layout.shared


def test_errors():
    with pytest.raises(ValueError, match="got no pairs"):
        shared_prefix_batch([])
    assert common_prefix(torch.tensor([1, 2, 3]), torch.tensor([1, 2])) == 2
    assert common_prefix(torch.tensor([]), torch.tensor([1])) == 0


# How token ids may come
KINDS = {
    "list": list,
    "tuple": tuple,
    "numpy": lambda ids: np.array(ids, dtype=np.int64),
    "numpy, 16 bits, every second": lambda ids: np.array([x for x in ids for _ in range(2)], dtype=np.uint16)[::2],
    "torch": lambda ids: torch.tensor(ids, dtype=torch.int32),
    "list of numpy's": lambda ids: [np.int64(x) for x in ids],
}


def assert_is(batch, true):
    """Fields and dtypes, bit for bit."""
    for name in true.keys() - {"shared", "index"}:
        value = batch[name][0] if batch.layout is not None and name in ("input_ids", "position_ids") else batch[name]
        assert value.dtype == torch.int64 and value.is_contiguous() and value.tolist() == true[name], name
    assert batch.host_lengths == tuple(true["lengths"]) and all(type(n) is int for n in batch.host_lengths)
    if batch.layout is not None:
        assert list(batch.layout.shared) == true["shared"] and batch.layout.index.tolist() == true["index"]


def random_ids(rng, longest):
    return [rng.randrange(rng.choice([2, 3, 1000])) for _ in range(rng.randint(0, longest))]


@pytest.mark.parametrize("kind", KINDS)
def test_random_pairs_are_laid_out_as_token_by_token(kind):
    """Empty completions, prompts of no and of one token, prompts cut differently."""
    for seed in range(40):
        rng = random.Random(seed)
        pairs, whole, prompts = [], [], []
        for _ in range(rng.randint(1, 4)):
            prompt = random_ids(rng, rng.choice([0, 1, 5]))
            other = prompt if rng.random() < 0.7 else prompt[rng.randint(0, 2) :]
            ids = prompt, random_ids(rng, 4), other, random_ids(rng, 4)
            pairs.append(TokenPair(*(KINDS[kind](x) for x in ids)))
            whole.append((prompt + ids[1], other + ids[3]))
            prompts.append((len(prompt), len(other)))
        P = len(pairs)
        order = [s for i in range(P) for s in (i, P + i)]
        batch = shared_prefix_batch(pairs)
        assert_is(batch, plain_rows.packed(whole, [n for both in prompts for n in both], order))
        assert batch.host_largest_id == max((x for pair in whole for one in pair for x in one), default=-1)
        sides = [[both[side] for both in of] for of in (whole, prompts) for side in (0, 1)]
        multiple = rng.choice([1, 4])
        true = plain_rows.padded(sides[0] + sides[1], sides[2] + sides[3], 7, multiple)
        assert_is(padded_batch(pairs, 7, multiple), true)


@pytest.mark.parametrize("across", [False, True])
def test_random_groups_are_laid_out_as_token_by_token(across):
    for seed in range(60):
        rng = random.Random(seed)
        groups = [[random_ids(rng, 6) for _ in range(rng.randint(1, 4))] for _ in range(rng.randint(1, 3))]
        flat = [s for group in groups for s in group]
        prompts, order = [rng.randint(0, len(s)) for s in flat], list(range(len(flat)))
        for ids in (None, rng.sample(order, len(order))):
            found = packed_batch(groups, prompts, ids, across, comparisons=[(0, 0)])
            assert_is(found, plain_rows.packed(groups, prompts, ids or order, across))
            assert found.layout.ids == tuple(ids or order) and found.comparisons == ((0, 0),)


def test_batches_are_made_on_the_cpu_whatever_the_default():
    pairs = [TokenPair([5], [6, 7], [5], bytearray([8, 0, 0, 0, 0, 0, 0, 0]))]
    expected = shared_prefix_batch(pairs), padded_batch(pairs, 0)
    with torch.device("meta"):
        found = shared_prefix_batch(pairs), padded_batch(pairs, 0)
    assert expected[1].targets.tolist() == [6, 7, 8, 0, 0, 0, 0, 0, 0, 0]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.targets, other.targets)
    assert found[0].layout.host.tolist() == [[3, 9], [0, 1]]
