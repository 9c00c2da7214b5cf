"""Text for a terminal, a log or a file: without secrets, and without control characters."""

import logging
import os
import re
from collections.abc import Mapping

HIDDEN = "(not shown)"
# Names of options, of keys in mappings and of environment variables, in any case
SECRET = re.compile(
    r"(token|password|passwd|passphrase|secret|credentials?|authorization"
    r"|(api|access|secret|account|private|sas)[_-]?key)$",
    re.IGNORECASE,
)
_ASSIGNED = re.compile(
    r"""((?:token|password|passwd|passphrase|secret|(?:api|access|secret|account|private)[_-]?key)["']?\s*[:=]\s*)"""
    r"""("[^"]*"|'[^']*'|[^\s,}&]+)""",
    re.IGNORECASE,
)
# What gives itself away: of Hugging Face, OpenAI and others, GitHub, GitLab, Amazon, Slack; a password in an address
_LOOKS_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{10,}|\bapi_org_[A-Za-z0-9]{10,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}"
    r"|\bgithub_pat_\w{20,}|\bglpat-[\w-]{16,}|\bAKIA[0-9A-Z]{16}\b|\bxox[abprs]-[\w-]{10,}"
)
_IN_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE)
_SHORTEST = 8  # a shorter secret would hide words that happen to hold it; its name hides it where it is written
_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether what is called so is not for others to read."""
    return SECRET.search(name) is not None


def remember(values: Mapping) -> None:
    """Hide, from now on, the values of secret names in a mapping, at any depth."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            remember(value)
        elif isinstance(value, str) and is_secret(str(name)) and len(value) >= _SHORTEST:
            _known.add(value)


def without_secrets(text: str) -> str:
    """The text without secrets: known ones, those of the environment, and what looks like one."""
    remember(os.environ)
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _IN_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    return _LOOKS_SECRET.sub(HIDDEN, text)


def without_assigned_secrets(text: str) -> str:
    """The text without what stands after a secret name, as in `{"token": "x"}` and `token=x`."""
    return _ASSIGNED.sub(rf"\1{HIDDEN}", text)


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
    return printable(without_secrets(text))


class Clean(logging.Filter):
    """Makes messages `shown`."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = shown(record.getMessage()), ()
        return True


logging.getLogger("dpo_fast").addFilter(Clean())
