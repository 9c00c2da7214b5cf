"""Stage 1: tokenised pairs -> `PreferenceBatch`.

Whatever the layout of the rows that the model reads, the scored tokens are one-dimensional: N completion tokens, each
with the sequence it belongs to and the position whose hidden state predicts it. Everything after the model works on
these vectors and never sees padding.
"""

import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .comparisons import Comparisons, pairs_of
from .ops.checks import check_count, describe


@dataclass(frozen=True)
class TokenPair:
    """One preference pair as token ids, after truncation.

    The two prompts are equal unless truncation from the left cut them differently.
    """

    chosen_prompt: Sequence[int]
    chosen: Sequence[int]
    rejected_prompt: Sequence[int]
    rejected: Sequence[int]


_NOT_ATTACHED = (
    "a model took this PreferenceBatch for token ids: it is not attached, or not any more (its forward was replaced, "
    "or it was loaded from a file); call dpo_fast.attach(model)"
)


class PreferenceBatch(dict):
    """P preference pairs, ready for `model(batch)` on a model prepared by `dpo_fast.attach`.

    A dict of tensors (so that data loaders, Trainers and wrappers move and split it as usual) with attribute access:

    rows for the model, B x T:
      input_ids (B, T) int64; attention_mask (B, T) int64, absent from packed rows: nothing to mask;
      position_ids (B, T) int64, None for padded rows: they are 0..T-1, which models assume by themselves
    scored tokens, N:
      targets (N,) int64 token ids; sequence_ids (N,) int64, chosen of pair i is i, rejected is P + i;
      predictors (N,) int64 index into the B*T flattened positions: where the hidden state that predicts the token is
    per sequence:
      lengths (2P,) int64 number of scored tokens, and host_lengths, the same as a tuple of ints: no device is asked;
    host_largest_id, of all tokens, an int: whether the model has that many embeddings, no device is asked either
    of a reference that has scored the data before, where one has:
      reference_token_logps (N,) fp32, or reference_logps (2P,) fp32, sums
    layout: None for padded rows, else the shared-prefix layout that the attention function needs
    comparisons, where pairs are not those of 2P sequences: P host-side tuples (chosen, rejected) of S sequences
    """

    def __getattr__(self, name: str):
        try:
            return self[name]
        except KeyError:
            if not name.startswith("_") and hasattr(Tensor, name):
                raise TypeError(_NOT_ATTACHED) from None
            raise AttributeError(f"PreferenceBatch has no field {name!r}; fields: {', '.join(self)}") from None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise TypeError(_NOT_ATTACHED)

    @property
    def num_pairs(self) -> int:
        return len(self["comparisons"]) if "comparisons" in self else len(self["lengths"]) // 2

    def compared(self) -> Comparisons:
        """Who is compared with whom, on the device of `lengths`."""
        lengths = self["lengths"]
        return Comparisons.make(
            "PreferenceBatch", self.num_pairs, self.get("comparisons"), len(lengths), lengths.device
        )

    @property
    def num_chosen_tokens(self) -> int:
        """Scored tokens of the chosen sequences, once for each pair; asks no device."""
        pairs = self.get("comparisons") or pairs_of(self.num_pairs, "cpu").tolist()
        return sum(self["host_lengths"][chosen] for chosen, _ in pairs)

    def to(self, device, non_blocking: bool = False) -> "PreferenceBatch":
        """A copy with every tensor on `device`."""
        return type(self)(
            {k: v.to(device, non_blocking=non_blocking) if hasattr(v, "to") else v for k, v in self.items()}
        )

    def pin_memory(self) -> "PreferenceBatch":
        return type(self)({k: v.pin_memory() if hasattr(v, "pin_memory") else v for k, v in self.items()})


def largest_id(op: str, sequences: Iterable[Sequence[int]]) -> int:
    """The largest of all token ids, -1 for none; TypeError for what is no id (6.7 would be read as 6), ValueError for
    one below 0."""
    kinds: set[type] = set()
    low, high = 0, -1
    for ids in sequences:
        if len(ids):
            kinds.update(map(type, ids))
            if not all(issubclass(kind, numbers.Integral) and kind is not bool for kind in kinds):
                raise TypeError(f"{op}: token ids must be ints, got {describe(ids)}")
            low, high = min(low, *ids), max(high, *ids)
    if low < 0 or high >= 2**31:
        raise ValueError(f"{op}: token ids are at least 0 and below 2**31, got {low if low < 0 else high}")
    return int(high)


def check_pairs(op: str, pairs: Iterable[TokenPair]) -> list[TokenPair]:
    """As a list; TypeError for what is no `TokenPair`, ValueError for none at all."""
    if isinstance(pairs, TokenPair) or not isinstance(pairs, Iterable):
        raise TypeError(f"{op}: pairs must be a sequence of TokenPair, got {type(pairs).__name__}")
    pairs = list(pairs)
    if not pairs:
        raise ValueError(f"{op}: got no pairs, expected at least one")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, TokenPair):
            raise TypeError(f"{op}: pairs[{i}] must be a TokenPair, got {type(pair).__name__}")
        for name, ids in vars(pair).items():
            if not isinstance(ids, Sequence) or isinstance(ids, (str, bytes)):
                raise TypeError(f"{op}: pairs[{i}].{name} must be a sequence of token ids, got {type(ids).__name__}")
    return pairs


def padded_batch(pairs: Iterable[TokenPair], pad_token_id: int, pad_to_multiple_of: int = 1) -> PreferenceBatch:
    """Lay pairs out as 2P right-padded rows, [chosen 0..P-1, rejected 0..P-1].

    The first token of a sequence without a prompt has nothing to predict it and is not scored.
    """
    op = "padded_batch"
    pairs = check_pairs(op, pairs)
    pad_token_id = check_count(op, "pad_token_id", pad_token_id, 0)
    pad_to_multiple_of = check_count(op, "pad_to_multiple_of", pad_to_multiple_of, 1)
    rows = [(p.chosen_prompt, p.chosen) for p in pairs] + [(p.rejected_prompt, p.rejected) for p in pairs]
    largest = largest_id(op, (ids for row in rows for ids in row))
    width = max(1, *(len(prompt) + len(completion) for prompt, completion in rows))
    width = -(-width // pad_to_multiple_of) * pad_to_multiple_of

    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.int64)
    targets, sequence_ids, lengths = [], [], []
    predictors: list[int] = []
    for row, (prompt, completion) in enumerate(rows):
        ids = [*prompt, *completion]
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        attention_mask[row, : len(ids)] = 1
        first = max(len(prompt), 1)  # position 0 has no predecessor
        targets += ids[first:]
        sequence_ids += [row] * (len(ids) - first)
        predictors += range(row * width + first - 1, row * width + len(ids) - 1)
        lengths.append(max(len(ids) - first, 0))
    return PreferenceBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=None,
        targets=torch.tensor(targets, dtype=torch.int64),
        sequence_ids=torch.tensor(sequence_ids, dtype=torch.int64),
        predictors=torch.tensor(predictors, dtype=torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.int64),
        host_lengths=tuple(lengths),
        host_largest_id=max(largest, pad_token_id),
        layout=None,
    )
