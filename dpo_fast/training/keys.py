"""The keys of a recipe and their types: what is written -> the value of a key, or what the key accepts.

What is written counts, not what YAML 1.1 takes it for: `no` is a name for save_strategy and False for bf16, `5e-7` is a
number where a number is expected, a date is a name where a name is expected, `null` is None where None is a value.
"""

import dataclasses
import difflib
import enum
import json
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .sources import one_line
from .written import Text, read_flow, show

TRUE, FALSE = {"true", "yes", "on", "y", "t", "1"}, {"false", "no", "off", "n", "f", "0"}

# What TrainingArguments takes beyond its annotations, in one version or another
WIDER = {"fsdp": bool | str | list[str] | None, "resume_from_checkpoint": bool | str | None}
PATH_OR_MAPPING = {"deepspeed", "fsdp_config", "accelerator_config"}
NAMES_LOGGERS = "report_to"  # "none" is a name there


class Key(NamedTuple):
    """A key: what it may be (`types` of a union, None's included) and, where it is a name, the names there are."""

    name: str
    types: tuple
    names: tuple[str, ...]
    default: Any = None
    needed: bool = False


class Wrong(Exception):
    """A value does not fit its key."""


def keys_of(*classes: type) -> dict[str, Key]:
    """The keys that the fields of dataclasses make."""
    found = {}
    for owner in classes:
        hints = typing.get_type_hints(owner)
        for field in dataclasses.fields(owner):
            if field.init:
                found[field.name] = _key(field, hints[field.name])
    return found


def _key(field: dataclasses.Field, hint) -> Key:
    hint = WIDER.get(field.name, hint)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    members = typing.get_args(hint) if union else (hint,)
    if field.default is None and type(None) not in members:
        members = (*members, type(None))
    names = tuple(field.metadata.get("choices", ()))
    for member in members:
        if _is(member, enum.Enum):
            names = tuple(str(value.value) for value in member)
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    return Key(field.name, members, names, field.default, needed)


def convert(key: Key, value) -> Any:
    """What is written, as the key's type. Raises Wrong, which names the key, the value and what is accepted."""
    if isinstance(value, Text):
        if value.is_null and not _is_a_name(key, value) or value.text == "":
            return _nothing(key, value)
        for literal in (x for kind in key.types if typing.get_origin(kind) is Literal for x in typing.get_args(kind)):
            if value.text.lower() == str(literal).lower():
                return literal
        for kind, reader in _READERS:
            if takes(key, kind) and (found := reader(key, value)) is not None:
                return found
    elif isinstance(value, dict) and takes(key, dict):
        _check_size(key, value)
        return value
    elif isinstance(value, list) and takes(key, list):
        found = _entries(key, value)
        if found is not None:
            return found
    raise Wrong(f"{key.name} must be {accepted(key)}, got {show(value)}{_remark(key, value)}")


def _nothing(key: Key, value: Text):
    """null, as the key has it."""
    if key.name == NAMES_LOGGERS:
        return "none"
    if type(None) in key.types:
        return None
    if key.default == "":
        return ""
    default = "" if key.needed else "; leave it out for its default"
    raise Wrong(f"{key.name} must be {accepted(key)}, got {show(value)}{default}")


def _entries(key: Key, value: list) -> list | None:
    """A list, each entry as the key's lists have it; None where one does not fit."""
    kind = _entry_type(key)
    names = tuple(str(member.value) for member in kind) if _is(kind, enum.Enum) else ()
    item = Key(key.name, (kind if kind in (bool, int, float) else str,), names)
    if any(isinstance(entry, Text) and entry.is_null and not _is_a_name(key, entry) for entry in value):
        return None
    try:
        found = [convert(item, entry) for entry in value]
    except Wrong:
        return None
    return [kind(entry) for entry in found] if names else found


def _entry_type(key: Key):
    return (*typing.get_args(next(kind for kind in key.types if _is(kind, list))), str)[0]


def _check_size(key: Key, value: dict) -> None:
    """Refuse what YAML's aliases unfold into: a mapping that holds itself, or gigabytes."""
    try:
        length = 0
        for part in json.JSONEncoder(default=str).iterencode(value):
            length += len(part)
            if length > 1_000_000:
                raise Wrong(f"{key.name} is longer than a million characters")
    except (ValueError, TypeError, RecursionError) as error:
        raise Wrong(f"{key.name} must be a mapping as JSON has them: {one_line(error)}") from error


def _is_a_name(key: Key, value) -> bool:
    """Whether "none" is meant as it is written."""
    return value.text == "none" and (key.name == NAMES_LOGGERS or "none" in key.names)


def _is(kind, what: type) -> bool:
    kind = typing.get_origin(kind) or kind
    return isinstance(kind, type) and issubclass(kind, what)


def takes(key: Key, what: type) -> bool:
    """Whether a value of the key may be of a type; bool is not an int here."""
    return any(_is(kind, what) and not (what is int and kind is bool) for kind in key.types)


def _as_bool(key: Key, value: Text) -> bool | None:
    word = value.text.lower()
    return True if word in TRUE else False if word in FALSE else None


def _as_number(key: Key, value: Text) -> float | None:
    text = re.sub(r"^([-+]?)\.inf$", r"\1inf", value.text.strip().lower())
    try:
        number = float(text)
    except ValueError:
        return None
    return None if number != number else number


def _as_int(key: Key, value: Text) -> int | None:
    if len(value.text) > 100:  # of thousands of digits, Python makes no int
        return None
    if re.fullmatch(r"[-+]?\d+(_\d+)*", value.text):
        return int(value.text)
    number = _as_number(key, value)  # 1e3
    return int(number) if number is not None and number.is_integer() else None


def _as_mapping(key: Key, value: Text) -> dict | None:
    if not value.text.lstrip().startswith("{"):
        return None
    found = read_flow(value.text)
    return convert(key, found) if isinstance(found, dict) else None


def _as_list(key: Key, value: Text) -> list | None:
    """`[a, b]` as text; one entry without brackets is a list of one, unless the key takes text as well."""
    text = value.text.strip()
    if text.startswith("[") and text.endswith("]"):
        found = read_flow(text)
        return convert(key, found) if isinstance(found, list) else None
    return None if takes(key, str) else convert(key, [value])


def _as_text(key: Key, value: Text) -> str | None:
    if key.names:
        text = "no" if "no" in key.names and value.plain and value.text.lower() in ("off", "false") else value.text
        return text if text in key.names else None
    if takes(key, dict):  # a path, where not a mapping
        return value.text if key.name in PATH_OR_MAPPING and Path(value.text).is_file() else None
    return value.text


# In this order: a bool where the key takes bool or text, a list in brackets where it takes a list or text
_READERS: tuple[tuple[type, Callable], ...] = (
    (bool, _as_bool), (int, _as_int), (float, _as_number), (dict, _as_mapping), (list, _as_list), (str, _as_text),
)  # fmt: skip


def accepted(key: Key) -> str:
    """What a key takes, in words."""
    words = []
    if takes(key, bool):
        words.append("true or false")
    if takes(key, int):
        words.append("a whole number")
    if takes(key, float):
        words.append("a number")
    if takes(key, str) and not takes(key, dict):
        words.append(f"one of {', '.join(key.names)}" if key.names else "text")
    if takes(key, list):
        words.append("a list of " + {float: "numbers", int: "whole numbers"}.get(_entry_type(key), "text"))
    if takes(key, dict):
        words.append("a mapping, as in {key: value},")
    if key.name in PATH_OR_MAPPING:
        words.append("the path of a JSON file that is there")
    if not words:
        return "left to Python, as it cannot be written as text"
    return " or ".join([*words, "null"] if type(None) in key.types else words).rstrip(",")


def _remark(key: Key, value) -> str:
    if not isinstance(value, Text):
        return ""
    if key.names and (close := difflib.get_close_matches(value.text, key.names, n=3)):
        return f"; did you mean {' or '.join(close)}?"
    if takes(key, bool) and value.text.lower() == "auto" and type(None) in key.types:
        return "; null chooses by the device"
    return ""
