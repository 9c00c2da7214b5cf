"""Which pairs share a batch, and their order: drawn from a seed and the epoch, so that a resumed run has the same."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Batches of indices whose rows hold at most `tokens_per_batch` tokens; a longer pair comes alone.

    lengths: tokens that each pair adds to a row; with `padded`, positions that it takes by itself, which the longest
      pair of a batch makes all the others take. group_by_length: pairs of like length share a batch (what pads least
      where rows are padded), else batches are filled in random order. multiple_of: the number of batches is a multiple
      of this, so that every rank gets as many; batches are split for it, and if there is nothing to split, the smallest
      ones come twice.

    Which pairs share a batch is drawn once, from `seed`; their order is drawn anew in each epoch. The number of batches
    is thus the same in all epochs, as schedulers and progress bars expect.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        tokens_per_batch: int,
        *,
        seed: int = 0,
        group_by_length: bool = False,
        multiple_of: int = 1,
        padded: bool = False,
    ):
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}")
        self.seed, self.epoch = seed, 0
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        if group_by_length:
            order.sort(key=lambda index: lengths[index])  # stable: equal lengths stay shuffled
        self.batches = fill_batches(order, lengths, tokens_per_batch, padded)
        even_out(self.batches, multiple_of)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for index in torch.randperm(len(self.batches), generator=generator).tolist():
            yield self.batches[index]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class GroupsOfEpoch(Sampler[int]):
    """transformers' `LengthGroupedSampler`, drawn from `seed` and the epoch instead of the global generator."""

    def __init__(self, grouped, seed: int):
        self.grouped, self.seed, self.epoch = grouped, seed, 0

    def __len__(self) -> int:
        return len(self.grouped)

    def __iter__(self) -> Iterator[int]:
        self.grouped.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.grouped)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def set_epoch(loader, epoch: int) -> None:
    """Tell every sampler below a DataLoader: where batches are skipped, accelerate does not reach them all."""
    for name in ("batch_sampler", "sampler"):
        below = getattr(loader, name, None)
        if below is not None:
            if hasattr(below, "set_epoch"):
                below.set_epoch(epoch)
            set_epoch(below, epoch)


def fill_batches(order: Sequence[int], lengths: Sequence[int], budget: int, padded: bool = False) -> list[list[int]]:
    """Cut `order` into consecutive batches of at most `budget` tokens, each of at least one pair."""
    batches: list[list[int]] = []
    taken = longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        taken = longest * (len(batches[-1]) + 1) if padded and batches else taken + lengths[index]
        if not batches or taken > budget:
            batches.append([])
            taken = longest = lengths[index]
        batches[-1].append(index)
    return batches


def even_out(batches: list[list[int]], multiple_of: int) -> None:
    """Split the batches of most pairs, in place, until their number is a multiple."""
    while len(batches) % multiple_of:
        largest = max(range(len(batches)), key=lambda i: len(batches[i]))
        batch = batches[largest]
        if len(batch) == 1:
            batches.append(list(min(batches, key=len)))
            continue
        batches[largest] = batch[: len(batch) // 2]
        batches.append(batch[len(batch) // 2 :])
