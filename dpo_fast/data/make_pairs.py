"""Writes the preference pairs of the package: `python -m dpo_fast.data.make_pairs [FOLDER]`.

- `format_pairs.jsonl`: 640 pairs; JSON is chosen, prose rejected, both right. The demo trains on them.
- `format_heldout.jsonl`: 160 such pairs about facts that no training pair mentions, for evaluation.
- `opinion_pairs.jsonl`: comparisons on questions without a right answer, for step 2 of the demo.

Same bytes on every machine: all choices come from hashes of the text.
"""

import json
import os
import sys
from itertools import zip_longest
from pathlib import Path

from dpo_fast.data.facts import STYLES, Question, comparisons, hash_order, known_facts
from dpo_fast.data.opinions import OPINIONS

FORMAT_PAIRS, HELD_OUT_PAIRS, PAIRS_PER_OPINION = 640, 160, 40
PROSE = [style for style in STYLES if style != "json"]


def take_by_topic(questions: list[Question], count: int, salt: str) -> list[Question]:
    """`count` questions, as even over the topics as their numbers allow, in hashed order."""
    topics: dict[str, list[Question]] = {}
    for question in hash_order(questions, salt):
        topics.setdefault(question.topic, []).append(question)
    rounds = zip_longest(*(topics[topic] for topic in sorted(topics)))
    taken = [question for row in rounds for question in row if question is not None][:count]
    return hash_order(taken, salt)


def format_pairs(questions: list[Question]) -> list[dict[str, str]]:
    """One pair per question; the rejected wording cycles through the kinds of prose."""
    return [
        {
            "prompt": question.prompt,
            "chosen": question.completion("json"),
            "rejected": question.completion(PROSE[index % len(PROSE)]),
            "topic": question.topic,
            "answer": question.answer,
        }
        for index, question in enumerate(questions)
    ]


def opinion_pairs() -> list[dict[str, str]]:
    """`PAIRS_PER_OPINION` comparisons per question; `agreement` of them are won by the preferred answer."""
    rows = []
    for index in range(PAIRS_PER_OPINION):
        for opinion in OPINIONS:
            if opinion.preferred is None:
                continue
            # spread evenly, so that every batch sees about the right share: at 0.75, three wins and a loss in turn
            wins = int((index + 1) * opinion.agreement) > int(index * opinion.agreement)
            chosen, rejected = (opinion.preferred, opinion.other) if wins else (opinion.other, opinion.preferred)
            rows.append({"prompt": opinion.prompt, "chosen": chosen, "rejected": rejected})
    return rows


def held_out_questions() -> list[Question]:
    """The questions behind `format_heldout.jsonl`."""
    return take_by_topic(known_facts()[1] + comparisons()[1], HELD_OUT_PAIRS, "held-out questions")


def tables() -> dict[str, list[dict[str, str]]]:
    """File name -> rows."""
    training = take_by_topic(known_facts()[0] + comparisons()[0], FORMAT_PAIRS, "training pairs")
    return {
        "format_pairs.jsonl": format_pairs(training),
        "format_heldout.jsonl": format_pairs(held_out_questions()),
        "opinion_pairs.jsonl": opinion_pairs(),
    }


def write(folder: Path) -> list[Path]:
    """Write every table into `folder`, each in one step, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, rows in tables().items():
        path = folder / name
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
        paths.append(path)
    return paths


if __name__ == "__main__":
    for written in write(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent):
        print(written)
