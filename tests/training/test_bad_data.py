"""Bad preference data: each kind is refused by row and column, or named in a line, before the first step."""

import datetime
import logging

import pytest
from tiny import tiny_chat_rows, tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")

import datasets

from dpo_fast.training.data import ModelLimits, Truncation, prepare_dataset
from dpo_fast.training.models import limits

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
MUTE = "{% for m in messages %}{{ m['role'] }}{{ eos_token }}{% endfor %}"
TEXT, (CHAT,) = {"prompt": "the cat", "chosen": " sees", "rejected": " eats"}, tiny_chat_rows(1)
IDS = {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8]}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def text(**changes):
    return [TEXT, {**TEXT, **changes}]


def chat(**changes):
    return [CHAT, {**CHAT, **changes}]


def ids(**changes):
    return [IDS, {**IDS, **changes}]


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


# rows, exception, what the message names; a fourth element has the options of `prepare`
BAD_ROWS = {
    # what is missing
    "chosen is None": (text(chosen=None), ValueError, "row 1: chosen is missing"),
    "rejected is None": (chat(rejected=None), ValueError, "row 1: rejected is missing"),
    "a row without chosen": ([TEXT, without(TEXT, "chosen")], ValueError, "row 1: chosen is missing"),
    "a row without ids": ([IDS, without(IDS, "chosen_ids")], TypeError, "row 1: chosen_ids must be a list .* NoneType"),
    "no rows": ([], ValueError, "dataset is empty"),
    "rows without columns": ([{}, {}], ValueError, "dataset is empty"),
    # columns under other names
    "question": ([{**without(TEXT, "prompt"), "question": "the cat"}], ValueError, "no column prompt, but question"),
    "instruction": (
        [{**without(TEXT, "prompt"), "instruction": "Say"}],
        ValueError,
        "no column prompt, but instruction",
    ),
    "Input": ([{**without(TEXT, "prompt"), "Input": "Say"}], ValueError, "no column prompt, but Input"),
    "promt": ([{**without(TEXT, "prompt"), "promt": "the cat"}], ValueError, "no column prompt, but promt.*rename"),
    "prompts": ([{**without(TEXT, "prompt"), "prompts": "the cat"}], ValueError, "no column prompt, but prompts"),
    "conversations": (
        [{**without(CHAT, "prompt"), "conversations": [{"from": "human", "value": "q"}]}],
        ValueError,
        "no column prompt, but conversations",
    ),
    "accepted": ([{"prompt": "a", "accepted": "b", "rejected": "c"}], ValueError, "accepted may be chosen"),
    "choosen": ([{"prompt": "a", "choosen": "b", "rejected": "c"}], ValueError, "choosen may be chosen"),
    "rejected_response": (
        [{"prompt": "a", "chosen_response": "b", "rejected_response": "c"}],
        ValueError,
        "chosen_response may be chosen; rejected_response may be rejected",
    ),
    "images": ([{**TEXT, "image": "x"}], ValueError, "column 'image': only text"),
    # kinds of values
    "a number": (text(chosen=3), TypeError, "row 1: chosen is int"),
    "a truth": (text(rejected=True), TypeError, "row 1: rejected is bool"),
    "a dict": (chat(chosen=ANSWER), TypeError, "row 1: chosen is dict"),
    "text and messages": (text(chosen=[ANSWER]), TypeError, "row 1: expected all columns as text or all as lists"),
    "messages before text": (text(prompt=[USER]), TypeError, "row 1: expected all columns .* prompt is list"),
    "a list of texts": (chat(chosen=["a"]), TypeError, "row 1: chosen: message 0 is str"),
    "a date": (
        chat(chosen=[{**ANSWER, "content": datetime.date(2000, 1, 1)}]),
        TypeError,
        "row 1: chosen: date is nei",
    ),
    "content is a number": (
        chat(chosen=[{**ANSWER, "content": 7}]),
        TypeError,
        "row 1: chosen: message 0: content is int",
    ),
    "content is missing": (
        chat(rejected=[{"role": "assistant"}]),
        ValueError,
        "row 1: rejected: message 0 has no content",
    ),
    "content is None": (chat(rejected=[{**ANSWER, "content": None}]), ValueError, "row 1: rejected: .* no content"),
    "a part with an image": (
        chat(prompt=[{"role": "user", "content": [{"type": "image", "url": "x"}]}]),
        ValueError,
        "row 1: prompt: message 0 has a part of type 'image'",
    ),
    "a part that is a number": (chat(prompt=[{**USER, "content": [3]}]), TypeError, "row 1: prompt: .* content is int"),
    "from and value": (
        chat(chosen=[{"from": "gpt", "value": "a"}]),
        ValueError,
        r"row 1: chosen: message 0 has no role \(its keys: from, value\)",
    ),
    "a role that is a number": (chat(prompt=[{"role": 1, "content": "a"}]), ValueError, "row 1: prompt: .* no role"),
    "half a surrogate": (text(chosen="\ud800"), ValueError, "row 1"),
    "bytes": (text(chosen=b"a"), TypeError, "row 1: chosen: bytes is neither text"),
    # whole conversations
    "another question": (
        chat(chosen=[{**USER, "content": "else"}, ANSWER], rejected=[{**USER, "content": "else"}, ANSWER]),
        ValueError,
        "row 1: chosen begins with a message of the user, which is not the prompt",
    ),
    "one side is whole": (chat(rejected=[*CHAT["prompt"], ANSWER]), ValueError, "row 1: rejected begins with"),
    "a prefill of parts": (
        chat(prompt=[USER, {"role": "assistant", "content": [{"type": "text", "text": "{"}]}]),
        TypeError,
        "row 1: prompt ends with a message of the assistant",
    ),
    # the template
    "a template that refuses": (
        chat(prompt=[{"role": "system", "content": "s"}, USER]),
        ValueError,
        "row 1: prompt: the chat template refuses it: TemplateError: no system role",
        dict(tokenizer=tiny_tokenizer(chat_template=STRICT)),
    ),
    "a template that leaves the answer out": (
        chat(),
        ValueError,
        "row 0: chosen: the chat template renders nothing of the answer",
        dict(tokenizer=tiny_tokenizer(chat_template=MUTE)),
    ),
    "no template": (
        chat(),
        ValueError,
        "row 0: prompt: .*chat_template",
        dict(tokenizer=tiny_tokenizer(chat_template=None)),
    ),
    "tools that are no JSON": (chat(tools="[{"), ValueError, "row 1: tools is no JSON"),
    "tools that are no list": (chat(tools="3"), TypeError, "row 1: tools must be a list, got int"),
    "options that are no mapping": (
        chat(chat_template_kwargs=[1]),
        TypeError,
        "row 1: chat_template_kwargs must be a dict",
    ),
    "a row with its own template": (
        chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}),
        ValueError,
        "row 1: chat_template_kwargs must not hold chat_template",
    ),
    "a row that does not tokenise": (
        chat(chat_template_kwargs={"tokenize": True}),
        ValueError,
        "row 1: .* hold tokenize",
    ),
    "all rows with another template": (
        chat(),
        ValueError,
        "chat_template_kwargs must not hold chat_template",
        dict(template_options={"chat_template": "{{ 1 }}"}),
    ),
    # token ids
    "ids that are floats": (ids(chosen_ids=[6.7]), TypeError, "row 1: chosen_ids must be a list of token ids .* float"),
    "ids that are truths": (ids(rejected_ids=[True]), TypeError, "row 1: rejected_ids must be .* got bool"),
    "ids that are text": (ids(chosen_ids="67"), TypeError, "row 1: chosen_ids must be .* got str"),
    "nested ids": (ids(prompt_ids=[[5]]), TypeError, "row 1: prompt_ids must be .* got list"),
    "ids that are None": (ids(prompt_ids=None), TypeError, "row 1: prompt_ids must be .* got NoneType"),
    "one id": (ids(prompt_ids=5), TypeError, "row 1: prompt_ids must be .* got int"),
    "negative ids": (ids(chosen_ids=[-1]), ValueError, "row 1: chosen_ids holds the token id -1"),
    "ids beyond the vocabulary": (
        ids(rejected_ids=[320]),
        ValueError,
        r"row 1: prompt \+ rejected holds the token id 320, the model's embedding has 320 rows",
        dict(limits=ModelLimits(vocab_size=320)),
    ),
    "beyond learned positions": (
        ids(chosen_ids=[6] * 64),
        ValueError,
        r"row 1: prompt \+ chosen has 65 tokens, the model has 64 positions; max_length=64",
        dict(limits=ModelLimits(positions=64, learned_positions=True)),
    ),
    # reference log-probs
    **{
        f"a reference of {value}": (
            [{**row, "ref_chosen_logps": value, "ref_rejected_logps": -1.0} for row in ids()],
            error,
            "row 0: ref_chosen_logps must be",
        )
        for value, error in ((0.5, ValueError), (float("nan"), ValueError), (None, TypeError), ("-1", TypeError))
    },
    # what cannot be trained on
    "no difference": ([{**TEXT, "rejected": " sees"}], ValueError, "none of the 1 pairs can be trained on: 1 equal"),
    "no answers": ([{**TEXT, "chosen": ""}], ValueError, "none of the 1 pairs can be trained on: 1 empty completion"),
    "rows that are no dicts": ([TEXT, "text"], TypeError, "row 1 is str, expected a dict"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_refused_by_row_and_column(name):
    rows, error, named, *options = BAD_ROWS[name]
    options = {"tokenizer": tiny_tokenizer(), **(options[0] if options else {})}
    with pytest.raises(error, match=named):
        prepare_dataset(rows, truncation=Truncation(), **options)


def said_of(rows, caplog, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        found = prepare_dataset(rows, options.pop("tokenizer", tiny_tokenizer()), Truncation(), **options)
    return found, caplog.messages


def test_what_is_odd_is_counted_with_an_example(caplog):
    rows = [*tiny_rows(2), without(tiny_rows(3)[2], "prompt")]
    _, lines = said_of(rows, caplog)
    assert lines == ["train dataset: 1 of 3 pairs have no prompt"]
    _, lines = said_of([TEXT, {"chosen": "the cat sees", "rejected": "the cat eats"}], caplog)
    assert lines == ["train dataset: 1 of 2 pairs have no prompt"]  # but what both begin with
    turns = {"chosen": [ANSWER, USER, ANSWER], "rejected": [ANSWER, USER, {**ANSWER, "content": "b"}]}
    _, lines = said_of([CHAT, {**turns, "prompt": [USER]}], caplog)
    assert len(lines) == 1 and "1 of 2 pairs have messages of the user" in lines[0]
    _, lines = said_of([{**IDS, "chosen_ids": [6] * 70}], caplog, limits=ModelLimits(positions=64))
    assert len(lines) == 1 and "1 of 1 pairs are longer than the positions" in lines[0] and "71 tokens" in lines[0]


@pytest.mark.parametrize("column", ["weight", "margin", "score_chosen", "rating"])
def test_a_column_that_may_be_meant_is_named(caplog, column):
    found, lines = said_of([{**row, column: 0.5, "id": 3, "source": "web"} for row in tiny_rows(2)], caplog)
    assert lines == [f"train dataset: columns that are not used: {column}"]
    assert column not in found.column_names
    table = datasets.Dataset.from_list([{**row, column: 1} for row in tiny_rows(2)])
    assert said_of(table, caplog)[1] == lines


def test_a_column_beside_whole_conversations_is_no_prompt(caplog):
    whole = {side: CHAT["prompt"] + CHAT[side] for side in ("chosen", "rejected")}
    found, lines = said_of([{**whole, "messages": whole["chosen"], "question": "else"}], caplog)
    assert (found.to_list(), lines) == (prepare_dataset([CHAT], tiny_tokenizer(), Truncation()).to_list(), [])
    text = {"chosen": "Q: the cat? A: a", "rejected": "Q: the cat? A: b", "question": "the cat?"}
    assert said_of([text], caplog)[1] == []


def test_a_stream_says_each_thing_once(caplog):
    rows = datasets.Dataset.from_list([{"chosen": "a b", "rejected": "c"}] * 3).to_iterable_dataset()
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        assert len(list(prepare_dataset(rows, tiny_tokenizer(), Truncation()))) == 3
    assert caplog.messages == ["train dataset: pairs of the stream have no prompt"]


def test_limits_are_those_of_all_models(caplog):
    policy, small = tiny_model("gpt2", vocab_size=320), tiny_model(vocab_size=300, max_position_embeddings=99)
    found = limits(policy, None)
    assert (found.vocab_size, found.learned_positions) == (320, True)
    assert limits(small) == ModelLimits(300, 99, False)
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        assert limits(policy, small).vocab_size == 300
    assert caplog.messages == ["model has 320 token embeddings, ref_model 300"]
    assert limits(tiny_model("opt")).learned_positions
