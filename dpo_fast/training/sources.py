"""Where rows come from: files, saved data sets, the hub; rows as they were written.

Columns of one type each are no place for rows of JSON: dates that are text become times, a key that only one row has
is there in all, and one that the first row lacks is lost. Rows from JSON files and from lists are kept as JSON, one
text each (the column `JSON_ROW`), and read again when they are tokenised.
"""

import codecs
import glob
import gzip
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import datasets
import pyarrow.parquet as parquet
from datasets.exceptions import DatasetsError

JSON_ROW = "_row_as_json"
JSON_SUFFIXES, PARQUET = (".json", ".jsonl"), ".parquet"
FORMATS = (*JSON_SUFFIXES, *(f"{suffix}.gz" for suffix in JSON_SUFFIXES), PARQUET)


class BadInput(Exception):
    """Something in the user's input cannot be used; the message is one sentence for the user."""


def decode_row(row: Mapping) -> Mapping:
    return json.loads(row[JSON_ROW]) if JSON_ROW in row else row


def dataset_of_rows(rows: Sequence[Mapping]) -> datasets.Dataset:
    """Raises TypeError for what is no row, and for contents that are no JSON, with row and column."""
    texts = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {index} is {type(row).__name__}, expected a dict with the columns")
        for column, value in row.items():
            try:
                json.dumps(value, default=_plain)
            except (TypeError, ValueError) as error:
                raise TypeError(f"row {index}: {column}: {error}") from error
        texts.append(json.dumps(dict(row), default=_plain))
    return datasets.Dataset.from_dict({JSON_ROW: texts})


def _plain(value):
    """Arrays, tensors and numbers of theirs as lists and numbers."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is neither text nor a number, list or dict of such")


def load_pairs(source: str, name: str | None, split: str) -> datasets.Dataset:
    """A dataset from a JSON, JSONL (also .gz) or Parquet file, a directory of `save_to_disk`, or the hub.

    Raises BadInput for what is not there or cannot be read.
    """
    path = Path(source)
    suffix = next((suffix for suffix in FORMATS if source.lower().endswith(suffix)), None)
    if suffix:
        if not path.is_file():
            raise BadInput(f"there is no file {source!r}")
        if split != "train":
            raise BadInput(f"{source} is one file without splits, so there is no split {split!r}; leave the split out")
        return _parquet(path) if suffix == PARQUET else _json(path)
    if path.is_file():
        raise BadInput(f"{source} is none of {', '.join(FORMATS)}")
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = datasets.load_from_disk(source)
        if isinstance(saved, datasets.Dataset):
            return saved
        if split not in saved:
            raise BadInput(f"{source} has no split {split!r}; it has {', '.join(saved)}")
        return saved[split]
    if not path.is_dir() and not may_be_hub_id(source):
        raise BadInput(f"there is no dataset {source!r}")
    return datasets.load_dataset(source, name, split=split)


def may_be_hub_id(name: str) -> bool:
    """Whether `name` looks like `name` or `owner/name`, and not like a path in a folder that is here."""
    here = Path(name).parent
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None and (here == Path() or not here.is_dir())


def _parquet(path: Path) -> datasets.Dataset:
    try:
        if not parquet.read_metadata(path).num_rows:
            raise BadInput(f"{path} holds no rows")
        # `datasets` takes a name for a pattern
        return datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
    except (DatasetsError, ValueError, OSError) as error:
        raise BadInput(f"{path} cannot be read: {one_line(causes(error)[-1])}") from error


def _json(path: Path) -> datasets.Dataset:
    state = path.stat()  # what a cache of the rows is keyed by
    key = dict(path=str(path.resolve()), size=state.st_size, modified=state.st_mtime_ns)
    features = datasets.Features({JSON_ROW: datasets.Value("large_string")})
    try:
        return datasets.Dataset.from_generator(_json_rows, gen_kwargs=key, features=features)
    except (DatasetsError, ValueError) as error:
        reason = next((e for e in causes(error) if isinstance(e, BadInput)), None)
        if reason is None:  # nothing was yielded
            raise BadInput(f"{path} holds no rows") from error
        raise BadInput(f"{path} {reason}") from error


def causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while found[-1].__cause__ is not None:
        found.append(found[-1].__cause__)
    return found


def _json_rows(path: str, size: int, modified: int) -> Iterator[dict]:
    """The rows of a JSON file: a list, one object per line, or an object with a list under its one key."""
    for where, row in _json_values(Path(path)):
        if not isinstance(row, Mapping):
            raise BadInput(f"cannot be read: {where} is a {type(row).__name__}, expected an object with the columns")
        yield {JSON_ROW: json.dumps(row)}


def _json_values(path: Path) -> Iterator[tuple[str, object]]:
    try:
        with _open(path) as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            number, first = next(lines, (0, ""))
            if not number:
                raise BadInput("holds no rows")
            if not first.lstrip().startswith("[") and (row := _value(first)) is not None:
                second = next(lines, None)
                if second is not None or not _is_wrapped(row):
                    yield f"line {number}", row
                    for number, line in itertools.chain([second] if second else [], lines):
                        yield f"line {number}", json.loads(line)
                    return
        with _open(path) as file:
            rows = json.loads(file.read())
        rows = next(iter(rows.values())) if _is_wrapped(rows) else rows
        for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
            yield f"element {number}", row
    except json.JSONDecodeError as error:
        raise BadInput(f"cannot be read: line {max(number, error.lineno)} is no JSON: {error}") from error
    except UnicodeDecodeError as error:
        raise BadInput(
            f"is not in UTF-8 ({error.reason}: 0x{error.object[error.start]:02x}); convert it, as in: "
            f"iconv -f ENCODING -t UTF-8 {path.name}"
        ) from error
    except (OSError, EOFError) as error:
        raise BadInput(f"cannot be read: {error}") from error


def _value(line: str):
    """What one line of JSON holds, None if it is not a whole value."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _is_wrapped(value) -> bool:
    """Whether an object is no row, but holds rows under its one key."""
    rows = next(iter(value.values())) if isinstance(value, Mapping) and len(value) == 1 else None
    return isinstance(rows, list) and all(isinstance(row, Mapping) for row in rows)


def _open(path: Path) -> TextIO:
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")


def one_line(error: BaseException) -> str:
    """The first paragraph of a message, on one line."""
    return " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
