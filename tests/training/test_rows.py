"""What is read and what is scored of the shapes in which people publish preference data."""

import datetime
import gzip
import json
import logging
import subprocess
import sys

import pytest
from tiny import tiny_chat_rows, tiny_tokenizer

pytest.importorskip("datasets")

import datasets

from dpo_fast.training.data import Truncation, prepare_dataset
from dpo_fast.training.rows import read_pair, read_row
from dpo_fast.training.sources import load_pairs

TOKENIZER = tiny_tokenizer()
SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "How tall are giraffes?"}
SHOWN = "<|user|>How tall are giraffes?</s><|assistant|>"


def say(content, role="assistant"):
    return {"role": role, "content": content}


def scored(row, tokenizer=TOKENIZER, **options):
    """(context, chosen, rejected) as text."""
    (found,) = prepare_dataset([row], tokenizer, Truncation(), **options)
    return tuple(tokenizer.decode(found[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))


GOOD, BAD = [say("Five metres.")], [say("Two.")]


@pytest.mark.parametrize(
    "prompt, before, context",
    [
        (USER["content"], [USER], SHOWN),
        (USER["content"] + "\n", [USER], SHOWN),
        ([USER], [USER], SHOWN),
        ("", [USER], SHOWN),
        ([], [USER], SHOWN),
        (None, [USER], SHOWN),
        (USER["content"], [SYSTEM, USER], "<|system|>Be brief.</s>" + SHOWN),
        ([USER], [SYSTEM, USER], "<|system|>Be brief.</s>" + SHOWN),
        ([SYSTEM], [USER], "<|system|>Be brief.</s>" + SHOWN),
        (USER["content"], [say("Hi", "user"), say("Yes?"), USER], "<|user|>Hi</s><|assistant|>Yes?</s>" + SHOWN),
        ([SYSTEM, USER], [SYSTEM, USER], "<|system|>Be brief.</s>" + SHOWN),
        ([USER, say("Why?"), USER], [USER, say("Why?"), USER], SHOWN + "Why?</s>" + SHOWN),
    ],
)  # fmt: skip
def test_whole_conversations_are_read_once(prompt, before, context):
    row = {"prompt": prompt, "chosen": before + GOOD, "rejected": before + BAD}
    assert scored(row) == (context, "Five metres.</s>", "Two.</s>")


def test_texts_that_begin_with_the_prompt_are_read_once():
    row = {"prompt": "Q: cat?", "chosen": "Q: cat? yes", "rejected": "Q: cat? no"}
    assert scored(row) == ("Q: cat?", " yes</s>", " no</s>")
    # one that repeats the question is an answer that repeats the question
    assert scored({**row, "rejected": " no"})[1:] == ("Q: cat? yes</s>", " no</s>")
    assert read_pair(row).notes == ("doubled",) and read_pair({**row, "rejected": " no"}).notes == ()


def test_words_that_two_answers_share_are_scored_behind_an_explicit_prompt():
    assert scored({"prompt": "", "chosen": "I say a", "rejected": "I say b"}) == ("", "I say a</s>", "I say b</s>")
    chat = {"prompt": [USER], "chosen": [say("Hm."), say("Five")], "rejected": [say("Hm."), say("Two")]}
    assert scored(chat)[1] == "Hm.</s><|assistant|>Five</s>"


@pytest.mark.parametrize("prompt", ["ask: ", None])
def test_an_answer_that_goes_on_where_the_other_ends(prompt):
    start = "" if prompt else "ask: "
    row = {"prompt": prompt, "chosen": start + "yes", "rejected": start + "yes and more"}
    context, good, bad = scored(row)
    assert (context + good, context + bad) == ("ask: yes</s>", "ask: yes and more</s>")


@pytest.mark.parametrize("strict", [False, True])
def test_an_answer_that_was_begun_is_continued(strict):
    template = TOKENIZER.chat_template
    if strict:  # a template that wants turns
        turns = "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% endif %}"
        template = "{% for m in messages %}" + turns + "{% endfor %}" + template
    row = {"prompt": [USER, say('{"m": "')], "chosen": [say('5"}')], "rejected": [say("I think 5")]}
    context, good, bad = scored(row, tiny_tokenizer(chat_template=template))
    assert (context, good, bad) == (SHOWN + '{"m": "', '5"}</s>', "I think 5</s>")


def test_two_messages_of_the_assistant_without_a_prompt_are_two():
    row = {"chosen": [USER, say("Hm."), say("Five")], "rejected": [USER, say("Hm."), say("Two")]}
    assert "".join(scored(row)[:2]) == SHOWN + "Hm.</s><|assistant|>Five</s>"


@pytest.mark.parametrize("ending", ["", "</s>", "</s>\n", "</s> \n\n"])
def test_rendered_text_ends_once(ending):
    assert scored({"prompt": "q", "chosen": " yes" + ending, "rejected": " no"})[1] == " yes</s>"


def test_what_the_tokenizer_puts_in_front_is_not_doubled():
    from tokenizers import processors

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <s> $A", special_tokens=[("<pad>", 0), ("<s>", 1)]
    )
    for front in ("", "<pad><s>"):
        (found,) = prepare_dataset(
            [{"prompt": front + "the", "chosen": " a", "rejected": " b"}], tokenizer, Truncation()
        )
        assert found["prompt_ids"][:2] == [0, 1] and 0 not in found["prompt_ids"][2:]


# --- templates -------------------------------------------------------------------------------------------------------

OPTIONS = "{% if tools is defined and tools is not none %}TOOLS {{ tools[0].name }}. {% endif %}{{ mood }}"


@pytest.mark.parametrize("tools", [[], "[]", "null", "", " ", None])
def test_no_tools_are_no_tools(tools):
    tokenizer = tiny_tokenizer(chat_template=OPTIONS + TOKENIZER.chat_template)
    row = {"prompt": [USER], "chosen": GOOD, "rejected": BAD}
    assert scored({**row, "tools": tools}, tokenizer) == scored(row, tokenizer)


def test_options_for_all_rows_and_for_one():
    tokenizer = tiny_tokenizer(chat_template=OPTIONS + TOKENIZER.chat_template)
    row = {"prompt": [USER], "chosen": GOOD, "rejected": BAD}
    assert scored(row, tokenizer, template_options={"mood": "merry "})[0] == "merry " + SHOWN
    own = {**row, "chat_template_kwargs": {"mood": "sad "}}
    assert scored(own, tokenizer, template_options={"mood": "merry "})[0] == "sad " + SHOWN
    assert scored({**row, "tools": json.dumps([{"name": "clock"}])}, tokenizer)[0] == "TOOLS clock. " + SHOWN


def test_text_that_a_template_leaves_out_is_said(caplog):
    cut = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] | trim }}</s>{% endfor %}"
    row = {"prompt": [USER, say("<think>so</think>Ask."), USER], "chosen": [say("4")], "rejected": [say("5")]}
    rows = [row, {**row, "chosen": [say("<think>two and two</think>4")]}]
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        prepare_dataset(rows, tiny_tokenizer(chat_template=cut), Truncation())
    (line,) = [line for line in caplog.messages if "leaves it out" in line]  # not the reasoning of earlier turns
    assert "1 of 2 pairs" in line and "row 1, chosen, the assistant's '<think>two and two</think>4'" in line


def test_a_message_of_the_prompt_that_is_scored_is_said_with_its_tokens(caplog):
    moved = (
        "{% for m in messages %}{% if m.role == 'user' and loop.last %}{{ messages[0].content }} {% endif %}"
        "{% if m.role != 'system' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    row = {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD}
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        found = prepare_dataset([row], tiny_tokenizer(chat_template=moved), Truncation())
    lines = "\n".join(caplog.messages)
    assert "1 of 1 pairs have tokens of the prompt in the scored part" in lines
    assert "chosen, the system's 'Be brief.'" in lines
    assert "giraffes" in TOKENIZER.decode(found[0]["chosen_ids"])
    alone = len(TOKENIZER("Be brief. How tall are giraffes?</s>")["input_ids"])
    assert f"row 0, {alone} tokens from 'Be brief. How tall" in lines


# --- storage ---------------------------------------------------------------------------------------------------------


def calls(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"prompt": [USER], "chosen": [{"role": "assistant", "tool_calls": [call]}], "rejected": BAD}


CALLS = (
    "{% for m in messages %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
)


@pytest.mark.parametrize("kind", ["list", "file", "table"])
def test_a_row_has_the_keys_that_it_has(tmp_path, kind):
    """Columns give each struct all keys of all rows, and rows none that the first has not."""
    rows = [calls({"city": "Paris"}), calls({"amount": 3}), {**calls({}), "chat_template_kwargs": {"x": 1}}]
    if kind == "file":
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        rows = load_pairs(str(tmp_path / "rows.jsonl"), None, "train")
    elif kind == "table":
        rows = datasets.Dataset.from_list(rows[:2])
    found = prepare_dataset(rows, tiny_tokenizer(chat_template=CALLS), Truncation())
    shown = [TOKENIZER.decode(row["chosen_ids"]) for row in found]
    assert shown[:2] == ['{"city": "Paris"}</s>', '{"amount": 3}</s>']


def test_a_null_that_was_written_stays(tmp_path):
    found = prepare_dataset([calls({"unit": None})], tiny_tokenizer(chat_template=CALLS), Truncation())
    assert TOKENIZER.decode(found[0]["chosen_ids"]) == '{"unit": null}</s>'


DATES = [
    {"prompt": "When? ", "chosen": "1969-07-20", "rejected": "July"},
    {"prompt": "{", "chosen": "[1]", "rejected": "3"},
]


@pytest.mark.parametrize(
    "name, write",
    {
        "lines.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
        "windows.jsonl": lambda rows: b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, rows)).encode() + b"\r\n",
        "wide.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode("utf-16"),
        "lines.json": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
        "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
        "wrapped.json": lambda rows: json.dumps({"data": rows}, indent=1).encode(),
        "wrapped in one line.json": lambda rows: json.dumps({"data": rows}).encode(),
        "lines[1].jsonl.gz": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
        "b[eta=0.1]*?.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    }.items(),
)
def test_files_hold_what_was_written(tmp_path, name, write):
    (tmp_path / name).write_bytes(write(DATES))
    found = load_pairs(str(tmp_path / name), None, "train")
    assert [read_row(json.loads(row)) for (row,) in (row.values() for row in found)] == [
        tuple(r.values()) for r in DATES
    ]


def test_one_row_alone_is_a_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(DATES[0], indent=1))
    assert len(load_pairs(str(tmp_path / "one.json"), None, "train")) == 1


def test_a_parquet_file_with_brackets(tmp_path):
    path = str(tmp_path / "run[beta=0.1].parquet")
    datasets.Dataset.from_list(DATES).to_parquet(path)
    assert load_pairs(path, None, "train").to_list() == DATES


def test_times_in_a_table_are_named():
    rows = [{**row, "chosen": [{**say(""), "content": datetime.datetime(2000, 1, 1)}]} for row in tiny_chat_rows(1)]
    with pytest.raises(TypeError, match="row 0: chosen: message 0: content is datetime, expected text"):
        prepare_dataset(datasets.Dataset.from_list(rows), TOKENIZER, Truncation())


PROGRAM = """
import datasets, sys
from tiny import tiny_tokenizer
import dpo_fast, dpo_fast.training.data as data
dpo_fast.__version__ = sys.argv[1]
rows = datasets.load_from_disk("rows")
found = data.prepare_dataset(rows, tiny_tokenizer(), data.Truncation())
print(len(found.cache_files) and found.cache_files[0]["filename"])
"""


def test_a_cache_is_that_of_the_version(tmp_path):
    datasets.Dataset.from_list(DATES).save_to_disk(tmp_path / "rows")
    (tmp_path / "run.py").write_text(PROGRAM)
    names = []
    for version in ("1", "1", "2"):
        done = subprocess.run([sys.executable, "run.py", version], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        names.append(done.stdout.strip())
    assert names[0] == names[1] != names[2]
