"""Groups of members that compute the same thing: checked, measured in turns, and replayed for pytest-benchmark."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from .measure import interleaved, peak_mib

CUDA = torch.cuda.is_available()
OURS = ("ours", "dpo_fast", "FastDPOTrainer")  # how names of members begin that must be right


class Clock:
    """Tells the seconds that replayed rounds took: what pytest-benchmark reads before and after each of them."""

    seconds = 0.0


def clock() -> float:
    return Clock.seconds


class Measured(NamedTuple):
    times_ms: list[float]
    extra: dict  # what is reported beside the times, peak_mib above all


class Left(NamedTuple):
    """A member without a speed: what it gave was wrong, or it cannot run here."""

    reason: str
    wrong: bool


def take_turns(
    members: Mapping[str, Callable[[], object] | ImportError],
    check: Callable[[str, object], None],
    rounds: int,
) -> dict[str, Measured | Left]:
    """Check each member's result, then time all that are right, in turns.

    members: what to run, or why it cannot be. check: of a member's name and result; AssertionError where it is wrong.
    """
    found: dict[str, Measured | Left] = {}
    right, peaks = {}, {}
    for name, run in members.items():
        if isinstance(run, ImportError):
            found[name] = Left(str(run), wrong=False)
            continue
        try:
            check(name, run())
        except (AssertionError, RuntimeError, ValueError) as reason:
            first = (str(reason).splitlines() or [""])[0]
            found[name] = Left(f"{type(reason).__name__}: {first[:200]}", not isinstance(reason, NotImplementedError))
            continue
        right[name], peaks[name] = run, peak_mib(run)
    for name, timing in interleaved(right, rounds).items():
        extra = {"peak_mib": peaks[name], "wall_ms": timing.summary()["wall_median_ms"]}
        found[name] = Measured(timing.processor_ms or timing.wall_ms, extra)
    return found


def optional(members: Iterable[tuple[str, Callable[[], Callable]]]) -> dict[str, Callable | ImportError]:
    """Members that import another package: (name, a function that imports it and returns what to run)."""
    found = {}
    for name, load in members:
        try:
            found[name] = load()
        except (ImportError, AttributeError) as reason:  # not installed, or a version without the function
            found[name] = ImportError(str(reason))
    return found
