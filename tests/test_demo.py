"""The demo: its data, what it measures, and the whole story at a size of seconds."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")

import dpo_fast.data
from dpo_fast.cli import main
from dpo_fast.data import facts, make_pairs
from dpo_fast.data.opinions import OPINIONS
from dpo_fast.demo import console, corpus, language_model, measure, pages, story

DATA = Path(dpo_fast.data.__file__).parent
QUESTION = facts.Question("capital", "capital of France", "What is the capital of France?\n", "Paris", "It is Paris.")
TINY = story.Settings(
    fact_documents=96,
    opinion_documents=20,
    epochs=1,
    batch_size=16,
    size=language_model.ModelSize(hidden=32, layers=1, heads=2, intermediate=32),
    opinions=story.PreferenceRun(beta=0.5, steps=2, pairs_per_step=4, learning_rate=0.1),
    format=story.PreferenceRun(beta=0.5, steps=2, pairs_per_step=4, learning_rate=0.1),
    samples=2,
    held_out=4,
)


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


# --- data ------------------------------------------------------------------------------------------------------------


def test_the_script_writes_the_packaged_files_byte_for_byte(tmp_path):
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "dpo_fast.data.make_pairs", str(tmp_path)]
    subprocess.run(command, check=True, env=environment, cwd=DATA.parents[1])
    assert {path.name for path in DATA.glob("*.jsonl")} == set(os.listdir(tmp_path)) == set(make_pairs.tables())
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (DATA / path.name).read_bytes(), path.name


def test_pairs_differ_in_form_and_both_are_right():
    pairs = rows("format_pairs.jsonl")
    assert len(pairs) >= 500 and len({pair["prompt"] for pair in pairs}) == len(pairs)
    for pair in pairs + rows("format_heldout.jsonl"):
        assert json.loads(pair["chosen"]) == {"topic": pair["topic"], "answer": pair["answer"]}
        assert pair["answer"] in pair["rejected"] and measure.parse_answer(pair["rejected"]) is None


def test_held_out_facts_are_in_no_training_pair():
    entity = {q.prompt: q.entity for part in (facts.known_facts(), facts.comparisons()) for side in part for q in side}
    trained = {entity[row["prompt"]] for row in rows("format_pairs.jsonl")}
    held_out = {entity[row["prompt"]] for row in rows("format_heldout.jsonl")}
    assert len(trained) > 300 and len(held_out) > 60 and not trained & held_out
    measured = {entity[question.prompt] for question in make_pairs.held_out_questions()}  # what the demo asks
    assert measured == held_out


def test_held_out_comparisons_are_in_no_training_text():
    read = {document.prompt for document in corpus.make_corpus(20_000, 1, seed=0)}
    held_out = {row["prompt"] for row in rows("format_heldout.jsonl") if row["topic"] == "number"}
    assert len(held_out) > 20 and not read & held_out


def test_comparisons_have_the_right_answer():
    for question in facts.comparisons()[1][:400]:
        left, right = (int(word.strip("?,\n")) for word in question.prompt.split() if word.strip("?,\n").isdigit())
        right_answer = max(left, right) if "larger" in question.prompt else min(left, right)
        assert question.answer == str(right_answer) and question.answer in question.sentence


def test_opinions_are_compared_as_often_as_they_say():
    pairs = rows("opinion_pairs.jsonl")
    for opinion in OPINIONS:
        chosen = [pair["chosen"] for pair in pairs if pair["prompt"] == opinion.prompt]
        if opinion.preferred is None:
            assert chosen == []
        else:
            assert chosen.count(opinion.preferred) / len(chosen) == pytest.approx(opinion.agreement)


def test_the_corpus_has_the_known_ratios():
    documents = corpus.make_corpus(2_000, 100, seed=0)
    for opinion in OPINIONS:
        assert corpus.answer_shares(documents, opinion.prompt) == pytest.approx(opinion.shares)
    assert sum(corpus.style_shares(documents).values()) == pytest.approx(1)
    assert corpus.style_shares(documents)["json"] == pytest.approx(facts.STYLES["json"], abs=0.03)


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_and_tokenizer():
    documents = corpus.make_corpus(200, 5, seed=0)
    tokenizer = corpus.train_tokenizer(documents)
    torch.manual_seed(0)
    return language_model.new_model(tokenizer, TINY.size).eval(), tokenizer


def test_the_prompt_ends_where_the_completion_begins(model_and_tokenizer):
    _, tokenizer = model_and_tokenizer
    for row in rows("format_pairs.jsonl")[:50]:
        apart = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["chosen"], add_special_tokens=False)["input_ids"]
        assert tokenizer(row["prompt"] + row["chosen"])["input_ids"] == apart
        assert tokenizer.decode(apart, skip_special_tokens=True) == row["prompt"] + row["chosen"]


def test_answer_probabilities_are_products_over_tokens(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts, completions = ["Tea or coffee?\n", QUESTION.prompt], ["Tea.", "The capital of France is Paris."]
    found = measure.answer_probabilities(model, tokenizer, prompts, completions)
    for prompt, completion, probability in zip(prompts, completions, found, strict=True):
        head = tokenizer(prompt)["input_ids"]
        tail = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logps = model(torch.tensor([head + tail])).logits.double().log_softmax(-1)[0]
        expected = sum(logps[len(head) + index - 1, token].item() for index, token in enumerate(tail))
        assert math.log(probability) == pytest.approx(expected, abs=1e-4)


def test_generate_is_greedy_or_seeded_and_padding_does_not_matter(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompts = ["Tea or coffee?\n", QUESTION.prompt]
    together = measure.generate(model, tokenizer, prompts, max_new_tokens=5)
    assert together == [measure.generate(model, tokenizer, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    first, again = (measure.generate(model, tokenizer, prompts, samples=3, max_new_tokens=5, seed=1) for _ in range(2))
    assert first == again and [len(texts) for texts in first] == [3, 3]


@pytest.mark.parametrize(
    "text, parses",
    [
        ('{"topic": "capital", "answer": "Paris"}', True),
        ('{"topic": "capital", "answer": "Paris"} ', True),
        ('{"answer": "Paris", "topic": "capital"}', False),
        ('{"topic": "capital", "answer": 3}', False),
        ('{"topic": "capital"}', False),
        ('{"topic": "capital", "answer": "Paris", "more": "x"}', False),
        ('It is {"topic": "capital", "answer": "Paris"}', False),
        ('{"topic": "capital", "answer": "Paris"', False),
        ('["topic", "answer"]', False),
        ("Paris.", False),
        ("", False),
    ],
)
def test_parse_answer_is_strict(text, parses):
    assert (measure.parse_answer(text) is not None) == parses


def test_answers_question():
    assert measure.answers_question('{"topic": "capital", "answer": "Paris"}', QUESTION)
    assert measure.answers_question("I think it is Paris.", QUESTION)
    assert not measure.answers_question('{"topic": "colour", "answer": "Paris"}', QUESTION)
    assert not measure.answers_question("Paris. Rome.", QUESTION)


def test_predicted_share_minimises_the_dpo_loss():
    before, other, agreement, beta = 0.2, 0.7, 0.75, 0.5
    share = story.predicted_share(before, other, agreement, beta)
    log_ratio = torch.tensor(math.log(share / (1 - share)) - math.log(before / other), requires_grad=True)
    logsigmoid = torch.nn.functional.logsigmoid
    (-agreement * logsigmoid(beta * log_ratio) - (1 - agreement) * logsigmoid(-beta * log_ratio)).backward()
    assert abs(log_ratio.grad.item()) < 1e-6


# --- the story -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("story")


@pytest.fixture(scope="module")
def small_run(story_folder):
    return story.run(story_folder, TINY)


def test_the_whole_story_in_small(small_run, story_folder):
    results = small_run
    paths = pages.write(results, story_folder)
    assert json.loads((story_folder / "results.json").read_text()) == json.loads(json.dumps(results))
    folders = {"base", "opinions", "aligned"}
    files = {"results.json", "format_pairs.jsonl", "format_heldout.jsonl", "opinion_pairs.jsonl"}
    assert set(os.listdir(story_folder)) == folders | files | {path.name for path in paths}
    assert all((story_folder / name / "model.safetensors").is_file() for name in folders)
    for log in (results["opinions"]["log"], results["format"]["log"]):
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    page = (story_folder / "report.html").read_text()
    for claim in results["claims"]:
        assert claim["measured"] in page
    assert "before DPO" in pages.summary(results)


@pytest.mark.parametrize("shown", [True, False])
def test_the_demo_fails_when_an_effect_did_not_come_about(shown, small_run, tmp_path, capsys, monkeypatch):
    claims = [{"claim": "the format spreads", "measured": "0.1 to 0.2", "holds": shown}]
    monkeypatch.setattr(story, "run", lambda out, settings: {**small_run, "claims": claims})
    monkeypatch.setattr(console, "quiet_libraries", lambda: None)  # it would quieten the other tests, too
    for name in ("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    assert main(["demo", "--out", str(tmp_path)]) == (0 if shown else 1)
    output = capsys.readouterr()
    assert ("this run did not show: the format spreads (measured 0.1 to 0.2)" in output.err) == (not shown)
    assert str(tmp_path / "report.html") in output.out and (tmp_path / "report.html").is_file()
