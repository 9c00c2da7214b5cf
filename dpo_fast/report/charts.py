"""Charts of a report as data. `svg` draws them for a page, `png` as files."""

import math
from dataclasses import dataclass

# role -> (CSS variable of the page, colour in PNGs, dashes of a line in px). Colours after Okabe and Ito, "Color
# universal design": told apart with any colour vision; who sees none has the dashes
COLOURS = {
    "before": ("--before", "#7d8797", ""),
    "good": ("--good", "#2463c9", ""),
    "bad": ("--bad", "#c9660a", "7 4"),
    "known": ("--known", "#1f8a70", "2 4"),
}
_DASHES = ("", "8 4", "2 4", "12 4 2 4", "16 6", "5 3 1 3")
_RUNS = ("#0072b2", "#c9560a", "#00795a", "#a8407f", "#4a4a4a", "#806600")
# of runs side by side; past six the same colours come with other dashes
RUN_ROLES = tuple(f"run{index}" for index in range(36))
for _index, _role in enumerate(RUN_ROLES):
    _colour = _index % len(_RUNS)
    COLOURS[_role] = (f"--run{_colour}", _RUNS[_colour], _DASHES[(_index + _index // len(_RUNS)) % len(_DASHES)])


@dataclass(frozen=True)
class Bar:
    """One bar; `value` is a share in [0, 1]."""

    label: str
    value: float
    role: str


@dataclass(frozen=True)
class BarChart:
    """Groups of horizontal bars on a common scale from 0 to 1."""

    title: str
    groups: dict[str, list[Bar]]  # heading -> bars


@dataclass(frozen=True)
class Curve:
    """A line through (x, y); points that are not finite are left out."""

    label: str
    points: list[tuple[float, float]]
    role: str = "good"


@dataclass(frozen=True)
class CurveChart:
    """Lines over training steps."""

    title: str
    curves: list[Curve]
    x_label: str = "step"


@dataclass(frozen=True)
class Histogram:
    """How often values occur: one outline per label, over common bins."""

    title: str
    values: dict[str, list[float]]  # label -> values
    roles: dict[str, str]
    x_label: str


@dataclass(frozen=True)
class Scatter:
    """Points (x, y) of two kinds: circles and crosses."""

    title: str
    points: dict[str, list[tuple[float, float]]]
    roles: dict[str, str]
    x_label: str


# chart -> its curves: (label, key of the log, role)
_LOGGED = {
    "DPO loss": [("training", "loss", "good"), ("evaluation", "eval_loss", "known")],
    "Implicit reward": [("chosen", "rewards/chosen", "good"), ("rejected", "rewards/rejected", "bad")],
    "Margin between the rewards": [
        ("training", "rewards/margins", "good"), ("evaluation", "eval_rewards/margins", "known"),
    ],
    "Pairs ranked right": [
        ("training", "rewards/accuracies", "good"), ("evaluation", "eval_rewards/accuracies", "known"),
    ],
    "Log-probability of a completion, nats": [
        ("chosen", "logps/chosen", "good"), ("rejected", "logps/rejected", "bad"),
    ],
}  # fmt: skip
TERM = "loss/"  # what the names of the terms of a loss begin with


def logged_points(log_history: list[dict], key: str) -> list[tuple[float, float]]:
    """(x, value) of a key of a Trainer's `state.log_history`; x counts the updates that the weights had had.

    What is logged in training is a mean over the steps since the log before; step k runs with the weights of k - 1
    updates. So a value of steps j + 1 to k stands at (j + k - 1) / 2, and that of step 1 at 0. An evaluation after k
    steps stands at k.
    """
    points, last = [], 0
    for logs in log_history:
        step, of_training = logs.get("step", 0), "loss" in logs
        if key in logs:
            points.append(((last + step - 1) / 2 if of_training and step > last else step, float(logs[key])))
        if of_training:
            last = step
    return points


def training_curves(log_history: list[dict]) -> list[CurveChart]:
    """Loss, its terms, rewards, margin, accuracy and log-probs from a Trainer's `state.log_history`."""
    charts = dict(_LOGGED)
    terms = list(dict.fromkeys(key for logs in log_history for key in logs if key.startswith(TERM)))
    named = [(key.removeprefix(TERM), key, RUN_ROLES[index]) for index, key in enumerate(terms)]
    titles = list(charts)
    if named:
        titles.insert(1, "Terms of the loss, weighted")
        charts[titles[1]] = named
    drawn = []
    for title in titles:
        curves = [Curve(label, logged_points(log_history, key), role) for label, key, role in charts[title]]
        drawn.append(CurveChart(title, [curve for curve in curves if curve.points]))
    return [chart for chart in drawn if chart.curves]


def pair_charts(pairs: dict) -> list[Histogram | Scatter]:
    """Rewards of the pairs of an evaluation: how they are spread, and against the lengths of the completions.

    pairs: lists of equal length, chosen_rewards, rejected_rewards, chosen_tokens, rejected_tokens.
    """
    sides, roles = ("chosen", "rejected"), {"chosen": "good", "rejected": "bad"}
    rewards = {side: pairs[f"{side}_rewards"] for side in sides}
    dots = {side: list(zip(pairs[f"{side}_tokens"], rewards[side], strict=True)) for side in sides}
    return [
        Histogram("How rewards are spread", rewards, roles, "reward"),
        Scatter("Length against reward", dots, roles, "tokens of the completion"),
    ]


def format_share(value: float) -> str:
    """A share as a percentage; "none" where there was nothing to take a share of."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "none"


def finite(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
