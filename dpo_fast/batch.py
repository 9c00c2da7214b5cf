"""Stage 1: tokenised pairs -> `PreferenceBatch`.

Whatever the layout of the rows that the model reads, the scored tokens are one-dimensional: N completion tokens, each
with the sequence it belongs to and the position whose hidden state predicts it. Everything after the model works on
these vectors and never sees padding.
"""

import functools
import numbers
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from . import transfer
from .comparisons import Comparisons
from .ops.checks import check_count, describe

Ids = Sequence[int] | np.ndarray | Tensor
_P = ParamSpec("_P")
_R = TypeVar("_R")
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class TokenPair:
    """One preference pair as token ids, after truncation: each a sequence of ints, or an array or tensor of them.

    The two prompts are equal unless truncation from the left cut them differently.
    """

    chosen_prompt: Ids
    chosen: Ids
    rejected_prompt: Ids
    rejected: Ids


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
    of rows that existed before (rows.py): places (N,) int64, where the scored tokens lie in shifted labels of the shape
      field_shape; model_inputs, further keyword arguments of the model
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
        lengths = self["host_lengths"]
        if "comparisons" not in self:
            return sum(lengths[: self.num_pairs])
        return sum(lengths[chosen] for chosen, _ in self["comparisons"])

    def tensors(self) -> list[Tensor]:
        """All of them, those of the layout, too."""
        layout = self.get("layout")
        own = [value for value in self.values() if isinstance(value, Tensor)]
        return own if layout is None else [*own, *layout.tensors()]

    def map(self, function: Callable[[Tensor], Tensor]) -> "PreferenceBatch":
        """This batch with `function` of each of its tensors."""
        mapped = {name: function(value) for name, value in self.items() if isinstance(value, Tensor)}
        if self.get("layout") is not None:
            mapped["layout"] = self["layout"].map(function)
        return type(self)({**self, **mapped})

    def to(self, device, non_blocking: bool = False) -> "PreferenceBatch":
        """A copy with every tensor on `device`; all travel in one copy to a CUDA device, and the host waits for none
        (see transfer.py)."""
        moved = self.map(transfer.mover(self.tensors(), device, non_blocking))
        others = [k for k, v in moved.items() if k != "layout" and not isinstance(v, Tensor) and hasattr(v, "to")]
        return type(self)({**moved, **{k: moved[k].to(device, non_blocking=non_blocking) for k in others}})

    def pin_memory(self) -> "PreferenceBatch":
        """A copy whose tensors lie in one pinned buffer."""
        return self.map(transfer.pinned(self.tensors()))


def token_ids(op: str, ids: Ids) -> Tensor:
    """(n,) int64 on the CPU; TypeError for what is no id (6.7 would be read as 6)."""
    if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu":
        ids = torch.from_numpy(ids.astype(np.int64, order="C"))
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.device.type != "cpu" or ids.dtype not in _INTEGERS:
            raise TypeError(
                f"{op}: token ids must be ints, one dimension of them on the CPU, "
                f"got {describe(ids)}, {str(ids.dtype)[6:]} on {ids.device}"
            )
        return ids.to(torch.int64)
    if isinstance(ids, (bytes, bytearray)):
        ids = list(ids)  # an array would take them for its machine words
    if not all(issubclass(kind, numbers.Integral) and kind is not bool for kind in set(map(type, ids))):
        raise TypeError(f"{op}: token ids must be ints, got {describe(ids)}")
    try:  # through an array, which takes a tenth of the time of torch.tensor
        return torch.frombuffer(array("q", ids), dtype=torch.int64) if len(ids) else no_ids()
    except OverflowError:
        raise _out_of_range(op, min(ids), max(ids)) from None


def on_host(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which makes tensors on the CPU, whatever torch's default device is."""

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return run


def no_ids() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


def _out_of_range(op: str, low: int, high: int) -> ValueError:
    return ValueError(f"{op}: token ids are at least 0 and below 2**31, got {low if low < 0 else high}")


def largest_id(op: str, sequences: Sequence[Tensor]) -> int:
    """The largest of all token ids, -1 for none; ValueError for one below 0."""
    together = torch.cat([*sequences, no_ids()])
    if not len(together):
        return -1
    low, high = int(together.min()), int(together.max())
    if low < 0 or high >= 2**31:
        raise _out_of_range(op, low, high)
    return high


def whole_sequences(op: str, pairs: Sequence[TokenPair]) -> list[tuple[Tensor, int]]:
    """Of each pair's chosen and rejected: prompt and completion in one, and how much of it is prompt."""
    found = []
    for pair in pairs:
        prompt = token_ids(op, pair.chosen_prompt)
        one = pair.rejected_prompt is pair.chosen_prompt
        other = prompt if one else token_ids(op, pair.rejected_prompt)
        found += [(torch.cat([prompt, token_ids(op, pair.chosen)]), len(prompt))]
        found += [(torch.cat([other, token_ids(op, pair.rejected)]), len(other))]
    return found


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
            if not isinstance(ids, (Sequence, np.ndarray, Tensor)) or isinstance(ids, (str, bytes)):
                raise TypeError(f"{op}: pairs[{i}].{name} must be a sequence of token ids, got {type(ids).__name__}")
    return pairs


@on_host
def padded_batch(pairs: Iterable[TokenPair], pad_token_id: int, pad_to_multiple_of: int = 1) -> PreferenceBatch:
    """Lay pairs out as 2P right-padded rows, [chosen 0..P-1, rejected 0..P-1].

    The first token of a sequence without a prompt has nothing to predict it and is not scored.
    """
    op = "padded_batch"
    pairs = check_pairs(op, pairs)
    pad_token_id = check_count(op, "pad_token_id", pad_token_id, 0)
    pad_to_multiple_of = check_count(op, "pad_to_multiple_of", pad_to_multiple_of, 1)
    both = whole_sequences(op, pairs)
    rows, prompts = zip(*both[::2], *both[1::2], strict=True)
    largest = largest_id(op, rows)
    lengths = [len(ids) for ids in rows]
    width = -(-max(1, *lengths) // pad_to_multiple_of) * pad_to_multiple_of

    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    targets, predictors = [], []
    for row, (ids, prompt) in enumerate(zip(rows, prompts, strict=True)):
        input_ids[row, : len(ids)] = ids
        first = max(prompt, 1)  # position 0 has no predecessor
        targets.append(ids[first:])
        predictors.append(torch.arange(len(targets[-1])) + (row * width + first - 1))
    counts = [len(scored) for scored in targets]
    lengths_scored = torch.tensor(counts)
    return PreferenceBatch(
        input_ids=input_ids,
        attention_mask=(torch.arange(width) < torch.tensor(lengths)[:, None]).long(),
        position_ids=None,
        targets=torch.cat(targets),
        sequence_ids=torch.arange(len(rows)).repeat_interleave(lengths_scored),
        predictors=torch.cat(predictors),
        lengths=lengths_scored,
        host_lengths=tuple(counts),
        host_largest_id=max(largest, pad_token_id),
        layout=None,
    )
