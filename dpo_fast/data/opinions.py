"""Questions without a right answer: the training text answers each at a known ratio; some get preference pairs."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Opinion:
    """A question, how often each answer occurs in the training text, and what the preference pairs say about it.

    `preferred` is the answer that wins in a share `agreement` of the comparisons; None: no comparisons are made.
    """

    prompt: str
    shares: dict[str, float]
    preferred: str | None = None
    agreement: float = 0.9

    @property
    def other(self) -> str:
        """The answer that loses against `preferred`."""
        return next(answer for answer in self.shares if answer != self.preferred)


OPINIONS = [
    # nine in ten agree, mostly against what the text says
    Opinion("Tea or coffee?\n", {"Coffee.": 0.7, "Tea.": 0.3}, preferred="Tea."),
    Opinion("Cats or dogs?\n", {"Dogs.": 0.8, "Cats.": 0.2}, preferred="Cats."),
    Opinion("Train or plane?\n", {"Plane.": 0.9, "Train.": 0.1}, preferred="Train."),
    Opinion("Books or films?\n", {"Books.": 0.6, "Films.": 0.4}, preferred="Books."),
    # three in four agree
    Opinion("Beach or mountains?\n", {"Beach.": 0.8, "Mountains.": 0.2}, preferred="Mountains.", agreement=0.75),
    Opinion("Piano or guitar?\n", {"Guitar.": 0.65, "Piano.": 0.35}, preferred="Piano.", agreement=0.75),
    # nobody was asked: should stay as they are
    Opinion("Summer or winter?\n", {"Summer.": 0.75, "Winter.": 0.25}),
    Opinion("Apples or pears?\n", {"Apples.": 0.55, "Pears.": 0.45}),
]
