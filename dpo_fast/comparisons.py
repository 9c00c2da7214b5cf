"""Who is compared with whom: C comparisons of S sequences. Of P pairs, pair i compares sequence i with P + i.

Nothing outside this file knows that default. Sequences that comparisons connect, directly or by way of others, are a
group: the losses of a group need no other sequence.
"""

import itertools
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Compared(NamedTuple):
    """Some of the comparisons: x[sequences] of x (S,), or x[places] of x of the sequences at hand, is (2, c), of the
    chosen ones and of the rejected ones."""

    sequences: Tensor  # (2, c) int64: which sequences
    places: Tensor  # (2, c) int64: where these are among the sequences at hand


class Groups(NamedTuple):
    """Sequences and comparisons by group. A sequence's rank is its place in that order: groups are slices of ranks."""

    rank: Tensor  # (S,) int64 of each sequence
    order: Tensor  # (C,) int64 comparisons, by group
    sequences: list[int]  # host: by rank
    sequence_ends: list[int]  # host: cumulative numbers of sequences, from 0
    comparison_ends: list[int]  # host: cumulative numbers of comparisons, from 0


def pairs_of(num_pairs: int, device) -> Tensor:
    """(P, 2) int64: pair i is sequences i and P + i."""
    return torch.arange(2 * num_pairs, device=device).view(2, num_pairs).t()


@dataclass(frozen=True)
class Comparisons:
    """C comparisons of S sequences, checked."""

    index: Tensor  # (C, 2) int64: chosen, rejected
    num_sequences: int
    host: tuple[tuple[int, int], ...] | None = None  # the same; None for P pairs, of which nothing need be read

    @classmethod
    def make(cls, op: str, num_pairs: int, given, num_sequences: int | None, device) -> "Comparisons":
        """given: (C, 2) integers, a tensor or nested sequences, C = num_pairs; None: P pairs of 2P sequences. A tensor
        on an accelerator is read, which waits for it. ValueError for what is out of range."""
        if not (_is_int(num_pairs) and 1 <= num_pairs < 2**31):
            raise ValueError(f"{op}: num_pairs must be a positive int, got {num_pairs!r}")
        if not (num_sequences is None or _is_int(num_sequences) and 0 <= num_sequences < 2**31):
            raise ValueError(f"{op}: num_sequences must be an int of at least 0 or None, got {num_sequences!r}")
        if given is None:
            if num_sequences not in (None, 2 * num_pairs):
                raise ValueError(f"{op}: {num_pairs} pairs are of {2 * num_pairs} sequences, got {num_sequences}")
            return cls(pairs_of(num_pairs, device), 2 * num_pairs)
        if not (hasattr(given, "__array__") or _are_pairs(given)):
            raise ValueError(f"{op}: comparisons must be integers, (chosen, rejected) of each pair, got {given!r:.200}")
        index = torch.as_tensor(given)
        if index.shape != (num_pairs, 2) or index.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{op}: comparisons must be integers of shape (num_pairs, 2) = ({num_pairs}, 2), "
                f"got {index.dtype} of shape {tuple(index.shape)}"
            )
        host = tuple(map(tuple, index.tolist()))
        S = max(map(max, host)) + 1 if num_sequences is None else num_sequences
        wrong = [pair for pair in host if pair[0] == pair[1] or not 0 <= min(pair) <= max(pair) < S]
        if wrong:
            raise ValueError(f"{op}: comparisons are of two different sequences in [0, {S}), got {wrong[0]}")
        return cls(index.to(device, torch.int64), S, host)

    @property
    def whole(self) -> Compared:
        """All of them, where all sequences are at hand."""
        sequences = self.index.t()
        return Compared(sequences, sequences)

    @property
    def overlap(self) -> bool:
        """Whether a sequence is in more than one comparison."""
        return self.host is not None and len(set(itertools.chain(*self.host))) < 2 * len(self.host)

    def times(self) -> Tensor:
        """(2, S) int64: in how many comparisons each sequence is the chosen and the rejected one."""
        counts, once = self.index.new_zeros((2, self.num_sequences)), torch.ones_like(self.index[:, 0])
        for row, column in zip(counts, self.index.unbind(1), strict=True):
            row.index_add_(0, column, once)
        return counts

    def groups(self) -> Groups:
        """By union of what is compared, groups in the order of their first sequences; sequences that nothing compares
        are groups of one."""
        S, C, device = self.num_sequences, len(self.index), self.index.device
        host = self.host
        if host is None:
            rank = torch.arange(S, device=device).view(C, 2).t().flatten()
            sequences = [s for i in range(C) for s in (i, C + i)]
            return Groups(rank, torch.arange(C, device=device), sequences, list(range(0, S + 1, 2)), list(range(C + 1)))
        parent = list(range(S))

        def root(s: int) -> int:
            while parent[s] != s:
                parent[s] = s = parent[parent[s]]
            return s

        for a, b in host:
            low, high = sorted((root(a), root(b)))
            parent[high] = low
        roots = [root(s) for s in range(S)]
        sequences = sorted(range(S), key=lambda s: (roots[s], s))
        order = sorted(range(C), key=lambda c: (roots[host[c][0]], c))
        rank = torch.empty(S, dtype=torch.int64)
        rank[sequences] = torch.arange(S)
        names = sorted(set(roots))
        return Groups(
            rank.to(device),
            torch.tensor(order, dtype=torch.int64, device=device),
            sequences,
            _ends([roots[s] for s in sequences], names),
            _ends([roots[host[c][0]] for c in order], names),
        )


def _is_int(value) -> bool:
    return isinstance(value, (numbers.Integral, torch.SymInt)) and not isinstance(value, bool)


def _are_pairs(given) -> bool:
    return isinstance(given, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_int, pair)) for pair in given
    )


def _ends(grouped: Sequence[int], names: Sequence[int]) -> list[int]:
    counts = dict.fromkeys(names, 0)
    for name in grouped:
        counts[name] += 1
    return [0, *itertools.accumulate(counts.values())]
