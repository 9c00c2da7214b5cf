"""Stage 1, the shared-prefix layout: sequences in one packed row, what they begin with in common once, no padding.

    p0 p0 p0 c0 c0 r0 r0 r0  p1 p1 c1 r1 r1 ...      prefix, chosen branch, rejected branch, next pair
     0  1  2  3  4  3  4  5   0  1  2  2  3 ...      positions: both branches continue from their prefix

A layout is two integers per sequence: its length, and how many of its first tokens it shares with the sequence before
it. The row holds the others. Sequences in depth-first order describe any tree of prefixes in this way:

    a pair                              (p + c, 0) (p + r, p)
    several completions of a prompt     (p + a, 0) (p + b, p) (p + c, p)
    a system prompt over two prompts    (s + p + a, 0) (s + p + b, s + p) (s + q + c, s) (s + q + d, s + q)

Of a pair, what is shared is the longest common prefix of the two whole sequences: the prompt, and what the completions
begin with in common, if anything. Prompts that truncation has cut differently share nothing: two sequences in a row.
Attention (attention.py): a token attends to the tokens before it in a sequence that both belong to; nothing else.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import transfer
from .batch import Ids, PreferenceBatch, TokenPair, check_pairs, largest_id, no_ids, on_host, token_ids, whole_sequences


class CalledModules:
    """The modules that called the attention function with a layout. A class of its own, for wrappers that copy the
    sets, lists and dicts that they are handed: every copy of a layout notes here."""

    def __init__(self):
        self.modules: set = set()


@dataclass
class ForLayers:
    """What the first layer of a model makes of a layout, and the others take."""

    masks: dict = field(default_factory=dict)  # (queries, keys, window) -> (n, m) bool
    block_masks: dict = field(default_factory=dict)  # window -> FlexAttention's
    caps: dict = field(default_factory=dict)  # (soft-cap, dtype) -> FlexAttention's score_mod


@dataclass(frozen=True)
class SharedPrefixLayout:
    """Where S sequences lie in a packed row of T tokens. Tuples are host-side: nothing on the CPU path waits for a
    device. A sequence's own tokens are those that it does not share with the sequence before it: a run of the row."""

    lengths: tuple[int, ...]  # tokens of each sequence, in the order of the row
    shared: tuple[int, ...]  # of these, how many first ones it shares with the sequence before it
    ids: tuple[int, ...]  # which of the batch's sequences each is
    paths: tuple[tuple[tuple[int, int], ...], ...]  # what each shares: (s, n), the first n own tokens of sequence s
    index: Tensor  # (sum of lengths,) int64 where in the row each sequence's tokens are, one sequence after the other
    positions: Tensor  # (T,) int32 position within the sequence
    until: Tensor  # (T,) int32 where in the row the sequences that contain this token end
    query_ends: Tensor  # (S + 1,) int32 cumulative numbers of own tokens
    key_ends: Tensor  # (S + 1,) int32 cumulative lengths
    runs: (
        Tensor  # (R, 3, S) int32: a sequence is at most R runs of the row, its own tokens' first: begin, end, position
    )
    # For compiled graphs, which hold tuples fast but may leave numbers and tensors open
    longest: tuple[int, int]  # query run and key run of variable-length attention
    host: Tensor  # (2, S) int64 on the host: lengths and shared
    copies: dict = field(default_factory=dict, compare=False, repr=False)  # device -> this layout there
    kept: ForLayers = field(default_factory=ForLayers, compare=False, repr=False)
    called: CalledModules = field(default_factory=CalledModules, compare=False, repr=False)

    @classmethod
    @on_host
    def make(
        cls, lengths: Sequence[int], shared: Sequence[int], ids: Sequence[int] | None = None
    ) -> "SharedPrefixLayout":
        """ids: None: the batch's sequences in their order. ValueError where one shares more than two sequences have."""
        lengths, shared = tuple(lengths), tuple(shared)
        if len(lengths) != len(shared) or any(
            not 0 <= k <= min(n, before) for n, k, before in zip(lengths, shared, (0, *lengths[:-1]), strict=True)
        ):
            raise ValueError(
                "a sequence shares between 0 and all tokens with the one before it, and the first none; "
                f"got lengths {lengths}, shared {shared}"
            )
        own = [n - k for n, k in zip(lengths, shared, strict=True)]
        starts = [0, *torch.tensor(own, dtype=torch.int64).cumsum(0).tolist()]
        until = torch.empty(starts[-1], dtype=torch.int32)
        paths, pieces, runs = [], [], []
        path: list[tuple[int, int]] = []
        for s, (n, k) in enumerate(zip(lengths, shared, strict=True)):
            paths.append(tuple(_first_tokens(path, k)))
            path = [*paths[-1], (s, n - k)]
            whole = [(starts[piece], starts[piece] + taken) for piece, taken in path]
            for begin, end in whole:
                until[begin:end] = starts[s + 1]
            pieces += whole
            runs.append(_joined(whole))
        width = max(map(len, runs), default=1)
        filled = [[*of_one, *[(0, 0, 0)] * (width - len(of_one))] for of_one in runs]

        def aranges(bounds, dtype) -> Tensor:
            return torch.cat([torch.arange(0, dtype=dtype), *(torch.arange(a, b, dtype=dtype) for a, b in bounds)])

        def ends(counts) -> Tensor:
            return torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)

        return cls(
            lengths,
            shared,
            tuple(range(len(lengths)) if ids is None else ids),
            tuple(paths),
            index=aranges(pieces, torch.int64),
            positions=aranges(zip(shared, lengths, strict=True), torch.int32),
            until=until,
            query_ends=ends(own),
            key_ends=ends(lengths),
            runs=torch.tensor(filled, dtype=torch.int32).view(-1, width, 3).permute(1, 2, 0).contiguous(),
            longest=(max(own, default=0), max(lengths, default=0)),
            host=torch.tensor([lengths, shared], dtype=torch.int64),
        )

    @property
    def length(self) -> int:
        """T, tokens in the row."""
        return len(self.positions)

    @property
    def own(self) -> list[int]:
        """Tokens of each sequence that it does not share with the one before it: what it adds to the row."""
        return [n - k for n, k in zip(self.lengths, self.shared, strict=True)]

    def sequences_per_token(self) -> Tensor:
        """(T,) fp32: how many sequences contain each token of the row."""
        once = torch.ones(self.index.shape, device=self.index.device)
        return once.new_zeros(self.length).index_add_(0, self.index, once)

    def tensors(self) -> list[Tensor]:
        """Those that travel with the row: `host` stays."""
        return list(self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and name != "host"}

    def map(self, function: Callable[[Tensor], Tensor]) -> "SharedPrefixLayout":
        """This layout with `function` of each of its tensors."""
        tensors: Any = {name: function(x) for name, x in self._tensors().items()}
        return replace(self, **tensors, copies={}, kept=ForLayers())

    def to(self, device, non_blocking: bool = False) -> "SharedPrefixLayout":
        return self.map(transfer.mover(self.tensors(), device, non_blocking))

    def on(self, device: torch.device) -> "SharedPrefixLayout":
        """The same on `device`, made once: layers of a model may be spread over several."""
        if self.index.device == device:
            return self
        if device not in self.copies:
            self.copies[device] = self.to(device)
        return self.copies[device]

    def pin_memory(self) -> "SharedPrefixLayout":
        return self.map(transfer.pinned(self.tensors()))


def _first_tokens(path: Sequence[tuple[int, int]], count: int) -> list[tuple[int, int]]:
    """Of the pieces of a sequence, what its first `count` tokens are."""
    first = []
    for piece, taken in path:
        taken = min(taken, count)
        if not taken:
            break
        first.append((piece, taken))
        count -= taken
    return first


def _joined(pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(begin, end, position of its first token) of a sequence's runs, the last one first; pieces that meet are one."""
    runs: list[tuple[int, int, int]] = []
    position = 0
    for begin, end in pieces:
        if runs and runs[0][1] == begin:
            runs[0] = (runs[0][0], end, runs[0][2])
        else:
            runs.insert(0, (begin, end, position))
        position += end - begin
    return runs


def make_layout(pairs: Iterable[tuple[int, int, int]]) -> SharedPrefixLayout:
    """The layout of pairs with these (prefix, chosen branch, rejected branch) lengths; pair i is sequences i, P + i."""
    pairs = list(pairs)
    lengths = [n for p, c, r in pairs for n in (p + c, p + r)]
    shared = [n for p, _, _ in pairs for n in (0, p)]
    return SharedPrefixLayout.make(lengths, shared, _interleaved(len(pairs)))


def _interleaved(pairs: int) -> list[int]:
    return [s for i in range(pairs) for s in (i, pairs + i)]


def common_prefix(a: Tensor, b: Tensor) -> int:
    """Length of the longest common prefix of two sequences of token ids."""
    shorter = min(len(a), len(b))
    differ = a[:shorter] != b[:shorter]
    return int(differ.int().argmax()) if differ.any() else shorter  # argmax: the first of them


def shared_with_before(groups: Iterable[Sequence[Ids]], across: bool = False) -> list[int]:
    """How many first tokens each sequence shares with the one before it; with one of another group only if `across`,
    or a beginning-of-text token would join all groups of a row."""
    shared: list[int] = []
    before = none = no_ids()
    for group in groups:
        before = before if across else none
        for ids in group:
            sequence = token_ids("shared_with_before", ids)
            shared.append(common_prefix(before, sequence))
            before = sequence
    return shared


def row_length(groups: Sequence[Sequence[Ids]], across: bool = False) -> int:
    """Tokens that `pack` lays in the row."""
    return sum(len(sequence) for group in groups for sequence in group) - sum(shared_with_before(groups, across))


@on_host
def pack(
    groups: Sequence[Sequence[Ids]], ids: Sequence[int] | None = None, across: bool = False
) -> tuple[Tensor, SharedPrefixLayout]:
    """Groups of token sequences as one row, (1, T) int64, and its layout. A group's sequences share what they begin
    with, if neighbours do: sorted sequences share most. across: groups share, too. ids: see `SharedPrefixLayout`."""
    tensors = [[token_ids("pack", sequence) for sequence in group] for group in groups]
    sequences, shared = [sequence for group in tensors for sequence in group], shared_with_before(tensors, across)
    own = [sequence[k:] for sequence, k in zip(sequences, shared, strict=True)]
    layout = SharedPrefixLayout.make([len(sequence) for sequence in sequences], shared, ids)
    return torch.cat([no_ids(), *own]).unsqueeze(0), layout


def shared_prefix_batch(pairs: Iterable[TokenPair]) -> PreferenceBatch:
    """Lay pairs out as one packed row, see above. What is scored, and in which sequence, is as in `padded_batch`.

    Scored tokens come pair by pair, chosen before rejected. A shared completion token is run once and scored twice.
    """
    op = "shared_prefix_batch"
    pairs = check_pairs(op, pairs)
    sequences, prompts = zip(*whole_sequences(op, pairs), strict=True)
    groups = list(zip(sequences[::2], sequences[1::2], strict=True))
    return packed_batch(groups, prompts, _interleaved(len(pairs)))


@on_host
def packed_batch(
    groups: Sequence[Sequence[Ids]],
    prompts: Sequence[int],
    ids: Sequence[int] | None = None,
    across: bool = False,
    comparisons: Iterable[tuple[int, int]] | None = None,
) -> PreferenceBatch:
    """Groups of token sequences as one packed row, of which all is scored but each sequence's prompt.

    prompts: of each sequence, the length. groups, ids, across: as `pack` takes them. comparisons: (chosen, rejected)
    ids; None: P pairs of 2P sequences."""
    op = "packed_batch"
    tensors = [[token_ids(op, sequence) for sequence in group] for group in groups]
    sequences = [sequence for group in tensors for sequence in group]
    largest = largest_id(op, sequences)
    row, layout = pack(tensors, ids, across)
    targets, predictors, start = [], [], 0
    counts = [0] * len(layout.ids)
    for sequence, tokens, prompt in zip(layout.ids, sequences, prompts, strict=True):
        first = max(prompt, 1)  # the first token has nothing to predict it
        targets.append(tokens[first:])
        counts[sequence] = len(targets[-1])
        predictors.append(layout.index[start + first - 1 : start + first - 1 + counts[sequence]])
        start += len(tokens)
    lengths, order = torch.tensor(counts), torch.tensor(layout.ids)
    return PreferenceBatch(
        input_ids=row,
        position_ids=layout.positions.long().unsqueeze(0),
        targets=torch.cat(targets),
        sequence_ids=order.repeat_interleave(lengths[order]),
        predictors=torch.cat(predictors),
        lengths=lengths,
        host_lengths=tuple(counts),
        host_largest_id=largest,
        layout=layout,
        **({} if comparisons is None else {"comparisons": tuple(comparisons)}),
    )


def separate_rows(batch: PreferenceBatch) -> PreferenceBatch:
    """A packed batch as padded rows, one per sequence in the order of their ids, for a model that cannot run the
    packed one.

    What is scored stays as it is, in its order. Made on the batch's device; nothing waits for it.
    """
    layout, device = batch.layout, batch.input_ids.device
    width = max(1, *layout.lengths)
    rows = sorted(range(len(layout.ids)), key=layout.ids.__getitem__)
    starts = [0, *torch.tensor(layout.lengths).cumsum(0).tolist()]

    def send(values: list) -> Tensor:
        host = torch.tensor(values, dtype=torch.int64)
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)

    columns = torch.arange(width, device=device)
    inside = columns < send([layout.lengths[s] for s in rows])[:, None]
    index = layout.on(device).index
    # A padding column reads any token, the row's end is not passed; an empty row has none to read
    places = (send([starts[s] for s in rows])[:, None] + columns).clamp_(max=max(len(index) - 1, 0))
    ids = batch.input_ids[0][index[places]] if layout.length else batch.input_ids.new_zeros(inside.shape)
    columns = layout.on(device).positions.index_select(0, batch.predictors.to(device))
    return PreferenceBatch(
        batch,
        input_ids=ids.masked_fill(~inside, 0),
        attention_mask=inside.long(),
        position_ids=None,
        predictors=batch.sequence_ids.to(device) * width + columns,
        layout=None,
    )
