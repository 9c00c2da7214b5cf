"""Rows of sequences that share beginnings: what a token sees, by the definition."""

import torch

from dpo_fast.layout import SharedPrefixLayout

# (lengths, shared): see layout.py
TREES = {
    "four completions of a prompt": ([12, 9, 15, 8], [0, 7, 7, 7]),
    "a system prompt over three prompts": ([9, 8, 10, 11, 7, 9], [0, 7, 4, 8, 4, 5]),
    "nested and equal sequences": ([3, 6, 6, 6, 2, 9], [0, 3, 6, 4, 2, 1]),
    "four levels": ([4, 8, 12, 16, 14, 9, 5, 4], [0, 3, 6, 10, 13, 5, 2, 3]),
    "an empty one between": ([5, 0, 5], [0, 0, 0]),
    "all in one row": (
        [12, 9, 15, 8, 9, 8, 10, 11, 7, 9, 3, 6, 6, 6, 2, 9],
        [0, 7, 7, 7, 0, 7, 4, 8, 4, 5, 0, 3, 6, 4, 2, 1],
    ),
}


def pairs_as_trees(pairs) -> tuple[list[int], list[int]]:
    """(prefix, chosen branch, rejected branch) of each pair -> lengths, shared."""
    return [n for p, c, r in pairs for n in (p + c, p + r)], [n for p, _, _ in pairs for n in (0, p)]


def places(lengths, shared) -> list[list[int]]:
    """Where in the row the tokens of each sequence are."""
    found, before, end = [], [], 0
    for n, k in zip(lengths, shared, strict=True):
        before = before[:k] + list(range(end, end + n - k))
        end += n - k
        found.append(before)
    return found


def sees(layout: SharedPrefixLayout, window: int | None = None) -> torch.Tensor:
    """(T, T) bool, query by key: a sequence of the query's has the key at most `window` - 1 positions before it."""
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    for sequence in places(layout.lengths, layout.shared):
        for position, q in enumerate(sequence):
            first = 0 if window is None else max(0, position - window + 1)
            mask[q, sequence[first : position + 1]] = True
    return mask
