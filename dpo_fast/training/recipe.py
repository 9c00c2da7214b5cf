"""A recipe: a YAML file and options of the command line -> a value for each key, typed by `keys`."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dpo_fast import text
from dpo_fast.report.record import plain

from .aliases import hint_for
from .keys import Key, Wrong, accepted, convert, takes
from .sources import BadInput
from .written import Text, read_yaml, show


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
    written = {**written, **from_options}
    if written.get("resume_from_checkpoint") == Text("", plain=False):  # as of a variable that is not set
        problems.append("resume_from_checkpoint must be true, false or a folder, got ''")
    text.remember(written)
    written = {name: value for name, value in written.items() if name in keys}
    values, given = {}, {}
    for name, value in written.items():
        try:
            if "\0" in getattr(value, "text", ""):
                raise Wrong(f"{name} must be text without NUL characters, got {show(value)}")
            values[name] = convert(keys[name], value)
        except Wrong as error:
            where = f"{config_file}: " if name not in from_options else ""
            said = f"{name} must be {accepted(keys[name])}" if text.is_secret(name) else str(error)
            problems.append(where + text.without_assigned_secrets(said))
        given[name] = _shown(name, values.get(name), value)
    text.remember(values)
    if problems:
        raise BadInput("; ".join(problems))
    return Values(values, given)


def _unknown(written: dict[str, Any], keys: dict[str, Key]) -> list[str]:
    """At most one sentence, which names all unknown keys."""
    hints = {name: hint_of(name, value, keys) for name, value in written.items() if name not in keys}
    all_keys = "dpo-fast train --help lists all keys"
    if len(hints) == 1:
        ((name, hint),) = hints.items()
        return [f"unknown key {name!r}; {hint or all_keys}"]
    each = [f"{name!r} ({hint})" if hint else repr(name) for name, hint in hints.items()]
    return [f"unknown keys {', '.join(each)}; {all_keys}"] if each else []


def hint_of(name: str, value, keys: Iterable[str]) -> str:
    """What to write instead of an unknown key: other projects' names first, then names that look alike."""
    underscored = name.replace("-", "_")
    if hint := hint_for(underscored, text.HIDDEN if text.is_secret(name) else show(value)):
        return hint
    if underscored.startswith("no_") and underscored[3:] in keys:
        return f"write {underscored[3:]}: false"
    close = difflib.get_close_matches(underscored, keys, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else ""


def read_options(options: list[str], keys: dict[str, Key]) -> dict[str, Any]:
    """`--key value ...`, `--key=value`, `--flag` and `--no_flag`; the last one of a key counts."""
    found: dict[str, Any] = {}
    for option, value in zip(options, options[1:], strict=False):
        text.remember({option.lstrip("-"): value})
    for option in options:
        if re.search("[\ud800-\udfff]", option):  # what Python makes of bytes that are none
            raise BadInput(f"{option!r} is not in UTF-8")
    position = 0
    while position < len(options):
        option = options[position]
        if not option.startswith("--") or option == "--":
            more = "; options begin with two dashes" if option.startswith("-") else ""
            hidden = position > 0 and text.is_secret(options[position - 1].lstrip("-"))
            raise BadInput(f"unexpected {text.HIDDEN if hidden else repr(option)}{more}")
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
        if len(words) > 1 and name in keys and not takes(keys[name], list):
            shown = [text.HIDDEN] * 2 if text.is_secret(name) else [repr(words[1]), repr(" ".join(words))]
            raise BadInput(f"unexpected {shown[0]}: {name} takes one value, got {shown[1]}; the YAML file comes first")
        texts = [Text(word, plain=word != "") for word in words]
        found[name] = texts[0] if len(texts) == 1 else texts
    return found


def _shown(name: str, typed, value) -> str:
    """For the report: what was written, on one line, without secrets."""
    if text.is_secret(name):
        return text.HIDDEN
    if isinstance(value, Text) and not isinstance(typed, dict):
        return "null" if value.is_null and typed is None else value.text
    if isinstance(value, list):
        return " ".join(entry.text if isinstance(entry, Text) else show(entry) for entry in value) or "[]"
    return json.dumps(plain(typed or {}), default=str)
