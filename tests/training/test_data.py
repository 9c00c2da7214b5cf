"""From rows to token ids: where a completion starts and ends, what is cut, what is dropped, and what is said."""

import logging

import pytest
from tiny import tiny_chat_rows, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")

import datasets

from dpo_fast.batch import TokenPair
from dpo_fast.training.data import PairCollator, Truncation, format_example, prepare_dataset
from dpo_fast.training.rows import common_prefix, read_row, tokenize_pair

TOKENIZER = tiny_tokenizer()
BOS, EOS = 1, 2
NO_LIMIT = Truncation()


def prepare(rows, tokenizer=TOKENIZER, truncation=NO_LIMIT, **options):
    return prepare_dataset(rows, tokenizer, truncation, **options)


def ids(text):
    return TOKENIZER(text)["input_ids"]


# --- rows ---------------------------------------------------------------------------------------------------------


def test_text_rows():
    row = tiny_rows(1)[0]
    (found,) = prepare([row])
    assert found["prompt_ids"] == ids(row["prompt"])
    assert found["prompt_ids"] + found["chosen_ids"] == [*ids(row["prompt"] + row["chosen"]), EOS]
    assert found["prompt_ids"] + found["rejected_ids"] == [*ids(row["prompt"] + row["rejected"]), EOS]
    assert set(found) == {"prompt_ids", "chosen_ids", "rejected_ids", "length"}


def test_tokens_that_merge_across_the_boundary():
    """For "the c" + "at": the text "the cat" has no token boundary where the prompt ends."""
    prompt, chosen, rejected, cut = tokenize_pair("the c", "at", "ot", TOKENIZER)
    assert ids("the cat")[:1] == ids("the")
    assert prompt == ids("the c")[: len(prompt)] and cut == len(ids("the c")) - len(prompt) > 0
    assert prompt + chosen == [*ids("the cat"), EOS] and prompt + rejected == [*ids("the cot"), EOS]


@pytest.mark.parametrize("ending", ["", "</s>", "</s></s>"])
def test_eos_once(ending):
    _, chosen, _, _ = tokenize_pair("the cat", " sees" + ending, " eats", TOKENIZER)
    assert chosen.count(EOS) == 1 and chosen[-1] == EOS


@pytest.mark.parametrize("start", ["", "<s>"])
def test_bos_once(start):
    prompt, chosen, _, _ = tokenize_pair(start + "the cat", " sees", " eats", tiny_tokenizer(bos=True))
    assert prompt.count(BOS) == 1 and prompt[0] == BOS and BOS not in chosen


def test_chat_rows_follow_the_template():
    row = tiny_chat_rows(1)[0]
    (found,) = prepare([row])
    question, answer = row["prompt"][0]["content"], row["chosen"][0]["content"]
    assert TOKENIZER.decode(found["prompt_ids"]) == f"<|user|>{question}</s><|assistant|>"
    assert TOKENIZER.decode(found["chosen_ids"]) == f"{answer}</s>"


def test_template_options_of_a_row():
    tokenizer = tiny_tokenizer(chat_template="{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    row = {**tiny_chat_rows(1)[0], "chat_template_kwargs": {"mood": "happy"}}
    assert tokenizer.decode(prepare([row], tokenizer)[0]["prompt_ids"]).startswith("happy")


def test_the_prompt_is_implied_by_the_common_beginning():
    assert read_row({"chosen": "a b c", "rejected": "a b d"}) == ("a b ", "c", "d")
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "y"), ("assistant", "n")))
    assert read_row({"chosen": [user, good], "rejected": [user, bad]}) == ([user], [good], [bad])
    explicit = tiny_rows(4)
    implied = [{name: row["prompt"] + row[name] for name in ("chosen", "rejected")} for row in explicit]
    for a, b in zip(prepare(explicit), prepare(implied), strict=True):
        assert a["prompt_ids"] + a["chosen_ids"] == b["prompt_ids"] + b["chosen_ids"]
        assert a["prompt_ids"] == b["prompt_ids"][: len(a["prompt_ids"])]


def test_messages_lose_the_none_of_columnar_storage():
    rows = datasets.Dataset.from_list(
        [{"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b", "name": None}],
          "rejected": [{"role": "assistant", "content": "c", "name": "x"}]}]
    )  # fmt: skip
    assert read_row(rows[0])[1] == [{"role": "assistant", "content": "b"}]


def test_a_text_prompt_before_messages_is_the_users():
    row = tiny_chat_rows(1)[0]
    assert read_row({**row, "prompt": row["prompt"][0]["content"]}) == read_row(row)


@pytest.mark.parametrize("wrong", [{"prompt": []}, {"prompt": None, "chosen": []}, {"rejected": []}])
def test_mixed_types_are_named_with_their_row(wrong):
    with pytest.raises(TypeError, match="row 7: expected all columns as text or all as lists .*is list"):
        read_row({"prompt": "a", "chosen": "b", "rejected": "c", **wrong}, 7)


def test_common_prefix():
    assert common_prefix([1, 2, 3], [1, 2, 4], [1, 2]) == 2
    assert common_prefix([], [1]) == 0 and common_prefix("abc", "abc") == 3


# --- truncation ---------------------------------------------------------------------------------------------------

ROW = {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6, 7], "rejected_ids": [8]}


@pytest.mark.parametrize(
    "limits, expected",
    [
        ({}, ([1, 2, 3, 4], [5, 6, 7], [1, 2, 3, 4], [8])),
        (dict(max_prompt_length=2), ([3, 4], [5, 6, 7], [3, 4], [8])),
        (dict(max_completion_length=2), ([1, 2, 3, 4], [5, 6], [1, 2, 3, 4], [8])),
        (dict(max_length=6), ([1, 2, 3, 4], [5, 6], [1, 2, 3, 4], [8])),
        (dict(max_length=3), ([1, 2, 3], [], [1, 2, 3], [])),
        (dict(max_length=5, mode="keep_end"), ([3, 4], [5, 6, 7], [1, 2, 3, 4], [8])),
        (dict(max_length=2, mode="keep_end"), ([], [6, 7], [4], [8])),
        (dict(max_length=4, max_prompt_length=2, max_completion_length=2), ([3, 4], [5, 6], [3, 4], [8])),
    ],
)
def test_truncation(limits, expected):
    assert Truncation(**limits)(ROW) == TokenPair(*expected)


def test_bad_limits():
    with pytest.raises(ValueError, match="max_prompt_length must be at least 1, or None for no limit, got 0"):
        Truncation(max_prompt_length=0)
    with pytest.raises(ValueError, match="truncation_mode must be one of keep_start, keep_end, got 'middle'"):
        Truncation(mode="middle")


# --- datasets -----------------------------------------------------------------------------------------------------


def test_unusable_pairs_are_dropped_and_counted_in_one_line(caplog):
    good = {"prompt": "the cat", "chosen": " sees", "rejected": " eats"}
    rows = [
        good,
        {**good, "rejected": " sees"},
        {**good, "chosen": ""},
        {**good, "prompt": "the cat " * 20},
        {**good, "chosen": " sees a dog", "rejected": " sees a bird"},
        good,
    ]
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        found = prepare(rows, truncation=Truncation(max_length=4), name="my")
    assert len(found) == 2
    (line,) = [message for message in caplog.messages if "dropped" in message]
    assert line.startswith("my dataset: 4 of 6 pairs dropped: ")
    for reason in ("1 equal completions", "1 empty completion", "1 no completion token left", "1 equal after trunc"):
        assert reason in line


def test_one_token_without_a_prompt_cannot_be_scored():
    rows = [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8, 9]}]
    assert len(prepare(rows, truncation=Truncation(2, mode="keep_end"))) == 1
    with pytest.raises(ValueError, match="1 no completion token left after truncation"):
        prepare(rows, truncation=Truncation(1, mode="keep_end"))


def test_a_cut_inside_a_word_is_not_worth_a_line(caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        (first, *_) = prepare([{"prompt": "the c", "chosen": "at", "rejected": "ot"}, *tiny_rows(2)])
    assert caplog.messages == []
    assert first["prompt_ids"] == ids("the")[: len(first["prompt_ids"])]


def test_token_ids_stay_as_they_are():
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "other": "x"}]
    found = prepare(rows)
    assert found.to_list() == [{"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9], "length": 5}]
    assert prepare(found).to_list() == found.to_list()


def test_kinds_of_datasets_agree(caplog):
    rows = [*tiny_rows(4), {"prompt": "a", "chosen": "b", "rejected": "b"}]
    table = datasets.Dataset.from_list(rows)
    expected = prepare(rows).to_list()
    assert prepare(table).to_list() == expected
    assert prepare(table.with_format("torch")).to_list() == expected
    stream = prepare(table.to_iterable_dataset())
    assert isinstance(stream, datasets.IterableDataset)
    caplog.clear()
    assert list(stream) == expected and list(prepare(stream)) == expected
    assert any("dropping pairs of the stream: equal completions" in message for message in caplog.messages)

    def generate():
        yield from rows

    assert list(prepare(datasets.IterableDataset.from_generator(generate))) == expected


def test_bad_datasets():
    with pytest.raises(ValueError, match="train dataset is empty: expected rows with columns prompt, chosen, rejected"):
        prepare([])
    with pytest.raises(ValueError, match="eval dataset is empty"):
        prepare(datasets.Dataset.from_list(tiny_rows(2)).select([]), name="eval")
    with pytest.raises(ValueError, match="has the columns answer, prompt; expected prompt, chosen, rejected"):
        prepare([{"prompt": "a", "answer": "b"}])
    with pytest.raises(ValueError, match="none of the 1 pairs can be trained on: 1 equal completions"):
        prepare([{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(ValueError, match="column 'images': only text"):
        prepare([{**tiny_rows(1)[0], "images": "x"}])
    with pytest.raises(TypeError, match=r"has splits \(train\); pass one of them"):
        prepare(datasets.DatasetDict(train=datasets.Dataset.from_list(tiny_rows(1))))
    with pytest.raises(TypeError, match="must be a datasets.Dataset, an IterableDataset or a sequence .* got int"):
        prepare(3)


def test_a_tokenizer_without_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="has no EOS token"):
        prepare(tiny_rows(1), tokenizer)
    assert len(prepare([{"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}], tokenizer)) == 1


def test_collator_truncates():
    batch = PairCollator(0, Truncation(max_length=5), pad_to_multiple_of=8)([ROW, ROW])
    assert batch.input_ids.shape == (4, 8) and batch.lengths.tolist() == [1, 1, 1, 1]


def test_example_shows_what_is_scored():
    pair = NO_LIMIT(prepare([{"prompt": "the cat", "chosen": " sees", "rejected": " eats"}])[0])
    plain = format_example(pair, TOKENIZER)
    assert "the cat>> sees</s><<" in plain and "the cat>> eats</s><<" in plain and "\033" not in plain
    assert "\033" in format_example(pair, TOKENIZER, colour=True)
