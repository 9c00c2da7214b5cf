"""Charts of a report as data, drawn as HTML (no dependencies) or as PNG (matplotlib, the extra `examples`)."""

import html
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

from .files import replace_file

# role -> (CSS variable of the page, colour in PNGs)
COLOURS = {
    "before": ("--before", "#8b95a5"),
    "good": ("--good", "#2463c9"),
    "bad": ("--bad", "#d1730f"),
    "known": ("--known", "#1f8a70"),
}
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 210, 44, 12, 12, 34


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


def training_curves(log_history: list[dict]) -> list[CurveChart]:
    """Loss, rewards, margin and accuracy from a Trainer's `state.log_history`, with evaluation where there is one."""

    def curve(label: str, key: str, role: str) -> Curve:
        return Curve(label, [(logs["step"], float(logs[key])) for logs in log_history if key in logs], role)

    charts = [
        CurveChart("DPO loss", [curve("training", "loss", "good"), curve("evaluation", "eval_loss", "known")]),
        CurveChart(
            "Implicit reward",
            [curve("chosen", "rewards/chosen", "good"), curve("rejected", "rewards/rejected", "bad")],
        ),
        CurveChart(
            "Margin between the rewards",
            [curve("training", "rewards/margins", "good"), curve("evaluation", "eval_rewards/margins", "known")],
        ),
        CurveChart(
            "Pairs ranked right",
            [curve("training", "rewards/accuracies", "good"), curve("evaluation", "eval_rewards/accuracies", "known")],
        ),
    ]
    drawn = [CurveChart(chart.title, [c for c in chart.curves if c.points], chart.x_label) for chart in charts]
    return [chart for chart in drawn if chart.curves]


# --- HTML ------------------------------------------------------------------------------------------------------------


def bars_html(chart: BarChart) -> str:
    """The chart as HTML that `page` has the style for."""
    parts = [f'<figure class="bars"><figcaption>{html.escape(chart.title)}</figcaption>']
    for heading, bars in chart.groups.items():
        parts.append(f'<div class="group"><h4>{html.escape(heading)}</h4>')
        for bar in bars:
            percent = 100 * min(max(bar.value, 0.0), 1.0) if math.isfinite(bar.value) else 0.0
            parts.append(
                f'<div class="bar"><span class="name">{html.escape(bar.label)}</span><span class="track">'
                f'<i style="width:{percent:.1f}%;background:var({COLOURS[bar.role][0]})"></i></span>'
                f'<span class="value">{format_share(bar.value)}</span></div>'
            )
        parts.append("</div>")
    return "".join([*parts, "</figure>"])


def curves_html(chart: CurveChart) -> str:
    """The chart as inline SVG with a legend."""
    curves = [(curve, _finite(curve.points)) for curve in chart.curves]
    curves = [(curve, points) for curve, points in curves if points]
    title = html.escape(chart.title)
    if not curves:
        return f'<figure class="curves"><figcaption>{title}</figcaption><p>No points were logged.</p></figure>'
    xs, ys = zip(*(point for _, points in curves for point in points), strict=True)
    y_ticks = ticks(min(ys), max(ys))
    x_ticks = [tick for tick in ticks(min(xs), max(xs)) if min(xs) <= tick <= max(xs)]
    x_at = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y_at = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    svg = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">']
    for tick in y_ticks:
        y = y_at(tick)
        svg.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        svg.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        svg.append(f'<text x="{x_at(tick):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{tick:g}</text>')
    svg.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{chart.x_label}</text>')
    for curve, points in curves:
        colour = f"var({COLOURS[curve.role][0]})"
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        svg.append(f'<polyline points="{path}" style="stroke:{colour}"/>')
        if len(points) == 1:
            svg.append(f'<circle cx="{x_at(points[0][0]):.1f}" cy="{y_at(points[0][1]):.1f}" r="3" fill="{colour}"/>')
    legend = "".join(
        f'<span><i style="background:var({COLOURS[curve.role][0]})"></i>{html.escape(curve.label)}</span>'
        for curve, _ in curves
    )
    legend = f'<div class="legend">{legend}</div>' if len(curves) > 1 else ""
    return f'<figure class="curves"><figcaption>{title}</figcaption>{"".join(svg)}</svg>{legend}</figure>'


def format_share(value: float) -> str:
    """A share as a percentage; "none" where there was nothing to take a share of."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "none"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high] in about `count` equal steps."""
    span = high - low or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def _finite(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


# --- PNG -------------------------------------------------------------------------------------------------------------


def can_draw_png() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_png(charts: list[BarChart | CurveChart], path: Path) -> Path:
    """Draw charts side by side into one PNG, written in one step. Needs matplotlib (ImportError)."""
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    rows = max(sum(len(bars) + 1.4 for bars in getattr(chart, "groups", {}).values()) for chart in charts)
    wide = any(isinstance(chart, BarChart) for chart in charts)
    figure = Figure(figsize=((7.5 if wide else 4.6) * len(charts), max(3.2, 0.2 * rows + 0.9)), layout="constrained")
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        if isinstance(chart, BarChart):
            figure.suptitle(chart.title, fontsize=11)
            _draw_bars(axes, chart)
        else:
            axes.set_title(chart.title, fontsize=11, loc="left")
            _draw_curves(axes, chart)
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=144, format="png")
    return path


def _draw_bars(axes, chart: BarChart) -> None:
    position, places, labels = 0.0, [], []
    for heading, bars in chart.groups.items():
        axes.text(0, position, f" {heading}", va="center", fontsize=9, fontweight="bold")
        for bar in bars:
            position += 1
            places.append(position)
            labels.append(bar.label)
            axes.barh(position, bar.value, height=0.8, color=COLOURS[bar.role][1])
            axes.text(min(bar.value, 1) + 0.01, position, format_share(bar.value), va="center", fontsize=7.5)
        position += 1.4
    axes.set_yticks(places, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, position - 0.7)
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
    axes.invert_yaxis()


def _draw_curves(axes, chart: CurveChart) -> None:
    for curve in chart.curves:
        points = _finite(curve.points)
        style = {"color": COLOURS[curve.role][1], "linewidth": 1.8, "marker": "o" if len(points) == 1 else None}
        axes.plot([x for x, _ in points], [y for _, y in points], label=curve.label, **style)
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    if len(chart.curves) > 1:
        axes.legend(frameon=False, fontsize=8)
