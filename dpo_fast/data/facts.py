"""The little world of the demo: questions with one right answer each, and four ways to word an answer.

A question belongs to an `entity` (a country, a word, a thing, a pair of numbers). Entities, not questions, are split
into training and held-out, so no wording of a held-out fact appears in the preference pairs.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Austria": "Vienna", "Hungary": "Budapest", "Poland": "Warsaw", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik", "Ireland": "Dublin",
    "England": "London", "Scotland": "Edinburgh", "Wales": "Cardiff", "Belgium": "Brussels", "Estonia": "Tallinn",
    "Latvia": "Riga", "Lithuania": "Vilnius", "Ukraine": "Kyiv", "Russia": "Moscow", "Turkey": "Ankara",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Senegal": "Dakar", "Morocco": "Rabat",
    "Tunisia": "Tunis", "Ethiopia": "Addis Ababa", "Uganda": "Kampala", "Rwanda": "Kigali", "Angola": "Luanda",
    "India": "New Delhi", "Nepal": "Kathmandu", "China": "Beijing", "Japan": "Tokyo", "Mongolia": "Ulaanbaatar",
    "Thailand": "Bangkok", "Vietnam": "Hanoi", "Cambodia": "Phnom Penh", "Indonesia": "Jakarta",
    "Australia": "Canberra", "Iran": "Tehran", "Iraq": "Baghdad", "Jordan": "Amman", "Lebanon": "Beirut",
    "Qatar": "Doha", "Canada": "Ottawa", "Cuba": "Havana", "Jamaica": "Kingston", "Peru": "Lima", "Chile": "Santiago",
    "Ecuador": "Quito", "Colombia": "Bogota", "Uruguay": "Montevideo", "Venezuela": "Caracas",
    "Argentina": "Buenos Aires",
}  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("old", "new"), ("fast", "slow"), ("high", "low"), ("wet", "dry"),
    ("hard", "soft"), ("light", "dark"), ("early", "late"), ("full", "empty"), ("open", "closed"),
    ("rich", "poor"), ("strong", "weak"), ("happy", "sad"), ("clean", "dirty"), ("loud", "quiet"),
    ("long", "short"), ("thick", "thin"), ("true", "false"), ("near", "far"), ("deep", "shallow"),
    ("sharp", "blunt"), ("sweet", "bitter"), ("brave", "afraid"), ("cheap", "expensive"), ("smooth", "rough"),
    ("narrow", "wide"), ("left", "right"), ("first", "last"), ("up", "down"), ("begin", "end"), ("win", "lose"),
    ("buy", "sell"), ("push", "pull"), ("give", "take"), ("love", "hate"),
]  # fmt: skip

COLOURS = {
    "yellow": ["a banana", "a lemon", "butter", "a canary", "a sunflower", "an egg yolk"],
    "green": ["grass", "a frog", "a cucumber", "spinach", "an emerald", "a cactus", "a pea"],
    "red": ["blood", "a tomato", "a ruby", "a fire engine", "a ladybird", "a strawberry", "a stop sign"],
    "blue": ["the sky", "the sea", "a sapphire", "a cornflower", "a bluebell"],
    "white": ["snow", "milk", "salt", "a swan", "a polar bear", "chalk"],
    "black": ["coal", "a raven", "ink", "a panther", "tar", "a crow"],
    "orange": ["a carrot", "a pumpkin", "a tangerine", "a traffic cone"],
    "brown": ["chocolate", "a walnut", "soil", "a beaver", "a coconut"],
    "grey": ["an elephant", "ash", "a dolphin", "cement"],
    "pink": ["a flamingo", "a piglet", "salmon"],
}

NUMBERS = range(10, 60)

# share of each wording in the language model's training text; "json" is the one that DPO will be asked for
STYLES = {"sentence": 0.44, "short": 0.34, "hedged": 0.10, "json": 0.12}


@dataclass(frozen=True)
class Question:
    """One wording of one question. `entity` identifies the fact behind it."""

    topic: str
    entity: str
    prompt: str  # ends with a newline; the answer follows
    answer: str
    sentence: str

    def completion(self, style: str) -> str:
        """The answer in one of `STYLES`."""
        if style == "json":
            return json.dumps({"topic": self.topic, "answer": self.answer})
        if style == "sentence":
            return self.sentence
        return {"short": f"{self.answer}.", "hedged": f"I think it is {self.answer}."}[style]


def hash_order(items: Iterable, salt: str) -> list:
    """Items in a pseudo-random order that depends on `salt` and their text alone, in every Python version."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{salt}|{item}".encode()).digest())


def _questions(topic: str, entity: str, answer: str, sentence: str, *wordings: str) -> list[Question]:
    return [Question(topic, entity, f"{wording}\n", answer, sentence) for wording in wordings]


def _capitals() -> list[Question]:
    return [
        question
        for country, city in CAPITALS.items()
        for question in _questions(
            "capital", f"capital of {country}", city, f"The capital of {country} is {city}.",
            f"What is the capital of {country}?", f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
        )
    ]  # fmt: skip


def _opposites() -> list[Question]:
    # one entity for both directions: "hot -> cold" in the training pairs would give away "cold -> hot"
    return [
        question
        for left, right in OPPOSITES
        for word, other in ((left, right), (right, left))
        for question in _questions(
            "opposite", f"opposite {left}/{right}", other, f"The opposite of {word} is {other}.",
            f"What is the opposite of {word}?", f"Name the opposite of {word}.",
        )
    ]  # fmt: skip


def _colours() -> list[Question]:
    return [
        question
        for colour, things in COLOURS.items()
        for thing in things
        for question in _questions(
            "colour", f"colour of {thing}", colour, f"The colour of {thing} is {colour}.",
            f"What colour is {thing}?", f"Name the colour of {thing}.",
        )
    ]  # fmt: skip


def _comparisons() -> list[Question]:
    questions = []
    for small, large in combinations(NUMBERS, 2):
        entity = f"{small} and {large}"
        for left, right in ((small, large), (large, small)):
            for word, answer in (("larger", large), ("smaller", small)):
                questions += _questions(
                    "number", entity, str(answer), f"The {word} number is {answer}.",
                    f"Which number is {word}, {left} or {right}?",
                )  # fmt: skip
    return questions


def split_by_entity(questions: list[Question], held_out: float) -> tuple[list[Question], list[Question]]:
    """(training, held-out): a share `held_out` of the entities, with all their questions, goes to the second list."""
    entities = hash_order({question.entity for question in questions}, "held-out")
    chosen = set(entities[: round(len(entities) * held_out)])
    return [q for q in questions if q.entity not in chosen], [q for q in questions if q.entity in chosen]


def known_facts() -> tuple[list[Question], list[Question]]:
    """Capitals, opposites and colours: (training, held-out) entities of the preference pairs.

    The language model reads all of them: nobody can guess a capital. Held out is what DPO never sees.
    """
    training, held_out = [], []
    for family in (_capitals(), _opposites(), _colours()):
        seen, unseen = split_by_entity(family, 0.25)
        training += seen
        held_out += unseen
    return training, held_out


def comparisons() -> tuple[list[Question], list[Question]]:
    """Questions about two numbers; the held-out ones are in no training text at all, neither the LM's nor DPO's."""
    return split_by_entity(_comparisons(), 0.10)
