"""One row of preference data -> token ids of its prompt and its two completions.

    read_pair        the columns of a row -> a `Pair`: where the prompt ends, of texts or of chat messages
    tokenize         a `Pair` -> `Tokens`, and what a person would want to know about them (`notes`)

What cannot be trained on raises TypeError or ValueError with the row and the column.
"""

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SIDES = ("chosen", "rejected")
ASKING = ("system", "developer", "user")  # roles whose messages a model does not write


@dataclass(frozen=True)
class Pair:
    """All texts, or all lists of chat messages."""

    prompt: str | list
    chosen: str | list
    rejected: str | list
    prefill: bool = False  # the completions go on with the prompt's last message
    whole: tuple = ()  # chosen and rejected as they came, with the prompt if that is in them
    notes: tuple[str, ...] = ()  # keys of `NOTES`


@dataclass
class Tokens:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    cut: int = 0  # tokens of the prompt alone that are not in the context, because they merge across the boundary
    notes: dict[str, str] = field(default_factory=dict)  # key of `NOTES` -> an example


# What is said of a data set once, with the number of its pairs
NOTES = {
    "no prompt": "have no prompt",
    "doubled": "hold the prompt in chosen and rejected, too: it is read once, and only what follows is scored",
    "user turns": "have messages of the user, or a system message, inside a completion: their tokens are scored, too",
    "left out": "lose text of a message, such as reasoning: the chat template leaves it out, it is not scored",
    "scored prompt": "have tokens of the prompt in the scored part, because the tokenised prompt is no beginning of "
    "prompt + completion (the chat template renders a prompt alone differently)",
    "sums cut": "are cut to length: their columns ref_chosen_logps, ref_rejected_logps must be of what is left",
    "long": "are longer than the positions that the model was made for",
}


# --- the columns of a row --------------------------------------------------------------------------------------------


def read_row(row: Mapping, index: int | str = "?") -> tuple:
    """(prompt, chosen, rejected) of a row: all strings, or all lists of chat messages. See `read_pair`."""
    pair = read_pair(row, index)
    return pair.prompt, pair.chosen, pair.rejected


def read_pair(row: Mapping, index: int | str = "?", columnar: bool = True) -> Pair:
    """Where the prompt ends in a row with chosen, rejected and perhaps prompt, each text or chat messages.

    Without a prompt, it is the longest common beginning of chosen and rejected. A prompt that both begin with, too, is
    read once. A prompt as text before chat messages is a message of the user. A prompt that ends with a message of the
    assistant is one that the completions go on with.
    columnar: the row was stored as columns, which put None where only other rows have a key.

    Raises TypeError for other mixtures and for contents that are no text, ValueError for what is missing or
    contradicts itself, with the row's `index` and the column.
    """
    at = f"row {index}: "
    for side in SIDES:
        if row.get(side) is None:
            raise ValueError(f"{at}{side} is missing")
    prompt, chosen, rejected = (_messages(row.get(name), at + name, columnar) for name in ("prompt", *SIDES))
    kinds = {type(value) for value in (prompt, chosen, rejected) if value is not None}
    if isinstance(prompt, str) and kinds == {str, list} and type(chosen) is type(rejected):
        kinds = {list}
    if kinds not in ({str}, {list}):
        values = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        came = ", ".join(f"{name} is {type(value).__name__}" for name, value in values.items())
        raise TypeError(f"{at}expected all columns as text or all as lists of chat messages, but {came}")
    return (_split_messages if kinds == {list} else _split_texts)(prompt, chosen, rejected, at)


def _split_texts(prompt: str | None, chosen: str, rejected: str, at: str) -> Pair:
    whole, notes = (chosen, rejected), []
    if prompt is None:
        start = common_prefix(chosen, rejected)
        prompt = chosen[:start]
    else:
        doubled = bool(prompt.strip()) and all(text.startswith(prompt) for text in whole)
        start = len(prompt) if doubled else 0
        notes += ["doubled"] * doubled
        whole = chosen[start:], rejected[start:]
    notes += ["no prompt"] * (not prompt.strip())
    return Pair(prompt, chosen[start:], rejected[start:], whole=whole, notes=tuple(notes))


def _split_messages(prompt: str | list | None, chosen: list, rejected: list, at: str) -> Pair:
    shared, explicit, notes = common_prefix(chosen, rejected), bool(prompt), []
    if not explicit:  # an empty prompt is none where conversations are whole
        whole = prompt is None or bool(chosen) and chosen[0]["role"] in ASKING
        start = shared if whole else 0
        prompt = chosen[:start]
    else:
        given: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        start = _end_of_prompt_in(chosen[:shared], given)
        notes += ["doubled"] * bool(start)
        prompt = chosen[:start] or given
        explicit = not start
        if explicit:
            _check_completions(given, chosen, rejected, at)
        while start < shared and chosen[start]["role"] in ASKING:  # what both are asked is no completion
            prompt, start = [*prompt, chosen[start]], start + 1
    chosen, rejected = chosen[start:], rejected[start:]
    ends = [prompt[-1], chosen[0], rejected[0]] if explicit and chosen and rejected else []
    prefill = {m["role"] for m in ends} == {"assistant"}
    if prefill and not all(isinstance(m.get("content"), str) for m in ends):
        raise TypeError(f"{at}prompt ends with a message of the assistant, which only text can go on with")
    notes += ["no prompt"] * (not prompt)
    notes += ["user turns"] * any(m["role"] in ASKING for m in chosen + rejected)
    return Pair(prompt, chosen, rejected, prefill, (chosen, rejected), tuple(notes))


def _check_completions(prompt: list, chosen: list, rejected: list, at: str) -> None:
    """Raise ValueError where a completion asks, as whole conversations do, but does not begin with the prompt."""
    for side, messages in zip(SIDES, (chosen, rejected), strict=True):
        asks = bool(messages) and messages[0]["role"] in ASKING
        both_ask_the_same = prompt[-1]["role"] in ("system", "developer") and chosen[:1] == rejected[:1]
        if asks and not both_ask_the_same:
            raise ValueError(
                f"{at}{side} begins with a message of the {messages[0]['role']}, which is not the prompt; give whole "
                "conversations that begin alike without a prompt, or completions alone"
            )


def _end_of_prompt_in(shared: list, prompt: list) -> int:
    """Where the prompt ends in a common beginning of both conversations, 0 if it is not in there: at its start, behind
    system messages, or as the last turn of a conversation that somebody else began."""
    wanted, before = [_key(message) for message in prompt], 0
    if shared and shared[0]["role"] in ASKING and [_key(m) for m in shared[-len(prompt) :]] == wanted:
        return len(shared)
    while [_key(message) for message in shared[before : before + len(prompt)]] != wanted:
        if before == len(shared) or shared[before]["role"] not in ("system", "developer"):
            return 0
        before += 1
    return before + len(prompt)


def _key(message: Mapping) -> tuple:
    return message["role"], _text_of(message).strip() or json.dumps(message, sort_keys=True, default=str)


def _messages(value, where: str, columnar: bool):
    """Text as it is; chat messages with a role and contents that are text."""
    if not isinstance(value, list):
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"{where} is {type(value).__name__}: expected all columns as text or all as lists of chat messages"
            )
        _check_text(value or "", where)
        return value
    return [_message(message, f"{where}: message {i}", columnar) for i, message in enumerate(value)]


def _message(message, where: str, columnar: bool) -> dict:
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} is {type(message).__name__}, expected {{'role': ..., 'content': ...}}")
    message = {k: without_none(v) if columnar else v for k, v in message.items() if v is not None}
    if not isinstance(message.get("role"), str):
        keys = ", ".join(map(str, message)) or "none"
        raise ValueError(f"{where} has no role (its keys: {keys}); messages are {{'role': ..., 'content': ...}}")
    content = message.get("content")
    if content is None:
        if set(message) == {"role"}:
            raise ValueError(f"{where} has no content")
        return message
    for part in content if isinstance(content, list) else [content]:
        if isinstance(part, Mapping):
            if part.get("type", "text") != "text":
                raise ValueError(f"{where} has a part of type {part['type']!r}: only text can be trained on")
            part = part.get("text")
        if not isinstance(part, str):
            raise TypeError(f"{where}: content is {type(part).__name__}, expected text")
        _check_text(part, where)
    return message


def _check_text(text: str, where: str) -> None:
    """ValueError for half of a surrogate pair, which JSON can hold as \\ud800, but no encoding of text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half of a character, {text[error.start]!r}, which is no text") from error


def without_none(value):
    """Without the keys that are None, at any depth."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


def _text_of(message: Mapping) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def common_prefix(*sequences: Sequence) -> int:
    """Length of the longest common prefix."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length


def template_options(row: Mapping, index: int | str = "?", tokenizer=None, columnar: bool = True) -> dict:
    """Arguments of the chat template that a row carries: `tools` (a list, or JSON; an empty one is none) and
    `chat_template_kwargs`. Raises for what is no JSON, and for arguments that are not the template's own."""
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    found: dict[str, Any] = {}
    for name, value, kind in (("tools", tools, list), ("chat_template_kwargs", options, dict)):
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"row {index}: {name} is no JSON: {error}") from error
        if not value:
            continue
        if not isinstance(value, kind):
            raise TypeError(f"row {index}: {name} must be a {kind.__name__}, got {type(value).__name__}")
        found[name] = without_none(value) if columnar else value
    options = found.get("chat_template_kwargs", {})
    check_template_options(options, tokenizer, f"row {index}: ")
    return {**({"tools": found["tools"]} if "tools" in found else {}), **options}


def check_template_options(options: Mapping, tokenizer, where: str = "") -> None:
    """Raise ValueError for arguments of `apply_chat_template` itself, its choice of a template among them."""
    own = set(_parameters(type(tokenizer))) - {"documents"} if tokenizer is not None else {"chat_template"}
    if taken := sorted(own.intersection(options)):
        raise ValueError(f"{where}chat_template_kwargs must not hold {taken[0]}, which is no variable of a template")


@functools.cache
def _parameters(kind: type) -> tuple[str, ...]:
    function = getattr(kind, "apply_chat_template", None)
    return () if function is None else tuple(inspect.signature(function).parameters)


def check_tokenizer(tokenizer):
    """The same; TypeError for what is none, ValueError for one that makes no token ids of a word."""
    kind = type(tokenizer).__name__
    missing = [name for name in ("__call__", "decode", "eos_token_id", "pad_token_id") if not hasattr(tokenizer, name)]
    if missing or isinstance(tokenizer, type):
        raise TypeError(f"processing_class must be a tokenizer, got {'a class' if kind == 'type' else kind}")
    try:
        ids = tokenizer("a")["input_ids"]
    except Exception as error:  # tokenizers raises a bare one
        raise ValueError(f"the tokenizer ({kind}) cannot be used: {type(error).__name__}: {error}") from error
    if not (isinstance(ids, list) and all(isinstance(i, int) for i in ids)):
        raise ValueError(f"the tokenizer ({kind}) makes no list of token ids of 'a', but {ids!r:.100}")
    return tokenizer


# --- token ids -------------------------------------------------------------------------------------------------------


def tokenize_pair(prompt, chosen, rejected, tokenizer, **options) -> tuple[list[int], list[int], list[int], int]:
    """(prompt_ids, chosen_ids, rejected_ids, number of prompt tokens cut) of what `read_row` returns; `options` of the
    chat template."""
    found = tokenize(Pair(prompt, chosen, rejected), tokenizer, **options)
    return found.prompt, found.chosen, found.rejected, found.cut


def tokenize(pair: Pair, tokenizer, index: int | str = "?", **options) -> Tokens:
    """The boundary is decided in token space: the prompt is the longest prefix common to the tokenised prompt and both
    full sequences, because tokens may merge across the boundary and a chat template may render a prompt alone
    differently. Text ends with exactly one EOS; how a chat ends is for its template to say.
    """
    notes = dict.fromkeys(pair.notes, "")
    if isinstance(pair.chosen, str):
        prompt_ids = _text_ids(tokenizer, pair.prompt)
        full = [_text_ids(tokenizer, pair.prompt + text, end=True) for text in (pair.chosen, pair.rejected)]
        return _cut(tokenizer, prompt_ids, full[0], full[1], notes, "")
    prompt: Any = pair.prompt
    ask = {"add_generation_prompt": True}
    sides = [prompt + pair.chosen, prompt + pair.rejected]
    if pair.prefill:
        ask = {"continue_final_message": True}
        sides = [
            [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + side[0]["content"]}, *side[1:]]
            for side in (pair.chosen, pair.rejected)
        ]
    asked = _render(tokenizer, prompt, f"row {index}: prompt", **ask, **options) if prompt else ""
    texts = [
        _render(tokenizer, messages, f"row {index}: {side}", **options)
        for side, messages in zip(SIDES, sides, strict=True)
    ]
    for side, text, messages, completion in zip(SIDES, texts, sides, (pair.chosen, pair.rejected), strict=True):
        _check_answer(text[common_prefix(asked, text) :], completion, f"row {index}: {side}")
        for number, message in enumerate(messages):
            lost = _left_out(text, message, number == len(messages) - 1)
            if lost:
                notes.setdefault("left out", f"{side}, the {message['role']}'s {_short(lost)}")
    full = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    prompt_ids = tokenizer(asked, add_special_tokens=False)["input_ids"] if asked else []
    return _cut(tokenizer, prompt_ids, full[0], full[1], notes, _text_of(prompt[-1]) if prompt else "")


def _cut(tokenizer, prompt_ids: list, chosen: list, rejected: list, notes: dict, last: str) -> Tokens:
    """last: the last message of a chat's prompt, which must not be scored."""
    boundary = common_prefix(prompt_ids, chosen, rejected)
    cut = len(prompt_ids) - boundary
    if cut:
        if last:
            scored = last.strip() not in tokenizer.decode(chosen[:boundary])
        else:  # within a word it is how tokens merge
            scored = len(tokenizer.decode(prompt_ids[boundary:]).split()) > 1
        if scored:
            notes["scored prompt"] = f"{cut} tokens from {_short(tokenizer.decode(prompt_ids[boundary:]))}"
    return Tokens(chosen[:boundary], chosen[boundary:], rejected[boundary:], cut, notes)


def _text_ids(tokenizer, text: str, end: bool = False) -> list[int]:
    """Token ids with the tokenizer's special tokens, which text that was rendered already may have in front, too; with
    `end`, exactly one EOS behind: white space that follows one in rendered text is no part of an answer."""
    eos = tokenizer.eos_token_id
    if end and (tokenizer.eos_token or "\0") in text and text.rstrip().endswith(tokenizer.eos_token):
        text = text.rstrip()
    ids, front = tokenizer(text)["input_ids"], _front(tokenizer)
    while front and ids[len(front) : 2 * len(front)] == front:
        ids = ids[len(front) :]
    if end:
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        ids = [*ids, eos]
    return ids


def _front(tokenizer) -> list[int]:
    """The tokens that the tokenizer puts in front of every text."""
    plain, ids = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return next((ids[:k] for k in range(len(ids)) if ids[k : k + len(plain)] == plain), [])


def _render(tokenizer, messages: list, where: str, **options) -> str:
    with naming(f"{where}: the chat template refuses it"):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Say `where` in front of whatever templates and tokenizers raise (the latter a bare Exception), unless the message
    names its row already."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("row "):
            raise
        raise ValueError(f"{where}: {type(error).__name__}: {error}") from error


def _left_out(text: str, message: Mapping, last: bool) -> str:
    """The text of a message that is not in the rendered `text`, "" for none. Templates trim, and hide the reasoning of
    earlier turns."""
    wanted = _text_of(message)
    if not last and message["role"] == "assistant":
        wanted = wanted.rpartition("</think>")[2]
    wanted = wanted.strip()
    as_json = json.dumps(wanted, ensure_ascii=False)[1:-1]
    return "" if wanted in text or as_json in text else wanted


def _check_answer(scored: str, completion: list, where: str) -> None:
    """Raise ValueError where nothing of the answer is left in the rendered text."""
    written = [_text_of(message) for message in completion if message["role"] not in ASKING]
    words = {word for text in written for part in (text, text.rpartition("</think>")[2]) for word in part.split()}
    if words and not any(word in scored for word in words):
        raise ValueError(f"{where}: the chat template renders nothing of the answer {_short(' '.join(written))}")


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
