"""Charts drawn as PNG by matplotlib, the extra `examples`."""

import importlib.util
from pathlib import Path

from .charts import COLOURS, BarChart, CurveChart, finite, format_share
from .files import replace_file


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
        points = finite(curve.points)
        _, colour, dashes = COLOURS[curve.role]
        style = {"color": colour, "linewidth": 1.8, "marker": "o" if len(points) == 1 else None}
        if dashes:
            style["dashes"] = [int(length) / 1.8 for length in dashes.split()]
        axes.plot([x for x, _ in points], [y for _, y in points], label=curve.label, **style)
    axes.set_xlabel(chart.x_label, fontsize=9)
    axes.grid(axis="y", alpha=0.25)
    if len(chart.curves) > 1:
        axes.legend(frameon=False, fontsize=8)
