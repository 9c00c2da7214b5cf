"""Preference data -> tokenised pairs -> batches.

    rows: prompt, chosen, rejected (text or chat messages) | chosen, rejected with a common beginning | token ids
      prepare_dataset   -> columns prompt_ids, chosen_ids, rejected_ids; unusable pairs dropped, and counted
      PairCollator      -> truncation, PreferenceBatch

Token ids are kept whole until the collator truncates them, so lengths decide only which pairs a prepared dataset
drops. Preparing it again changes nothing.
"""

import difflib
import functools
import hashlib
import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType

import datasets
import tokenizers
import transformers

import dpo_fast
from dpo_fast.batch import PreferenceBatch, TokenPair, padded_batch
from dpo_fast.layout import row_length, shared_prefix_batch
from dpo_fast.ops.checks import check_count
from dpo_fast.text import printable

from . import reference_columns, rows
from .rows import (
    ASKING,
    NOTES,
    SIDES,
    check_template_options,
    check_tokenizer,
    naming,
    read_pair,
    template_options,
    tokenize,
)
from .sources import JSON_ROW, dataset_of_rows, decode_row

logger = logging.getLogger("dpo_fast")

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_IMAGE_COLUMNS = {"image", "images", "pixel_values", "video", "videos", "audio", "audios"}
_MEDIA = {"Image", "Audio", "Video", "Pdf"}  # features of `datasets`
_REASON, _NOTES = "_dropped_because", "_notes"  # columns that live only while a dataset is prepared
_READ = {*TEXT_COLUMNS, *TOKEN_COLUMNS, *reference_columns.SUMS, "tools", "chat_template_kwargs"}
_LOOKED_AT = 100  # rows by which columns are judged

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
            if value is not None:
                check_count("Truncation", name, value, 1, "at least 1, or None for no limit")
        if self.mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode must be one of {', '.join(TRUNCATION_MODES)}, got {self.mode!r}")

    def __call__(self, row: Mapping) -> TokenPair:
        """A row with prompt_ids, chosen_ids, rejected_ids, as the pair to train on."""
        prompt = row["prompt_ids"]
        if self.max_prompt_length is not None:
            prompt = prompt[-self.max_prompt_length :]
        return TokenPair(*self._cut(prompt, row["chosen_ids"]), *self._cut(prompt, row["rejected_ids"]))

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


@dataclass(frozen=True)
class ModelLimits:
    """What tokens and lengths a model can take; None: not checked."""

    vocab_size: int | None = None  # rows of its embedding
    positions: int | None = None  # that it was made for
    learned_positions: bool = False  # whether there is nothing beyond them


def prepare_dataset(
    dataset,
    tokenizer,
    truncation: Truncation,
    *,
    name: str = "train",
    num_proc: int | None = None,
    limits: ModelLimits = ModelLimits(),
    template_options: Mapping | None = None,
    said: list[str] | None = None,
):
    """Tokenise a dataset and drop the pairs that cannot be trained on, saying how many and why in one line.

    dataset: a `datasets.Dataset`, an `IterableDataset` (stays lazy: what is to be said is said as it is met), or a
      sequence of dicts. Returns the same kind (a Dataset for a sequence) with columns prompt_ids, chosen_ids,
      rejected_ids, and the reference log-probs where it has them.
    template_options: variables of the chat template, for all rows; a row's own `chat_template_kwargs` go first.
    said: gets the lines on what was dropped and what is odd, too; not those of a stream.

    Raises TypeError for other objects, ValueError for missing columns, no rows, and no usable rows; and for rows that
    cannot be read as what they say they are, with row and column.
    """
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        raise TypeError(f"{name} dataset has splits ({', '.join(dataset)}); pass one of them, as in dataset['train']")
    if isinstance(dataset, Sequence) and not isinstance(dataset, str):
        dataset = dataset_of_rows(dataset) if len(dataset) else datasets.Dataset.from_dict({})
    if not isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        raise TypeError(
            f"{name} dataset must be a datasets.Dataset, an IterableDataset or a sequence of dicts, "
            f"got {type(dataset).__name__}"
        )
    if not isinstance(truncation, Truncation):
        raise TypeError(f"truncation must be a Truncation, got {type(truncation).__name__}")
    if num_proc is not None:
        check_count("prepare_dataset", "num_proc", num_proc, 1, "an int of at least 1 or None")
    if not isinstance(template_options, (Mapping, NoneType)):
        raise TypeError(f"template_options must be a dict or None, got {type(template_options).__name__}")
    check_template_options(template_options or {}, tokenizer)
    dataset = dataset.with_format(None)
    _check_media(dataset, name)
    names, first = _columns(dataset, name)
    tokenized = _check_columns(names, first, tokenizer, name)
    keep = [column for column in reference_columns.SUMS if column in names]
    if len(keep) == 1:
        (missing,) = set(reference_columns.SUMS) - set(keep)
        raise ValueError(f"{name} dataset has the column {keep[0]}, but no {missing}: a reference's sums come in pairs")
    prompts = "prompt" in names
    process = _RowProcessor(
        tokenizer, truncation, tokenized, prompts, tuple(keep), limits, dict(template_options or {})
    )
    stored = [JSON_ROW] if JSON_ROW in (dataset.column_names or ()) else names
    options = dict(with_indices=True, remove_columns=[column for column in stored if column not in keep])
    if isinstance(dataset, datasets.IterableDataset):
        dataset = dataset.map(process, **options).filter(_ReportOnce(name))
        return dataset.remove_columns([_REASON, _NOTES])
    dataset = dataset.map(process, num_proc=num_proc, desc=f"Tokenizing {name} dataset", **options)
    return _drop_unusable(dataset, name, [] if said is None else said)


def _columns(dataset, name: str) -> tuple[list[str], list[Mapping]]:
    """The names of the columns, and some rows."""
    first = [decode_row(row) for row in itertools.islice(dataset, _LOOKED_AT)]
    columns = list(dict.fromkeys(key for row in first for key in row))
    if dataset.column_names == [JSON_ROW]:
        columns = list(dict.fromkeys(key for text in dataset[JSON_ROW] for key in json.loads(text)))
    elif dataset.column_names is not None:
        columns = dataset.column_names
    if not columns or not first:
        raise ValueError(f"{name} dataset is empty: expected rows with columns {', '.join(TEXT_COLUMNS)}")
    return columns, first


def _check_media(dataset, name: str) -> None:
    for column, kind in (dataset.features or {}).items():
        if type(getattr(kind, "feature", kind)).__name__ in _MEDIA:
            raise ValueError(f"{name} dataset has the column {column!r}: only text can be trained on")


def _check_columns(columns: Sequence[str], first: list[Mapping], tokenizer, name: str) -> bool:
    """Whether the rows are tokenised; raises for columns that cannot be used, and names those that are not."""
    if images := sorted(_IMAGE_COLUMNS.intersection(columns)):
        raise ValueError(f"{name} dataset has the column {images[0]!r}: only text can be trained on")
    tokenized = set(columns) >= set(TOKEN_COLUMNS)
    meant = [column for column in columns if column not in _READ and _may_be_meant(column, first)]
    if meant:
        logger.warning("%s dataset: columns that are not used: %s", name, ", ".join(meant))
    if tokenized:
        return True
    if not set(columns) >= set(SIDES):
        hints = [f"{a} may be {b}" for b in TEXT_COLUMNS if b not in columns for a in _aliases(columns, b)]
        raise ValueError(
            f"{name} dataset has the columns {', '.join(sorted(columns))}; expected prompt, chosen, rejected (text or "
            f"chat messages), or chosen, rejected with a common beginning, or {', '.join(TOKEN_COLUMNS)}"
            + (f" ({'; '.join(hints)}: rename the columns, in the file or with rename_column())" if hints else "")
        )
    if "prompt" not in columns:
        _check_no_prompt(columns, first, name)
    check_tokenizer(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) has no EOS token, which ends every completion; set "
            "tokenizer.eos_token, or pass token ids"
        )
    return False


def _may_be_meant(column: str, first: list[Mapping]) -> bool:
    """Whether a column holds numbers, and not those of rows: a weight, a margin, a score."""
    values = [row.get(column) for row in first]
    numbers = any(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    return (
        numbers and column != LENGTH_COLUMN and not re.fullmatch(r"(.*_)?(id|idx|index|level_0__|turn|round)", column)
    )


_ALIASES = {
    "prompt": "question questions instruction query input inputs context conversation conversations messages history "
    "problem task user text",
    "chosen": "accepted preferred positive good best winner response_chosen chosen_response choosen output_1",
    "rejected": "dispreferred negative bad worst loser response_rejected rejected_response refused output_2",
}


def _aliases(columns: Iterable[str], name: str) -> list[str]:
    """Columns that may be meant by `name`: known aliases, and names that are written alike."""
    others = [column for column in columns if column not in _READ]
    close = set(difflib.get_close_matches(name, others, n=3, cutoff=0.7))
    return [c for c in others if c.lower() in _ALIASES[name].split() or c in close or name in c.lower().split("_")]


def _check_no_prompt(columns: Sequence[str], first: list[Mapping], name: str) -> None:
    """Raise ValueError where a column that may hold the prompt is nowhere in chosen and rejected."""
    rows = [row for row in first if not _begins_with_a_question(row.get("chosen"))]
    for column in _aliases(columns, "prompt"):
        given = [row for row in rows if row.get(column)]
        if given and not any(_is_inside(row[column], [row.get(side) for side in SIDES]) for row in given):
            raise ValueError(
                f"{name} dataset has no column prompt, but {column}, which is in neither chosen nor rejected: if it is "
                f"the prompt, rename it to prompt in the file, or with dataset.rename_column({column!r}, 'prompt'); if "
                "it is not, remove it"
            )


def _begins_with_a_question(messages) -> bool:
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, Mapping) and first.get("role") in ASKING


def _is_inside(text, values: list) -> bool:
    return isinstance(text, str) and bool(text.strip()) and json.dumps(text.strip())[1:-1] in json.dumps(values)


@functools.cache
def _versions() -> tuple[str, ...]:
    """What tokens depend on beside the rows and the tokenizer: a cache of other versions is not taken."""
    code = hashlib.sha256(
        b"".join(Path(file).read_bytes() for file in (__file__, rows.__file__, reference_columns.__file__))
    ).hexdigest()
    return (dpo_fast.__version__, transformers.__version__, tokenizers.__version__, code)


@dataclass
class _RowProcessor:
    """What `datasets` maps over rows; a plain object with all it depends on, so that caches are keyed by it."""

    tokenizer: object
    truncation: Truncation
    tokenized: bool
    prompts: bool  # whether there is a column of them
    reference_columns: tuple[str, ...]
    limits: ModelLimits
    template_options: dict
    versions: tuple[str, ...] = field(default_factory=lambda: _versions())

    def __call__(self, row: Mapping, index: int) -> dict:
        with naming(f"row {index}"):
            return self._process(decode_row(row), index, columnar=JSON_ROW not in row)

    def _process(self, row: Mapping, index: int, columnar: bool) -> dict:
        notes: dict[str, str] = {}
        reason = ""
        ids: Sequence[list[int]]
        if self.tokenized:
            ids = [_token_ids(row.get(name), f"row {index}: {name}") for name in TOKEN_COLUMNS]
        else:
            pair, ids = read_pair(row, index, columnar), ([], [], [])
            reason = why_unusable(*pair.whole)
            options = template_options(row, index, self.tokenizer, columnar)
            if not reason:
                tokens = tokenize(pair, self.tokenizer, index, **{**self.template_options, **options})
                ids, notes = (tokens.prompt, tokens.chosen, tokens.rejected), tokens.notes
                if self.prompts and row.get("prompt") is None:
                    notes["no prompt"] = ""
        reason = reason or why_unusable(*ids[1:])
        found = dict(zip(TOKEN_COLUMNS, ids, strict=True))
        sums = {
            name: reference_columns.checked_sum(row.get(name), f"row {index}: {name}")
            for name in self.reference_columns
        }
        kept = self.truncation(found)
        reason = reason or why_unusable_truncated(kept)
        if sums and kept != Truncation()(found):
            notes["sums cut"] = ""
        if not reason:
            self._check_limits(kept, index, notes)
        said = {_REASON: reason, _NOTES: json.dumps(notes) if notes else ""}
        return {**found, **sums, LENGTH_COLUMN: row_tokens(kept), **said}

    def _check_limits(self, pair: TokenPair, index: int, notes: dict) -> None:
        limits = self.limits
        sides = (pair.chosen_prompt, pair.chosen), (pair.rejected_prompt, pair.rejected)
        for side, (prompt, completion) in zip(SIDES, sides, strict=True):
            largest, length = max(*prompt, *completion, -1), len(prompt) + len(completion)
            if limits.vocab_size is not None and largest >= limits.vocab_size:
                raise ValueError(
                    f"row {index}: prompt + {side} holds the token id {largest}, the model's embedding has "
                    f"{limits.vocab_size} rows; it is another model's tokenizer, or model.resize_token_embeddings() "
                    "has not been called"
                )
            if limits.positions is not None and length > limits.positions:
                if limits.learned_positions:
                    raise ValueError(
                        f"row {index}: prompt + {side} has {length} tokens, the model has {limits.positions} "
                        f"positions; max_length={limits.positions} cuts what is longer"
                    )
                notes["long"] = f"{length} tokens in {side}, made for {limits.positions}"


def _token_ids(value, where: str) -> list[int]:
    if not isinstance(value, (list, tuple)) or not set(map(type, value)) <= {int}:
        kinds = (
            sorted({type(v).__name__ for v in value}) if isinstance(value, (list, tuple)) else [type(value).__name__]
        )
        raise TypeError(f"{where} must be a list of token ids (int), got {', '.join(kinds)}")
    if value and min(value) < 0:
        raise ValueError(f"{where} holds the token id {min(value)}; ids are at least 0")
    return list(value)


def row_tokens(pair: TokenPair) -> int:
    """Tokens that a pair adds to a shared-prefix row: what samplers go by."""
    return row_length([([*pair.chosen_prompt, *pair.chosen], [*pair.rejected_prompt, *pair.rejected])])


class _ReportOnce:
    """Filter of a stream: says once per reason and process what is dropped and what is odd; the number is not known."""

    def __init__(self, name: str):
        self.name = name
        self.seen: set[str] = set()

    def __call__(self, row: dict) -> bool:
        if row[_REASON] and row[_REASON] not in self.seen:
            self.seen.add(row[_REASON])
            logger.warning("%s dataset: dropping pairs of the stream: %s", self.name, row[_REASON])
        for key, example in json.loads(row[_NOTES] or "{}").items():
            if key not in self.seen:
                self.seen.add(key)
                logger.warning("%s dataset: pairs of the stream %s%s", self.name, NOTES[key], _example(example))
        return not row[_REASON]


def _example(example: str, where: str = "") -> str:
    return f" (first: {where}{example})" if example else ""


def _drop_unusable(dataset: datasets.Dataset, name: str, said: list[str]) -> datasets.Dataset:
    def say(line: str) -> None:
        logger.warning("%s", line)
        said.append(line)

    reasons = list(dataset[_REASON])
    counts = Counter(reason for reason in reasons if reason)
    total, dropped = len(dataset), sum(counts.values())
    why = "; ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if dropped == total:
        raise ValueError(f"{name} dataset: none of the {total} pairs can be trained on: {why}")
    if dropped:
        say(f"{name} dataset: {dropped} of {total} pairs dropped: {why}")
    numbers: Counter[str] = Counter()
    first: dict[str, tuple[int, str]] = {}
    for index, notes in enumerate(dataset[_NOTES]):
        for key, example in json.loads(notes or "{}").items():
            numbers[key] += 1
            first.setdefault(key, (index, example))
    for key, number in numbers.items():
        index, example = first[key]
        say(f"{name} dataset: {number} of {total} pairs {NOTES[key]}{_example(example, f'row {index}, ')}")
    dataset = dataset.remove_columns([_REASON, _NOTES])
    return dataset.select([i for i, reason in enumerate(reasons) if not reason]) if dropped else dataset


# --- a batch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairCollator:
    """Rows of a prepared dataset -> truncated pairs -> `PreferenceBatch`."""

    pad_token_id: int
    truncation: Truncation = Truncation()
    pad_to_multiple_of: int = 1
    layout: str = "padded"

    def __post_init__(self):
        if self.layout not in LAYOUTS[1:]:
            raise ValueError(f"PairCollator: layout must be one of {', '.join(LAYOUTS[1:])}, got {self.layout!r}")

    def __call__(self, rows: list[Mapping]) -> PreferenceBatch:
        if rows and not (isinstance(rows[0], Mapping) and rows[0].keys() >= set(TOKEN_COLUMNS)):
            came = ", ".join(map(str, rows[0])) if isinstance(rows[0], Mapping) else type(rows[0]).__name__
            raise ValueError(
                f"PairCollator: rows must have {', '.join(TOKEN_COLUMNS)} (see prepare_dataset), got {came}"
            )
        pairs = [self.truncation(row) for row in rows]
        if self.layout == "shared_prefix":
            batch = shared_prefix_batch(pairs)
        else:
            batch = padded_batch(pairs, self.pad_token_id, self.pad_to_multiple_of)
        batch.update(reference_columns.fields(rows, batch))
        return batch

    def padded_length(self, row: Mapping) -> int:
        """Positions that a pair takes in a batch of its own in the padded layout."""
        pair = self.truncation(row)
        longest = max(len(pair.chosen_prompt) + len(pair.chosen), len(pair.rejected_prompt) + len(pair.rejected))
        return 2 * -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of


def format_example(pair: TokenPair, tokenizer, colour: bool = False) -> str:
    """A pair as the model sees it, decoded: the scored part between >> and <<, the prompt dimmed with `colour`."""
    dim, bold, reset = ("\033[2m", "\033[1m", "\033[0m") if colour else ("", "", "")
    lines = []
    for side, prompt, completion in (
        ("chosen", pair.chosen_prompt, pair.chosen),
        ("rejected", pair.rejected_prompt, pair.rejected),
    ):
        context, scored = printable(tokenizer.decode(prompt)), printable(tokenizer.decode(completion))
        lines.append(f"{side} ({len(prompt)} prompt tokens, {len(completion)} scored between >> and <<):")
        lines.append(f"{dim}{context}{reset}>>{bold}{scored}{reset}<<")
    return "\n".join(lines)
