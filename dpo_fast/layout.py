"""Stage 1, the shared-prefix layout: P pairs as one packed row, each prompt once, no padding.

    p0 p0 p0 c0 c0 r0 r0 r0  p1 p1 c1 r1 r1 ...      prefix, chosen branch, rejected branch, next pair
     0  1  2  3  4  3  4  5   0  1  2  2  3 ...      positions: both branches continue from their prefix

The prefix is the longest common prefix of the two whole sequences: the prompt, and what the completions begin with in
common, if anything. Prompts that truncation has cut differently share nothing: such a pair is two sequences in a row.
Attention (attention.py): a prefix attends to itself, a branch to its prefix and itself, causally; nothing else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batch import PreferenceBatch, TokenPair, reference_logps


class CalledModules:
    """The modules that called the attention function with a layout. A class of its own, for wrappers that copy the
    sets, lists and dicts that they are handed: every copy of a layout notes here."""

    def __init__(self):
        self.modules: set = set()


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Where each pair lies in the packed row. `pairs` is host-side: nothing on the CPU path waits for a device."""

    pairs: tuple[tuple[int, int, int], ...]  # (prefix, chosen branch, rejected branch) lengths
    # For variable-length attention, in the order of the row: a pair's first sequence is prefix + chosen branch, its
    # second the rejected branch, whose keys are the prefix's once more and its own
    query_ends: Tensor  # (2P + 1,) int32 cumulative query lengths: prefix + chosen, rejected, ...
    key_ends: Tensor  # (2P + 1,) int32 cumulative key lengths: prefix + chosen, prefix + rejected, ...
    key_index: Tensor  # (S + sum of prefixes,) int64 positions in the row of those keys
    # For block masks: which branch of which pair a position belongs to
    pair_ids: Tensor  # (S,) int32
    branches: Tensor  # (S,) int32: 0 prefix, 1 chosen, 2 rejected
    positions: Tensor  # (S,) int32 position within the sequence
    cache: dict = field(default_factory=dict, compare=False, repr=False)  # what every layer needs again
    called: CalledModules = field(default_factory=CalledModules, compare=False, repr=False)

    @property
    def length(self) -> int:
        """S, tokens in the row."""
        return len(self.positions)

    @property
    def longest(self) -> tuple[int, int]:
        """Longest query run and longest key run of variable-length attention."""
        if "longest" not in self.cache:  # every layer asks
            queries = max(max(p + c, r) for p, c, r in self.pairs)
            self.cache["longest"] = queries, max(max(p + c, p + r) for p, c, r in self.pairs)
        return self.cache["longest"]

    def _map(self, function) -> "SharedPrefixLayout":
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return SharedPrefixLayout(self.pairs, **tensors, called=self.called)

    def to(self, device, non_blocking: bool = False) -> "SharedPrefixLayout":
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def on(self, device: torch.device) -> "SharedPrefixLayout":
        """The same on `device`, made once: layers of a model may be spread over several."""
        if self.key_index.device == device:
            return self
        if device not in self.cache:
            self.cache[device] = self.to(device)
        return self.cache[device]

    def pin_memory(self) -> "SharedPrefixLayout":
        return self._map(Tensor.pin_memory)


def make_layout(pairs: Sequence[tuple[int, int, int]]) -> SharedPrefixLayout:
    """The layout of pairs with these (prefix, chosen branch, rejected branch) lengths."""
    queries, keys, key_index, pair_ids, branches, positions = [0], [0], [], [], [], []
    start = 0
    for index, (p, c, r) in enumerate(pairs):
        first, second = range(start, start + p + c), range(start + p + c, start + p + c + r)
        queries += [queries[-1] + p + c, queries[-1] + p + c + r]
        keys += [keys[-1] + p + c, keys[-1] + p + c + p + r]
        key_index += [*first, *range(start, start + p), *second]
        pair_ids += [index] * (p + c + r)
        branches += [0] * p + [1] * c + [2] * r
        positions += [*range(p + c), *range(p, p + r)]
        start += p + c + r

    def tensor(values, dtype=torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    return SharedPrefixLayout(
        pairs=tuple(pairs),
        query_ends=tensor(queries),
        key_ends=tensor(keys),
        key_index=tensor(key_index, torch.int64),
        pair_ids=tensor(pair_ids),
        branches=tensor(branches),
        positions=tensor(positions),
    )


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shared_prefix_batch(pairs: Iterable[TokenPair]) -> PreferenceBatch:
    """Lay pairs out as one packed row, see above. What is scored, and in which sequence, is as in `padded_batch`.

    Scored tokens come pair by pair, chosen before rejected. A shared completion token is run once and scored twice.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError("shared_prefix_batch: got no pairs, expected at least one")
    row, lengths, targets, sequence_ids, predictors = [], [], [], [], []
    counts = [0] * (2 * len(pairs))
    for index, pair in enumerate(pairs):
        sequences = [*pair.chosen_prompt, *pair.chosen], [*pair.rejected_prompt, *pair.rejected]
        prefix, start = common_prefix(*sequences), len(row)
        chosen, rejected = (ids[prefix:] for ids in sequences)
        row += [*sequences[0], *rejected]
        lengths.append((prefix, len(chosen), len(rejected)))
        prompts, offsets = (pair.chosen_prompt, pair.rejected_prompt), (0, len(chosen))
        for branch, (ids, prompt, offset) in enumerate(zip(sequences, prompts, offsets, strict=True)):
            sequence, first = branch * len(pairs) + index, max(len(prompt), 1)
            targets += ids[first:]
            predictors += [start + at + (offset if at >= prefix else 0) for at in range(first - 1, len(ids) - 1)]
            counts[sequence] = max(len(ids) - first, 0)
            sequence_ids += [sequence] * counts[sequence]
    layout = make_layout(lengths)

    def tensor(values) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return PreferenceBatch(
        input_ids=tensor([row]),
        position_ids=layout.positions.long().unsqueeze(0),
        targets=tensor(targets),
        sequence_ids=tensor(sequence_ids),
        predictors=tensor(predictors),
        lengths=tensor(counts),
        host_lengths=tuple(counts),
        reference_logps=reference_logps(pairs),
        layout=layout,
    )


def separate_rows(batch: PreferenceBatch) -> PreferenceBatch:
    """A packed batch as padded rows, [chosen 0..P-1, rejected 0..P-1], for a model that cannot run the packed one.

    What is scored stays as it is, in its order. Made on the batch's device; nothing waits for it.
    """
    layout, P = batch.layout, batch.num_pairs
    width = max(1, *(max(p + c, p + r) for p, c, r in layout.pairs))
    index, lengths, start = [[] for _ in range(2 * P)], [0] * (2 * P), 0
    for i, (p, c, r) in enumerate(layout.pairs):
        rejected = [*range(start, start + p), *range(start + p + c, start + p + c + r)]
        for row, tokens in ((i, [*range(start, start + p + c)]), (P + i, rejected)):
            index[row], lengths[row] = tokens + [start] * (width - len(tokens)), len(tokens)
        start += p + c + r
    device = batch.input_ids.device

    def send(values: list) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64)
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)

    inside = torch.arange(width, device=device) < send(lengths)[:, None]
    ids = batch.input_ids[0][send(index)] if layout.length else batch.input_ids.new_zeros((2 * P, width))
    columns = layout.positions.to(device).index_select(0, batch.predictors.to(device))
    return PreferenceBatch(
        batch,
        input_ids=ids.masked_fill(~inside, 0),
        attention_mask=inside.long(),
        position_ids=None,
        predictors=batch.sequence_ids.to(device) * width + columns,
        layout=None,
    )
