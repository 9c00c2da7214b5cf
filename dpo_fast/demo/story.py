"""The demo's three steps, each with its numbers, and whether what is claimed about them came true."""

import copy
import dataclasses
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, PrinterCallback

import dpo_fast
from dpo_fast import data as package_data
from dpo_fast.data.facts import Question
from dpo_fast.data.make_pairs import held_out_questions
from dpo_fast.data.opinions import OPINIONS, Opinion
from dpo_fast.report.files import replace_directory, replace_file

from .console import Progress, TrainerProgress
from .corpus import Document, answer_shares, make_corpus, style_shares, train_tokenizer
from .language_model import ModelSize, encode_documents, new_model, train_language_model
from .measure import FormatScores, answer_probabilities, format_scores

DATA = Path(package_data.__file__).parent


@dataclass(frozen=True)
class PreferenceRun:
    """One DPO training of the demo. The optimizer is plain SGD: see `pages.py` for why."""

    beta: float
    steps: int
    pairs_per_step: int
    learning_rate: float


@dataclass(frozen=True)
class Settings:
    """Everything that decides the demo's numbers; the defaults fit three minutes on two CPU cores."""

    fact_documents: int = 16_000
    opinion_documents: int = 300
    epochs: int = 3
    batch_size: int = 32
    learning_rate: float = 4e-3
    size: ModelSize = field(default_factory=ModelSize)
    opinions: PreferenceRun = PreferenceRun(beta=0.5, steps=100, pairs_per_step=48, learning_rate=0.1)
    format: PreferenceRun = PreferenceRun(beta=0.5, steps=100, pairs_per_step=32, learning_rate=0.1)
    samples: int = 8  # per held-out question
    held_out: int = 160  # questions
    seed: int = 0


def run(out: Path, settings: Settings | None = None) -> dict:
    """Train and measure; leaves base/, opinions/, aligned/ (models), the pairs and results.json in `out`.

    Returns the results: plain data, ready for JSON. `claims` in it says what was claimed and whether it holds.
    """
    settings = settings or Settings()
    started, threads = time.perf_counter(), torch.get_num_threads()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # matrices this small gain nothing from a second core, and suffer when it is busy
    try:
        results = _run(out, settings)
    finally:
        torch.set_num_threads(threads)
    results["seconds"] = time.perf_counter() - started
    with replace_file(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _run(out: Path, settings: Settings) -> dict:
    print("1  A language model learns its data", flush=True)
    documents = make_corpus(settings.fact_documents, settings.opinion_documents, settings.seed)
    model, tokenizer, language_model = _language_model(documents, settings)
    _save(model, tokenizer, out / "base")
    for name in ("format_pairs.jsonl", "format_heldout.jsonl", "opinion_pairs.jsonl"):
        with replace_file(out / name) as temporary:
            shutil.copyfile(DATA / name, temporary)

    print("2  DPO moves opinions", flush=True)
    moved, log = _align(model, tokenizer, "opinion_pairs.jsonl", settings.opinions, settings, out)
    opinions = {**dataclasses.asdict(settings.opinions), "log": log, **_opinions(model, moved, tokenizer, settings)}
    _save(moved, tokenizer, out / "opinions")

    print("3  DPO teaches a format", flush=True)
    questions = held_out_questions()[: settings.held_out]
    before, greedy_before = _scores(model, tokenizer, questions, settings)
    aligned, log = _align(
        model, tokenizer, "format_pairs.jsonl", settings.format, settings, out, held_out="format_heldout.jsonl"
    )
    after, greedy_after = _scores(aligned, tokenizer, questions, settings)
    _save(aligned, tokenizer, out / "aligned")
    results = {
        "versions": {
            "dpo_fast": dpo_fast.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "settings": dataclasses.asdict(settings),
        "language_model": language_model,
        "opinions": opinions,
        "format": {
            **dataclasses.asdict(settings.format),
            "log": log,
            "questions": len(questions),
            "before": dataclasses.asdict(before),
            "after": dataclasses.asdict(after),
            "samples": [
                {"prompt": question.prompt.strip(), "topic": question.topic, "before": old, "after": new}
                for question, old, new in zip(questions, greedy_before, greedy_after, strict=True)
            ],
        },
    }  # fmt: skip
    results["claims"] = claims(results)
    return results


def _language_model(documents: list[Document], settings: Settings) -> tuple:
    tokenizer = train_tokenizer(documents)
    rows = encode_documents(documents, tokenizer)
    torch.manual_seed(settings.seed)
    model = new_model(tokenizer, settings.size)
    progress = Progress("next-token training")
    history = train_language_model(
        model,
        rows,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        on_step=lambda step, steps, loss: progress(step, steps, f"loss {loss:.3f}"),
    )
    answers: list[dict[str, Any]] = [
        {"question": opinion.prompt.strip(), "answer": answer, "share": share}
        for opinion in OPINIONS
        for answer, share in answer_shares(documents, opinion.prompt).items()
    ]
    probabilities = answer_probabilities(
        model, tokenizer, [answer["question"] + "\n" for answer in answers], [answer["answer"] for answer in answers]
    )
    answers = [{**answer, "probability": p} for answer, p in zip(answers, probabilities, strict=True)]
    return model, tokenizer, {
        "parameters": model.num_parameters(),
        "documents": len(documents),
        "tokens_read": settings.epochs * sum(len(row) for row in rows),
        "loss": _thin(history),
        "answers": answers,
        "styles": style_shares(documents),
    }  # fmt: skip


def _align(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    pairs: str,
    run: PreferenceRun,
    settings: Settings,
    out: Path,
    held_out: str | None = None,
) -> tuple[PreTrainedModel, list[dict]]:
    """A copy of `base` after DPO on a file of pairs, and the trainer's log."""
    config = dpo_fast.FastDPOConfig(
        output_dir=str(out / "trainer"),
        beta=run.beta,
        max_steps=run.steps,
        per_device_train_batch_size=run.pairs_per_step,
        per_device_eval_batch_size=run.pairs_per_step,
        learning_rate=run.learning_rate,
        lr_scheduler_type="cosine",
        optim="sgd",
        logging_steps=max(1, run.steps // 20),
        logging_first_step=True,
        eval_strategy="steps" if held_out else "no",
        eval_steps=max(1, run.steps // 5),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=settings.seed,
    )
    trainer = dpo_fast.FastDPOTrainer(
        model=copy.deepcopy(base),
        args=config,
        train_dataset=_pairs(pairs),
        eval_dataset=_pairs(held_out) if held_out else None,
        processing_class=tokenizer,
        callbacks=[TrainerProgress(f"DPO on {pairs}")],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    shutil.rmtree(out / "trainer", ignore_errors=True)
    policy: Any = trainer.model
    return policy.eval(), trainer.state.log_history


def _pairs(name: str) -> datasets.Dataset:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return datasets.Dataset.from_list([json.loads(line) for line in lines])


def predicted_share(before: float, other_before: float, agreement: float, beta: float) -> float:
    """The preferred answer's share of both at DPO's optimum, known beforehand.

    The loss of a question whose preferred answer wins a share q of the comparisons is least where
    sigmoid(beta * margin) = q: there the odds of the two answers are the reference's times (q / (1 - q))^(1/beta).
    """
    log_odds = math.log(before / other_before) + math.log(agreement / (1 - agreement)) / beta
    return 1 / (1 + math.exp(-log_odds))


def _opinions(base: PreTrainedModel, moved: PreTrainedModel, tokenizer, settings: Settings) -> dict:
    """Probabilities of both answers to every opinion question, before and after."""

    def probabilities(model, opinion: Opinion) -> list[float]:
        answers = [opinion.preferred or next(iter(opinion.shares))]
        answers += [answer for answer in opinion.shares if answer not in answers]
        return answer_probabilities(model, tokenizer, [opinion.prompt] * 2, answers)

    questions = []
    for opinion in OPINIONS:
        (before, other_before), (after, other_after) = (probabilities(model, opinion) for model in (base, moved))
        first = opinion.preferred or next(iter(opinion.shares))
        questions.append(
            {
                "question": opinion.prompt.strip(),
                "preferred": first,
                "other": next(answer for answer in opinion.shares if answer != first),
                "agreement": opinion.agreement if opinion.preferred else None,
                "before": before,
                "other_before": other_before,
                "after": after,
                "other_after": other_after,
                "share_after": after / (after + other_after),
                "predicted": predicted_share(before, other_before, opinion.agreement, settings.opinions.beta)
                if opinion.preferred
                else None,
            }
        )
    return {"questions": questions}


def _scores(model, tokenizer, questions: list[Question], settings: Settings) -> tuple[FormatScores, list[str]]:
    return format_scores(model, tokenizer, questions, samples=settings.samples, seed=settings.seed)


def claims(results: dict) -> list[dict]:
    """What the demo sets out to show, each with what was measured, and whether it holds."""
    answers = results["language_model"]["answers"]
    error = sum(abs(answer["share"] - answer["probability"]) for answer in answers) / len(answers)
    compared = [question for question in results["opinions"]["questions"] if question["agreement"] is not None]
    asked_nobody = [question for question in results["opinions"]["questions"] if question["agreement"] is None]
    moved = sum(q["after"] > q["before"] and q["other_after"] < q["other_before"] for q in compared)
    distance = sum(abs(q["predicted"] - q["share_after"]) for q in compared) / len(compared)
    drift = max(abs(q["after"] - q["before"]) for q in asked_nobody)
    before, after = results["format"]["before"], results["format"]["after"]

    def claim(text: str, measured: str, holds: bool) -> dict:
        return {"claim": text, "measured": measured, "holds": bool(holds)}

    return [
        claim("answers are as probable as they are frequent, within 0.05 on average", f"{error:.3f}", error <= 0.05),
        claim(
            "DPO raises every preferred answer and lowers every rejected one",
            f"{moved} of {len(compared)}",
            moved == len(compared),
        ),
        claim("their ratio is where theory says, within 0.05 on average", f"{distance:.3f}", distance <= 0.05),
        claim("answers that nobody compared move by less than 0.1", f"{drift:.3f}", drift < 0.1),
        claim(
            "the required format goes from under 0.2 to over 0.9 on held-out questions, sampled",
            f"{before['sampled']:.3f} to {after['sampled']:.3f}",
            before["sampled"] < 0.2 and after["sampled"] > 0.9,
        ),
        claim(
            "and over 0.9 in greedy generations",
            f"{before['greedy']:.3f} to {after['greedy']:.3f}",
            before["greedy"] < 0.2 and after["greedy"] > 0.9,
        ),
        claim(
            "held-out answers stay right: at most 0.15 fewer greedy ones",
            f"{before['right_greedy']:.3f} to {after['right_greedy']:.3f}",
            after["right_greedy"] >= before["right_greedy"] - 0.15,
        ),
    ]


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    with replace_directory(path) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def _thin(history: list[tuple[int, float]], points: int = 100) -> list[tuple[int, float]]:
    """About `points` means of consecutive stretches."""
    width = max(1, len(history) // points)
    stretches = [history[start : start + width] for start in range(0, len(history) - width + 1, width)]
    return [(stretch[-1][0], sum(loss for _, loss in stretch) / len(stretch)) for stretch in stretches]
