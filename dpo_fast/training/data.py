"""Preference data -> tokenised pairs -> batches.

    rows: prompt, chosen, rejected (text or chat messages) | chosen, rejected with a common beginning | token ids
      prepare_dataset   -> columns prompt_ids, chosen_ids, rejected_ids; unusable pairs dropped, and counted
      PairCollator      -> truncation, PreferenceBatch

Token ids are kept whole until the collator truncates them, so a prepared dataset does not depend on lengths but
through which pairs were dropped, and preparing it again changes nothing.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import datasets

from dpo_fast.batch import PreferenceBatch, TokenPair, padded_batch
from dpo_fast.layout import common_prefix, shared_prefix_batch

from .rows import read_row, template_options, tokenize_pair

logger = logging.getLogger("dpo_fast")

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_IMAGE_COLUMNS = {"image", "images"}
_REASON, _CUT = "_dropped_because", "_prompt_tokens_cut"  # columns that live only while a dataset is prepared

TRUNCATION_MODES = ("keep_start", "keep_end")
LENGTH_COLUMN = "length"  # where transformers' length-grouped samplers look
LAYOUTS = ("auto", "shared_prefix", "padded")


@dataclass(frozen=True)
class Truncation:
    """How pairs are cut to length, in tokens; None: no limit.

    First the prompt keeps its last `max_prompt_length` tokens and each completion its first `max_completion_length`;
    then prompt + completion keep their first (keep_start) or last (keep_end) `max_length`.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    mode: str = "keep_start"

    def __post_init__(self):
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {value}")
        if self.mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode must be one of {', '.join(TRUNCATION_MODES)}, got {self.mode!r}")

    def __call__(self, row: Mapping) -> TokenPair:
        """A row with prompt_ids, chosen_ids, rejected_ids, and perhaps reference log-probs, as the pair to train on."""
        prompt = row["prompt_ids"]
        if self.max_prompt_length is not None:
            prompt = prompt[-self.max_prompt_length :]
        return TokenPair(
            *self._cut(prompt, row["chosen_ids"]),
            *self._cut(prompt, row["rejected_ids"]),
            *(row.get(name) for name in REFERENCE_COLUMNS),
        )

    def _cut(self, prompt: Sequence[int], completion: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        completion = completion[: self.max_completion_length]
        excess = 0 if self.max_length is None else len(prompt) + len(completion) - self.max_length
        if excess <= 0:
            return prompt, completion
        if self.mode == "keep_end":
            return prompt[excess:], completion[max(0, excess - len(prompt)) :]
        return prompt[: self.max_length], completion[: max(0, len(completion) - excess)]


def why_unusable(chosen: Sequence, rejected: Sequence) -> str:
    """Why two completions (text, messages or token ids) cannot be trained on, "" if they can."""
    if chosen == rejected:
        return "equal completions"
    return "" if chosen and rejected else "empty completion"


def why_unusable_truncated(pair: TokenPair) -> str:
    """The same for a pair after truncation."""
    sides = (pair.chosen_prompt, pair.chosen), (pair.rejected_prompt, pair.rejected)
    # The first token of a sequence without a prompt has nothing that predicts it
    if any(len(completion) - (len(prompt) == 0) < 1 for prompt, completion in sides):
        return "no completion token left after truncation"
    return "equal after truncation" if sides[0] == sides[1] else ""


# --- a dataset -----------------------------------------------------------------------------------------------------


def prepare_dataset(dataset, tokenizer, truncation: Truncation, *, name: str = "train", num_proc: int | None = None):
    """Tokenise a dataset and drop the pairs that cannot be trained on, saying how many and why in one line.

    dataset: a `datasets.Dataset`, an `IterableDataset` (stays lazy: its drops are reported as they are met), or a
      sequence of dicts. Returns the same kind (a Dataset for a sequence) with columns prompt_ids, chosen_ids,
      rejected_ids, and the reference log-probs where it has them.

    Raises TypeError for other objects, ValueError for missing columns, no rows, and no usable rows.
    """
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise TypeError(f"{name} dataset has splits ({', '.join(dataset)}); pass one of them, as in dataset['train']")
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        dataset = datasets.Dataset.from_list(list(dataset)) if len(dataset) else datasets.Dataset.from_dict({})
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            f"{name} dataset must be a datasets.Dataset, an IterableDataset or a sequence of dicts, "
            f"got {type(dataset).__name__}"
        )
    dataset = dataset.with_format(None)
    columns = _columns(dataset, name)
    tokenized = _check_columns(columns, tokenizer, name)
    keep = [column for column in REFERENCE_COLUMNS if column in columns]
    process = _RowProcessor(tokenizer, truncation, tokenized)
    options = dict(with_indices=True, remove_columns=[column for column in columns if column not in keep])
    if isinstance(dataset, datasets.IterableDataset):
        dataset = dataset.map(process, **options).filter(_ReportDrops(name))
        return dataset.remove_columns([_REASON, _CUT])
    dataset = dataset.map(process, num_proc=num_proc, desc=f"Tokenizing {name} dataset", **options)
    return _drop_unusable(dataset, name)


def _columns(dataset, name: str) -> list[str]:
    columns = dataset.column_names
    if columns is None:  # a stream whose features are not known yet
        dataset = dataset.take(1)
        columns = list(next(iter(dataset), {}))
    if not columns or (isinstance(dataset, datasets.Dataset) and len(dataset) == 0):
        raise ValueError(f"{name} dataset is empty: expected rows with columns {', '.join(TEXT_COLUMNS)}")
    return columns


def _check_columns(columns: Iterable[str], tokenizer, name: str) -> bool:
    """Whether the rows are tokenised; raises for columns that cannot be used."""
    columns = set(columns)
    if images := columns & _IMAGE_COLUMNS:
        raise ValueError(f"{name} dataset has the column {images.pop()!r}: only text can be trained on")
    if columns >= set(TOKEN_COLUMNS):
        return True
    if not columns >= {"chosen", "rejected"}:
        raise ValueError(
            f"{name} dataset has the columns {', '.join(sorted(columns))}; expected prompt, chosen, rejected (text or "
            f"chat messages), or chosen, rejected with a common beginning, or {', '.join(TOKEN_COLUMNS)}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) has no EOS token, which ends every completion; set "
            "tokenizer.eos_token, or pass token ids"
        )
    return False


@dataclass
class _RowProcessor:
    """What `datasets` maps over rows; a plain object with all it depends on, so that caches are keyed by it."""

    tokenizer: object
    truncation: Truncation
    tokenized: bool

    def __call__(self, row: Mapping, index: int) -> dict:
        if self.tokenized:
            ids, cut, reason = [row[name] for name in TOKEN_COLUMNS], 0, ""
        else:
            texts = read_row(row, index)
            reason = why_unusable(*texts[1:])
            *ids, cut = [], [], [], 0
            if not reason:
                *ids, cut = tokenize_pair(*texts, self.tokenizer, **template_options(row))
        reason = reason or why_unusable(*ids[1:])
        columns = dict(zip(TOKEN_COLUMNS, ids, strict=True))
        pair = self.truncation(columns)
        reason = reason or why_unusable_truncated(pair)
        return {**columns, LENGTH_COLUMN: row_tokens(pair), _REASON: reason, _CUT: cut}


def row_tokens(pair: TokenPair) -> int:
    """Tokens that a pair adds to a shared-prefix row: what samplers go by."""
    chosen, rejected = [*pair.chosen_prompt, *pair.chosen], [*pair.rejected_prompt, *pair.rejected]
    return len(chosen) + len(rejected) - common_prefix(chosen, rejected)


class _ReportDrops:
    """Filter of a stream: says once per reason and process that pairs are dropped, as their number is not known."""

    def __init__(self, name: str):
        self.name, self.seen = name, set()

    def __call__(self, row: dict) -> bool:
        if row[_REASON] and row[_REASON] not in self.seen:
            self.seen.add(row[_REASON])
            logger.warning("%s dataset: dropping pairs of the stream: %s", self.name, row[_REASON])
        return not row[_REASON]


def _drop_unusable(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    reasons = list(dataset[_REASON])
    cut = sum(tokens > 0 for tokens in dataset[_CUT])
    counts = Counter(reason for reason in reasons if reason)
    total, dropped = len(dataset), sum(counts.values())
    why = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if dropped == total:
        raise ValueError(f"{name} dataset: none of the {total} pairs can be trained on: {why}")
    if dropped:
        logger.warning("%s dataset: %d of %d pairs dropped: %s", name, dropped, total, why)
    if cut:
        logger.warning(
            "%s dataset: in %d of %d pairs the tokenised prompt is not a prefix of prompt + completion (tokens merge "
            "across the boundary, or the chat template renders a prompt alone differently); the completion starts "
            "where they part",
            name,
            cut,
            total,
        )
    dataset = dataset.remove_columns([_REASON, _CUT])
    return dataset.select([i for i, reason in enumerate(reasons) if not reason]) if dropped else dataset


# --- a batch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairCollator:
    """Rows of a prepared dataset -> truncated pairs -> `PreferenceBatch`."""

    pad_token_id: int
    truncation: Truncation = Truncation()
    pad_to_multiple_of: int = 1
    layout: str = "padded"

    def __call__(self, rows: list[Mapping]) -> PreferenceBatch:
        pairs = [self.truncation(row) for row in rows]
        if self.layout == "shared_prefix":
            return shared_prefix_batch(pairs)
        return padded_batch(pairs, self.pad_token_id, self.pad_to_multiple_of)


def format_example(pair: TokenPair, tokenizer, colour: bool = False) -> str:
    """A pair as the model sees it, decoded: the scored part between >> and <<, the prompt dimmed with `colour`."""
    dim, bold, reset = ("\033[2m", "\033[1m", "\033[0m") if colour else ("", "", "")
    lines = []
    for side, prompt, completion in (
        ("chosen", pair.chosen_prompt, pair.chosen),
        ("rejected", pair.rejected_prompt, pair.rejected),
    ):
        context, scored = tokenizer.decode(prompt), tokenizer.decode(completion)
        lines.append(f"{side} ({len(prompt)} prompt tokens, {len(completion)} scored between >> and <<):")
        lines.append(f"{dim}{context}{reset}>>{bold}{scored}{reset}<<")
    return "\n".join(lines)
