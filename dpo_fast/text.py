"""Text for a terminal, a log or a file: without secrets, and without control characters."""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "(not shown)"
# Names of options, of keys in mappings and of environment variables, in any case
_SECRET = re.compile(
    r"(token|password|passwd|passphrase|secret|credentials?|authorization|signature|(^|[_-])(pat|sig)"
    r"|(api|access|secret|account|private|sas)[_-]?key)$",
    re.IGNORECASE,
)
_NO_SECRET = re.compile(r"(^|_)(eos|bos|pad|unk|sep|mask|cls|stop|image|audio|video|special|per)_token$", re.IGNORECASE)
_NAMED = r"[\w-]*(?:token|password|passwd|passphrase|secret|(?:api|access|secret|account|private)[_-]?key)"
_ASSIGNED = re.compile(
    rf"""(?<![\w-])({_NAMED}|sig|signature)(["']?\s*[:=]\s*)(\(not shown\)|"[^"]*"?|'[^']*'?|[^\s,}}&"']+)""",
    re.IGNORECASE,
)
# What gives itself away: of Hugging Face, OpenAI and others, GitHub, GitLab, Amazon, Slack; a password in an address
_LOOKS_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{10,}|\bapi_org_[A-Za-z0-9]{10,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}"
)
_IN_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/]+@", re.IGNORECASE)
_SHORTEST, _LONG = (
    8,
    16,
)  # a short secret, or a word, would hide what happens to be like it; a name hides it where it is
_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether what is called so is not for others to read."""
    return _SECRET.search(name) is not None and _NO_SECRET.search(name) is None


def remember(values: Mapping) -> None:
    """Hide, from now on, the values of secret names in a mapping, at any depth."""
    todo: list[tuple[bool, Any]] = [(False, values)]
    seen = set()  # YAML's aliases may hold a mapping many times, or in itself
    while todo:
        secret, value = todo.pop()
        if isinstance(value, str):
            if secret and _is_told_apart(value):
                _known.add(value)
        elif isinstance(value, (Mapping, list, tuple)) and (secret, id(value)) not in seen:
            seen.add((secret, id(value)))
            named = value.items() if isinstance(value, Mapping) else [("", entry) for entry in value]
            todo += [(secret or is_secret(str(name)), entry) for name, entry in named]


def _is_told_apart(text: str) -> bool:
    text = text.strip()
    return len(text) >= _LONG or len(text) >= _SHORTEST and not text.isalpha()


def without_secrets(text: str) -> str:
    """The text without secrets: known ones, those of the environment, and what looks like one."""
    remember(os.environ)
    for value in sorted(_known, key=len, reverse=True):
        if value in text:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", HIDDEN, text)
    text = _IN_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    return _LOOKS_SECRET.sub(HIDDEN, text)


def without_assigned_secrets(text: str) -> str:
    """The text without what stands after a secret name, as in `{"token": "x"}` and `token=x`."""

    def hide(found: re.Match) -> str:
        return found[0] if _NO_SECRET.search(found[1]) else f"{found[1]}{found[2]}{HIDDEN}"

    return _ASSIGNED.sub(hide, text)


def clean(value: Any) -> Any:
    """Plain values with `without_secrets` of each text in them; keys and numbers stay."""
    if isinstance(value, Mapping):
        return {key: clean(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(entry) for entry in value]
    return without_secrets(value) if isinstance(value, str) else value


def printable(text: str) -> str:
    """The text with control characters escaped, but for line breaks and tabs: data cannot drive a terminal."""
    return "".join(x if x.isprintable() or x in "\n\t" else _escaped(x) for x in text)


def _escaped(character: str) -> str:
    """Of a control or format character (which may also reorder what is read); other letters and spaces are kept."""
    code = ord(character)
    if character.isspace() and code >= 0xA0:
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(text: str) -> str:
    """For a terminal."""
    return printable(without_assigned_secrets(without_secrets(text)))


class Clean(logging.Filter):
    """Makes messages `shown`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        return True


_CLEAN = Clean()


def clean_logs(*names: str) -> None:
    """What the loggers of libraries, and those below them, write is `shown`, too."""
    for handler in [handler for name in names for handler in logging.getLogger(name).handlers]:
        handler.addFilter(_CLEAN)


logging.getLogger("dpo_fast").addFilter(_CLEAN)
