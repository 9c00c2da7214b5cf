"""What the demo claims, measured: probabilities of given answers, and a strict look at what the model generates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import dpo_fast
from dpo_fast.data.facts import Question

KEYS = ["topic", "answer"]


@torch.no_grad()
def answer_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    completions: Sequence[str],
    batch_size: int = 256,
) -> list[float]:
    """p(completion, then EOS | prompt) for each pair of texts, exactly: the product over its tokens."""
    probabilities = []
    for start in range(0, len(prompts), batch_size):
        heads = tokenizer(list(prompts[start : start + batch_size]))["input_ids"]
        tails = tokenizer(list(completions[start : start + batch_size]), add_special_tokens=False)["input_ids"]
        rows = [torch.tensor(head + tail + [tokenizer.eos_token_id]) for head, tail in zip(heads, tails, strict=True)]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
        labels = torch.full_like(input_ids, -100)
        for row, (ids, head) in enumerate(zip(rows, heads, strict=True)):
            labels[row, len(head) : len(ids)] = ids[len(head) :]
        logits = model(input_ids=input_ids.to(model.device)).logits  # right padding: causal rows never see it
        logps = dpo_fast.logits_token_logps(logits[:, :-1], labels[:, 1:].to(model.device))
        probabilities += logps.double().sum(1).exp().tolist()
    return probabilities


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    samples: int = 0,
    max_new_tokens: int = 40,
    seed: int = 0,
    batch_size: int = 512,
) -> list[list[str]]:
    """Texts for each prompt: the greedy one, or `samples` drawn at temperature 1 from the whole vocabulary."""
    choice = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0} if samples else {"do_sample": False}
    repeated = [prompt for prompt in prompts for _ in range(max(samples, 1))]
    texts = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(repeated), batch_size):
            batch = tokenizer(
                repeated[start : start + batch_size], padding=True, padding_side="left", return_tensors="pt"
            ).to(model.device)
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **choice,
            )
            new_tokens = output[:, batch["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    width = max(samples, 1)
    return [texts[start : start + width] for start in range(0, len(texts), width)]


def parse_answer(text: str) -> dict[str, str] | None:
    """The object that `text` is, if it is exactly one JSON object with the string fields of `KEYS`; else None."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return None
    fits = isinstance(value, dict) and list(value) == KEYS and all(isinstance(field, str) for field in value.values())
    return value if fits else None


def answers_question(text: str, question: Question) -> bool:
    """Whether `text` is the right answer, in any of the wordings that the training text knows."""
    parsed = parse_answer(text)
    if parsed is not None:
        return parsed == {"topic": question.topic, "answer": question.answer}
    return text in {question.completion(style) for style in ("sentence", "short", "hedged")}


@dataclass(frozen=True)
class FormatScores:
    """Shares over all held-out questions. `sampled` is the probability of the format under the model, estimated."""

    greedy: float  # greedy generations that parse as the required JSON
    sampled: float  # samples at temperature 1 that parse
    right_greedy: float  # greedy generations with the right answer, whatever the wording
    right_sampled: float
    right_if_json: float  # samples that parse whose fields are right, among the samples that parse; nan without any
    exact: float  # mean probability of the exact right JSON answer


def format_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    *,
    samples: int,
    seed: int,
) -> tuple[FormatScores, list[str]]:
    """Generate for every question and parse; returns the scores and the greedy texts."""
    prompts = [question.prompt for question in questions]
    greedy = [texts[0] for texts in generate(model, tokenizer, prompts)]
    sampled = generate(model, tokenizer, prompts, samples=samples, seed=seed)
    drawn = [(question, text) for question, texts in zip(questions, sampled, strict=True) for text in texts]
    parsed = [(question, text) for question, text in drawn if parse_answer(text) is not None]
    exact = answer_probabilities(model, tokenizer, prompts, [question.completion("json") for question in questions])
    scores = FormatScores(
        greedy=share(parse_answer(text) is not None for text in greedy),
        sampled=len(parsed) / len(drawn),
        right_greedy=share(answers_question(text, q) for q, text in zip(questions, greedy, strict=True)),
        right_sampled=share(answers_question(text, question) for question, text in drawn),
        right_if_json=share(answers_question(text, question) for question, text in parsed),
        exact=sum(exact) / len(exact),
    )
    return scores, greedy


def share(flags) -> float:
    """Share of true values; nan when there are none to judge."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else float("nan")
