"""The keys of `dpo-fast train`, from a YAML file and from options: each value is read by the type of its key.

What is written counts, not what YAML 1.1 takes it for: `no` is a name for save_strategy and False for bf16, `5e-7` is a
number where a number is expected, a date is a name where a name is expected, `null` is None where None is a value.
Options are read by the same rules. The inside of a mapping (`..._kwargs`) has no declared types; there YAML decides.
"""

import dataclasses
import difflib
import enum
import json
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .aliases import hint_for
from .sources import BadInput, one_line

TRUE, FALSE = {"true", "yes", "on", "y", "t", "1"}, {"false", "no", "off", "n", "f", "0"}
SECRET = re.compile(r"(^|_)(token|password|secret|api_key)$")

# What TrainingArguments takes beyond its annotations, in one version or another
WIDER = {"fsdp": bool | str | list[str] | None, "resume_from_checkpoint": bool | str | None}
PATH_OR_MAPPING = {"deepspeed", "fsdp_config", "accelerator_config"}
NAMES_LOGGERS = "report_to"  # "none" is a name there


class Text(NamedTuple):
    """A value as it is written. plain: without quotes, so that `null` and `none` may mean None."""

    text: str
    plain: bool = True

    @property
    def is_null(self) -> bool:
        return self.plain and self.text.lower() in ("", "~", "null", "none")


class Key(NamedTuple):
    """A key: what it may be (`types` of a union, None's included) and, where it is a name, the names there are."""

    name: str
    types: tuple
    names: tuple[str, ...]
    default: Any = None
    needed: bool = False


class _Wrong(Exception):
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
        if isinstance(member, type) and issubclass(member, enum.Enum):
            names = tuple(str(value.value) for value in member)
    needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    return Key(field.name, members, names, field.default, needed)


# --- reading ---------------------------------------------------------------------------------------------------------


class Values(NamedTuple):
    """values: key -> typed value. given: key -> what was written, for the report, without secrets."""

    values: dict[str, Any]
    given: dict[str, str]


def read(config_file: Path | None, options: list[str], keys: dict[str, Key]) -> Values:
    """The file's keys, then the options, which win. Raises BadInput, which names all keys that are unknown and all
    values that do not fit their key."""
    written: dict[str, Any] = {}
    problems = []
    if config_file is not None:
        written = read_yaml(config_file)
        problems += [f"{config_file}: {problem}" for problem in _unknown(written, keys)]
    from_options = read_options(options, keys)
    problems += _unknown(from_options, keys)
    written = {name: value for name, value in {**written, **from_options}.items() if name in keys}
    values, given = {}, {}
    for name, value in written.items():
        try:
            values[name] = convert(keys[name], value)
        except _Wrong as error:
            where = f"{config_file}: " if name not in from_options else ""
            problems.append(f"{where}{error}")
        given[name] = "(not shown)" if SECRET.search(name) else _shown(values.get(name), value)
    if problems:
        raise BadInput("; ".join(problems))
    return Values(values, given)


def _unknown(written: dict[str, Any], keys: dict[str, Key]) -> list[str]:
    """At most one sentence, which names all unknown keys."""
    hints = {name: _hint(name, value, keys) for name, value in written.items() if name not in keys}
    all_keys = "dpo-fast train --help lists all keys"
    if len(hints) == 1:
        ((name, hint),) = hints.items()
        return [f"unknown key {name!r}; {hint or all_keys}"]
    each = [f"{name!r} ({hint})" if hint else repr(name) for name, hint in hints.items()]
    return [f"unknown keys {', '.join(each)}; {all_keys}"] if each else []


def _hint(name: str, value, keys: Iterable[str]) -> str:
    """What to write instead of an unknown key: other projects' names first, then names that look alike."""
    plain = name.replace("-", "_")
    if hint := hint_for(plain, show(value)):
        return hint
    if plain.startswith("no_") and plain[3:] in keys:
        return f"write {plain[3:]}: false"
    close = difflib.get_close_matches(plain, keys, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def read_options(options: list[str], keys: dict[str, Key]) -> dict[str, Any]:
    """`--key value ...`, `--key=value`, `--flag` and `--no_flag`; the last one of a key counts."""
    found: dict[str, Any] = {}
    position = 0
    while position < len(options):
        option = options[position]
        if not option.startswith("--") or option == "--":
            more = "; options begin with two dashes" if option.startswith("-") else ""
            raise BadInput(f"unexpected {option!r}{more}")
        position += 1
        name, equals, value = option[2:].partition("=")
        words = [value] if equals else []
        while not equals and position < len(options) and not options[position].startswith("--"):
            words.append(options[position])
            position += 1
        name = name.replace("-", "_") if name.replace("-", "_") in keys else name
        flag = name.replace("-", "_").removeprefix("no_")
        if name not in keys and flag in keys and bool in keys[flag].types and not words:
            found[flag] = Text("false")
            continue
        if not words:
            if name in keys and bool not in keys[name].types:
                raise BadInput(f"--{name} needs a value: {accepted(keys[name])}")
            words = ["true"]
        if len(words) > 1 and name in keys and not _takes(keys[name], list):
            shown = " ".join(words)
            raise BadInput(f"unexpected {words[1]!r}: {name} takes one value, got {shown!r}; the YAML file comes first")
        texts = [Text(word, plain=word != "") for word in words]
        found[name] = texts[0] if len(texts) == 1 else texts
    return found


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """As SafeLoader inside a mapping, but `5e-7` is a number, as in JSON, and a date is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Keys of a file with what is written there: Text, lists and mappings. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"there is no file {str(path)!r}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path} cannot be read as UTF-8 text: {one_line(error)}") from error
    found = _parse(text, str(path))
    if not isinstance(found, dict):
        came = "a list" if isinstance(found, list) else "nothing" if found.text == "" else "text"
        raise BadInput(f"{path} must hold keys and values, as in `model: path`, got {came}")
    return found


def _parse(text: str, where: str):
    """A document: Text, or a list, or a mapping of names to what `_value` makes of the values."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Text("")
            _check_nodes(node, where)
            if not isinstance(node, yaml.MappingNode):
                return _value(node, loader)
            loader.flatten_mapping(node)
            return {str(key.value): _value(value, loader) for key, value in node.value}
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{where} is not YAML: {one_line(error)}") from error


def _value(node: yaml.Node, loader: _Loader):
    """What is written: Text, a list (of Text, as far as it is flat), or a mapping, which YAML reads."""
    if isinstance(node, yaml.ScalarNode):
        return Text(node.value, plain=not node.style)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [_value(item, loader) for item in node.value]
    return loader.construct_document(node)


def _check_nodes(root: yaml.Node, where: str) -> None:
    """Refuse a key that is there twice, where YAML would take the last, and tags that are not data."""
    seen, todo = set(), [root]
    while todo:
        node = todo.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if node.tag not in _Loader.yaml_constructors:
            raise BadInput(
                f"{where} is not YAML: line {node.start_mark.line + 1} has the tag {node.tag}, which is no data"
            )
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if name in lines and key.tag != "tag:yaml.org,2002:merge":
                    raise BadInput(f"{where}: the key {name!r} comes twice, in lines {lines[name]} and {line}")
                lines[name] = line
                todo += [key, value]


# --- typing ----------------------------------------------------------------------------------------------------------


def convert(key: Key, value) -> Any:
    """What is written, as the key's type. Raises _Wrong, which names the key, the value and what is accepted."""
    if isinstance(value, Text):
        if value.is_null and not _is_a_name(key, value) or value.text == "":
            return _nothing(key, value)
        for kind, reader in _READERS:
            if _takes(key, kind) and (found := reader(key, value)) is not None:
                return found
        for literal in (literal for kind in key.types for literal in typing.get_args(kind) if literal is not str):
            if value.text.lower() == str(literal).lower():
                return literal
    elif isinstance(value, dict) and _takes(key, dict):
        _check_size(key, value)
        return value
    elif isinstance(value, list) and _takes(key, list):
        found = _entries(key, value)
        if found is not None:
            return found
    raise _Wrong(f"{key.name} must be {accepted(key)}, got {show(value)}{_remark(key, value)}")


def _nothing(key: Key, value: Text):
    """null, as the key has it."""
    if key.name == NAMES_LOGGERS:
        return "none"
    if type(None) in key.types:
        return None
    if key.default == "":
        return ""
    default = "" if key.needed else "; leave it out for its default"
    raise _Wrong(f"{key.name} must be {accepted(key)}, got {show(value)}{default}")


def _entries(key: Key, value: list) -> list | None:
    """A list, each entry as the key's lists have it; None where one does not fit."""
    kind = _entry_type(key)
    names = tuple(str(member.value) for member in kind) if _is(kind, enum.Enum) else ()
    item = Key(key.name, (kind if kind in (bool, int, float) else str,), names)
    if any(isinstance(entry, Text) and entry.is_null and not _is_a_name(key, entry) for entry in value):
        return None
    try:
        found = [convert(item, entry) for entry in value]
    except _Wrong:
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
                raise _Wrong(f"{key.name} is longer than a million characters")
    except (ValueError, TypeError, RecursionError) as error:
        raise _Wrong(f"{key.name} must be a mapping as JSON has them: {one_line(error)}") from error


def _is_a_name(key: Key, value) -> bool:
    """Whether "none" is meant as it is written."""
    return value.text == "none" and (key.name == NAMES_LOGGERS or "none" in key.names)


def _is(kind, what: type) -> bool:
    return typing.get_origin(kind) is what or isinstance(kind, type) and issubclass(kind, what)


def _takes(key: Key, what: type) -> bool:
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
    if re.fullmatch(r"[-+]?\d+(_\d+)*", value.text):
        return int(value.text)
    number = _as_number(key, value)  # 1e3
    return int(number) if number is not None and number.is_integer() else None


def _as_mapping(key: Key, value: Text) -> dict | None:
    if not value.text.lstrip().startswith("{"):
        return None
    found = _flow(value.text)
    return convert(key, found) if isinstance(found, dict) else None


def _as_list(key: Key, value: Text) -> list | None:
    """`[a, b]` as text; one entry without brackets is a list of one, unless the key takes text as well."""
    text = value.text.strip()
    if text.startswith("[") and text.endswith("]"):
        found = _flow(text)
        return convert(key, found) if isinstance(found, list) else None
    return None if _takes(key, str) else convert(key, [value])


def _flow(text: str):
    """A list or a mapping that is written as text; None where it is neither."""
    try:
        with_brackets = _parse(f"_: {text}", "it")
    except BadInput:
        return None
    return with_brackets["_"]


def _as_text(key: Key, value: Text) -> str | None:
    if key.names:
        text = "no" if "no" in key.names and value.plain and value.text.lower() in ("off", "false") else value.text
        return text if text in key.names else None
    if _takes(key, dict):  # a path, where not a mapping
        return value.text if key.name in PATH_OR_MAPPING and Path(value.text).is_file() else None
    return value.text


# In this order: a bool where the key takes bool or text, a list in brackets where it takes a list or text
_READERS: tuple[tuple[type, Callable], ...] = (
    (bool, _as_bool), (int, _as_int), (float, _as_number), (dict, _as_mapping), (list, _as_list), (str, _as_text),
)  # fmt: skip


def accepted(key: Key) -> str:
    """What a key takes, in words."""
    words = []
    if _takes(key, bool):
        words.append("true or false")
    if _takes(key, int):
        words.append("a whole number")
    if _takes(key, float):
        words.append("a number")
    if _takes(key, str) and not _takes(key, dict):
        words.append(f"one of {', '.join(key.names)}" if key.names else "text")
    if _takes(key, list):
        words.append("a list of " + {float: "numbers", int: "whole numbers"}.get(_entry_type(key), "text"))
    if _takes(key, dict):
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
    if _takes(key, bool) and value.text.lower() == "auto" and type(None) in key.types:
        return "; null chooses by the device"
    return ""


def show(value) -> str:
    """A value about as it was written; long ones are cut."""
    if isinstance(value, Text):
        return "null" if value.plain and value.text in ("", "~", "null") else repr(value.text)
    if isinstance(value, list):
        return f"[{', '.join(x.text if isinstance(x, Text) else reprlib.repr(x) for x in value[:20])}]"
    return reprlib.repr(value)


def _shown(typed, value) -> str:
    """For the report: what was written, on one line; secrets inside of mappings are left out."""
    if isinstance(value, Text) and not isinstance(typed, dict):
        return "null" if value.is_null and typed is None else value.text
    if isinstance(value, list):
        return " ".join(entry.text if isinstance(entry, Text) else show(entry) for entry in value) or "[]"
    hidden = {name: "(not shown)" if SECRET.search(str(name)) else entry for name, entry in (typed or {}).items()}
    return json.dumps(hidden, default=str)
