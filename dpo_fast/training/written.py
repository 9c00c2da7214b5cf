"""What a YAML file says, as it is written: `no`, `5e-7` and a date are text. Inside of a mapping, YAML decides."""

import re
import reprlib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .sources import BadInput, one_line


class Text(NamedTuple):
    """A value as it is written. plain: without quotes, so that `null` and `none` may mean None."""

    text: str
    plain: bool = True

    @property
    def is_null(self) -> bool:
        return self.plain and self.text.lower() in ("", "~", "null", "none")


def show(value) -> str:
    """A value about as it was written; long ones are cut."""
    if isinstance(value, Text):
        return "null" if value.plain and value.text in ("", "~", "null") else repr(value.text)
    if isinstance(value, list):
        shown = f"[{', '.join(x.text if isinstance(x, Text) else reprlib.repr(x) for x in value[:20])}]"
        return shown if len(shown) <= 200 else f"{shown[:200]}..."
    return reprlib.repr(value)


_MERGE = "tag:yaml.org,2002:merge"


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
    try:
        if not path.is_file():
            raise BadInput(f"there is no file {str(path)!r}")
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
    except yaml.MarkedYAMLError as error:  # without the line itself, which may hold a secret
        mark = error.problem_mark or error.context_mark
        problem = re.sub(r"'[^']{4,}'", "'...'", error.problem or error.context or "it cannot be read")
        raise BadInput(f"{where} is not YAML: {problem}{f', in line {mark.line + 1}' if mark else ''}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise BadInput(f"{where} is not YAML: {one_line(error)}") from error
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # of a tag that does not fit its value
        raise BadInput(f"{where} is not YAML: a value cannot be read: {one_line(error)}") from error


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
        if node.tag not in (*_Loader.yaml_constructors, _MERGE):
            raise BadInput(
                f"{where} is not YAML: line {node.start_mark.line + 1} has the tag {node.tag}, which is no data"
            )
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                name, line = str(key.value), key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise BadInput(f"{where} is not YAML as it is read here: the key in line {line} is no text")
                if name in lines and key.tag != _MERGE:
                    raise BadInput(f"{where}: the key {name!r} comes twice, in lines {lines[name]} and {line}")
                lines[name] = line
                todo += [key, value]


def read_flow(text: str):
    """A list or a mapping that is written as text; None where it is neither."""
    try:
        with_brackets = _parse(f"_: {text}", "it")
    except BadInput:
        return None
    return with_brackets["_"]
