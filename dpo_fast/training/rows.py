"""One row of preference data -> token ids of its prompt and its two completions."""

import json
from collections.abc import Mapping, Sequence


def read_row(row: Mapping, index: int | str = "?") -> tuple:
    """(prompt, chosen, rejected) of a row: all strings, or all lists of chat messages.

    A missing prompt is the longest common beginning of chosen and rejected; a prompt as text before chat messages is a
    message of the user. Raises TypeError for any other mixture, with the row's `index`.
    """
    prompt, chosen, rejected = row.get("prompt"), _messages(row["chosen"]), _messages(row["rejected"])
    if prompt is None and type(chosen) is type(rejected) and isinstance(chosen, (str, list)):
        shared = common_prefix(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        prompt = [{"role": "user", "content": prompt}]
    prompt = _messages(prompt)
    if {type(prompt), type(chosen), type(rejected)} not in ({str}, {list}):
        came = ", ".join(
            f"{name} is {type(value).__name__}"
            for name, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected))
        )
        raise TypeError(f"row {index}: expected all columns as text or all as lists of chat messages, but {came}")
    return prompt, chosen, rejected


def _messages(value):
    """Messages without the None that columnar storage adds for keys which only other messages have."""
    if not isinstance(value, list):
        return value
    return [{key: v for key, v in message.items() if v is not None} for message in value]


def common_prefix(*sequences: Sequence) -> int:
    """Length of the longest common prefix."""
    length = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        length += 1
    return length


def tokenize_pair(prompt, chosen, rejected, tokenizer, **options) -> tuple[list[int], list[int], list[int], int]:
    """(prompt_ids, chosen_ids, rejected_ids, number of prompt tokens cut) of what `read_row` returns; `options` of the
    chat template.

    The boundary is decided in token space: the prompt is the longest prefix common to the tokenised prompt and both
    full sequences, because tokens may merge across the boundary and a chat template may render a prompt alone
    differently. Text ends with exactly one EOS; how a chat ends is for its template to say.
    """
    if isinstance(chosen, str):
        prompt_ids = _text_ids(tokenizer, prompt)
        full = [_text_ids(tokenizer, prompt + completion, end=True) for completion in (chosen, rejected)]
    else:
        prompt_ids = _chat_ids(tokenizer, prompt, add_generation_prompt=True, **options)
        full = [_chat_ids(tokenizer, prompt + completion, **options) for completion in (chosen, rejected)]
    boundary = common_prefix(prompt_ids, *full)
    return full[0][:boundary], full[0][boundary:], full[1][boundary:], len(prompt_ids) - boundary


def _text_ids(tokenizer, text: str, end: bool = False) -> list[int]:
    """Token ids with the tokenizer's special tokens, never two BOS in front; with `end`, exactly one EOS behind."""
    ids = tokenizer(text)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    while bos is not None and ids[:2] == [bos, bos]:  # the text had one, the tokenizer put another in front
        ids = ids[1:]
    if end:
        while ids and ids[-1] == eos:
            ids = ids[:-1]
        ids = [*ids, eos]
    return ids


def _chat_ids(tokenizer, messages: list, **options) -> list[int]:
    if not messages:
        return []
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def template_options(row: Mapping) -> dict:
    """Arguments of the chat template that a row carries: `tools` (a list, or JSON), `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {"tools": tools, **(row.get("chat_template_kwargs") or {})}
