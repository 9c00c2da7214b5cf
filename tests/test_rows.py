"""Stacked rows as a packed row: the same as token by token, wherever the padding is; the host reads once."""

import random

import plain_rows
import pytest
import torch
from no_sync import no_sync

from dpo_fast import rows
from dpo_fast.layout import SharedPrefixLayout, separate_rows


def random_sequences(rng, count: int) -> tuple[list, int]:
    """(token ids of each, the number of different ones): many begin alike."""
    few, width = rng.choice([2, 3, 1000]), rng.randint(1, 9)
    begin = [rng.randrange(few) for _ in range(rng.randint(0, width))]
    sequences = [[rng.randrange(few) for _ in range(rng.randint(1, width))] for _ in range(count)]
    return [(begin[: rng.randint(0, len(begin))] + tokens)[:width] for tokens in sequences], width


def stacked(rng, sequences, width, side):
    """(ids, mask, labels), with junk in the padding, and where each sequence begins."""
    width += rng.randint(0, 2)
    space = [width - len(tokens) for tokens in sequences]
    begins = {"right": [0] * len(space), "left": space, "either": [rng.randint(0, n) for n in space]}[side]
    ids = torch.tensor([[rng.choice([0, 7, -100]) for _ in range(width)] for _ in sequences])
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (begin, tokens) in enumerate(zip(begins, sequences, strict=True)):
        place = slice(begin, begin + len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
        labels[row, place] = torch.tensor([x if rng.random() < 0.6 else -100 for x in tokens])
    return (ids, mask, labels), begins


@pytest.mark.parametrize("side", ["right", "left", "either"])
@pytest.mark.parametrize("pairs", [True, False])
def test_random_rows_are_packed_as_token_by_token(pairs, side):
    for seed in range(100):
        rng = random.Random(seed)
        sequences, width = random_sequences(rng, 2 * rng.randint(1, 4) - (0 if pairs else rng.randint(0, 1)))
        (ids, mask, labels), begins = stacked(rng, sequences, width, side)
        found = rows.packed_rows(ids, mask.to(rng.choice([torch.int64, torch.bool, torch.float32])), labels, pairs)
        P, order, width = len(ids) // 2, list(found.layout.ids), ids.shape[1]
        groups = [(sequences[i], sequences[P + i]) for i in range(P)] if pairs else [[sequences[i] for i in order]]
        true = plain_rows.packed(groups, [1] * len(order), order)
        assert sorted(order) == list(range(len(ids)))
        assert found.input_ids.tolist() == [true["input_ids"]] and found.field_shape == (len(ids), width - 1)
        assert found.position_ids.tolist() == [true["position_ids"]]
        assert found.layout.index.tolist() == true["index"] and list(found.layout.shared) == true["shared"]
        # Of what `packed` scores, which is all but first tokens, what has a label
        scored = [
            (i, row, begins[row] + t)
            for i, (row, t) in enumerate((row, t) for row in order for t in range(1, len(sequences[row])))
            if labels[row, begins[row] + t] != -100
        ]
        assert found.predictors.tolist() == [true["predictors"][i] for i, _, _ in scored]
        assert found.targets.tolist() == [labels[row, t].item() for _, row, t in scored]
        assert found.places.tolist() == [row * (width - 1) + t - 1 for _, row, t in scored]
        assert found.sequence_ids.tolist() == [row for _, row, _ in scored]
        counts = [sum(one == row for _, one, _ in scored) for row in range(len(ids))]
        assert found.lengths.tolist() == counts == list(found.host_lengths)
        assert found.host_largest_id == max(max(max(tokens) for tokens in sequences), 0)
        assert {x.dtype for x in (found.input_ids, found.position_ids, found.places)} == {torch.int64}
        assert separate_rows(found).input_ids.shape == (len(ids), max(map(len, sequences)))


def test_equal_beginnings_run_once():
    """A prefix tree's every edge lies in the row once, whatever the order of the rows."""
    for seed in range(50):
        rng = random.Random(seed)
        sequences, width = random_sequences(rng, rng.randint(1, 12))
        (ids, mask, labels), _ = stacked(rng, sequences, width, "right")
        tree = {tuple(tokens[:n]) for tokens in sequences for n in range(1, len(tokens) + 1)}
        assert rows.packed_rows(ids, mask, labels, pairs=False).layout.length == len(tree)


IDS = torch.tensor([[5, 6, 0], [5, 7, 0]])
MASK = torch.tensor([[1, 1, 0], [1, 1, 0]])
LABELS = torch.tensor([[-100, 6, -100]] * 2)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda ids, mask, labels: (ids, mask * torch.tensor([[1], [0]]), labels), "attention_mask is not one run"),
        (lambda ids, mask, labels: (ids, mask.index_fill(1, torch.tensor([2]), 2), labels), "attention_mask"),
        (lambda ids, mask, labels: (ids, torch.tensor([[1, 0, 1], [1, 1, 0]]), labels), "attention_mask"),
        (lambda ids, mask, labels: (ids, mask * 2, labels), "attention_mask"),
        (lambda ids, mask, labels: (ids, mask, labels.index_fill(1, torch.tensor([2]), 7)), "labels are not -100"),
        (lambda ids, mask, labels: (ids - 6, mask, labels), "input_ids are at least 0, got -1"),
    ],
    ids=["an empty row", "a two", "a hole", "a mask of twos", "a label on padding", "a negative id"],
)
def test_rows_that_are_no_sequences_are_refused(change, named):
    assert not isinstance(rows.packed_rows(IDS, MASK, LABELS), str)
    assert rows.packed_rows(*change(IDS, MASK, LABELS)).startswith(named)


@pytest.mark.parametrize("pairs", [True, False])
def test_the_host_reads_once(monkeypatch, pairs):
    read = []
    monkeypatch.setattr(
        torch.Tensor, "tolist", lambda x, tolist=torch.Tensor.tolist: read.append(x.numel()) or tolist(x)
    )
    rng = random.Random(3)
    sequences, width = random_sequences(rng, 6)
    batch, _ = stacked(rng, sequences, width, "either")
    with no_sync() as stream:
        monkeypatch.setattr(stream, "refuse", lambda what: what == "Tensor.tolist" or pytest.fail(what))
        monkeypatch.setattr(SharedPrefixLayout, "make", paused(stream, SharedPrefixLayout.make))
        rows.packed_rows(*batch, pairs)
    shared = 3 if pairs else 36
    assert read[0] == 2 * 6 + shared + 4  # what follows is of the layout, on the host


def paused(stream, function):
    def on_the_host(*args):
        with stream.paused():
            return function(*args)

    return on_the_host


def test_rows_as_they_come():
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    labels = torch.tensor([[-100, 8, 9, -100], [-100, -100, 3, 4]])
    inputs = dict(input_ids=labels.clamp(0), attention_mask=mask, pixel_values=torch.ones(2, 3))
    batch = rows.padded_rows(inputs, labels)
    assert batch.predictors.tolist() == [0, 1, 5, 6] and batch.targets.tolist() == [8, 9, 3, 4]
    assert batch.places.tolist() == [0, 1, 4, 5] and batch.lengths.tolist() == [2, 2]
    assert batch.model_inputs.keys() == {"pixel_values"} and batch.layout is None
    assert rows.spread(batch.targets, batch).tolist() == [[8, 9, 0], [0, 3, 4]]
