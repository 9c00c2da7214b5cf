"""Charts drawn as HTML and inline SVG, each with its values in words for who does not see it. No dependencies."""

import html
import math

from .charts import COLOURS, BarChart, CurveChart, Histogram, Scatter, finite, format_share

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360, 210, 44, 12, 12, 34
_BINS, _DOTS = 24, 300


def bars_html(chart: BarChart) -> str:
    """The chart as HTML that `page` has the style for."""
    parts = [f'<figure class="bars"><figcaption>{html.escape(chart.title)}</figcaption>']
    for heading, bars in chart.groups.items():
        parts.append(f'<div class="group"><h3>{html.escape(heading)}</h3>')
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
    curves = [(curve, finite(curve.points)) for curve in chart.curves]
    curves = [(curve, points) for curve, points in curves if points]
    if not curves:
        return _no_points(chart.title)
    frame = _Frame([point for _, points in curves for point in points])
    svg = frame.axes(chart.x_label)
    for curve, points in curves:
        variable, _, dashes = COLOURS[curve.role]
        if len(points) == 1:
            x, y = frame.at(*points[0])
            svg.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="var({variable})"/>')
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.at(*point) for point in points))
            svg.append(
                f'<polyline points="{path}" style="stroke:var({variable});stroke-dasharray:{dashes or "none"}"/>'
            )
    said = "; ".join(f"{curve.label} {_first_to_last(points, chart.x_label)}" for curve, points in curves)
    legend = {curve.label: curve.role for curve, _ in curves}
    return _figure(chart.title, said, svg, legend if len(legend) > 1 else {})


def histogram_html(chart: Histogram) -> str:
    """The chart as inline SVG: an outline per label, with a legend."""
    values = {label: [v for v in numbers if math.isfinite(v)] for label, numbers in chart.values.items()}
    values = {label: numbers for label, numbers in values.items() if numbers}
    if not values:
        return _no_points(chart.title)
    everything = [v for numbers in values.values() for v in numbers]
    marks = ticks(min(everything), max(everything))
    low, high = marks[0], marks[-1]
    counts = {label: [0] * _BINS for label in values}
    for label, numbers in values.items():
        for value in numbers:
            counts[label][min(int(_BINS * (value - low) / (high - low)), _BINS - 1)] += 1
    most = max(max(row) for row in counts.values())
    frame = _Frame([(low, 0), (high, most)])
    svg = frame.axes(chart.x_label)
    for label, row in counts.items():
        variable, _, dashes = COLOURS[chart.roles[label]]
        corners = [frame.at(low, 0)]
        for index, count in enumerate(row):
            left, right = (low + (high - low) * edge / _BINS for edge in (index, index + 1))
            corners += [frame.at(left, count), frame.at(right, count)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*corners, frame.at(high, 0)])
        style = f"stroke:var({variable});fill:var({variable});fill-opacity:.15;stroke-dasharray:{dashes or 'none'}"
        svg.append(f'<polyline points="{path}" style="{style}"/>')
    said = "; ".join(
        f"{label}: {len(numbers)} values from {_number(min(numbers))} to {_number(max(numbers))}, "
        f"mean {_number(sum(numbers) / len(numbers))}"
        for label, numbers in values.items()
    )
    return _figure(chart.title, said, svg, {label: chart.roles[label] for label in values})


def scatter_html(chart: Scatter) -> str:
    """The chart as inline SVG: circles and crosses, with a legend. Draws some hundred points, evenly taken."""
    points = {label: finite(found) for label, found in chart.points.items()}
    points = {label: found for label, found in points.items() if found}
    if not points:
        return _no_points(chart.title)
    frame = _Frame([point for found in points.values() for point in found])
    svg = frame.axes(chart.x_label)
    for index, (label, found) in enumerate(points.items()):
        variable = COLOURS[chart.roles[label]][0]
        marks = []
        for x, y in (frame.at(*point) for point in found[:: max(1, len(found) // _DOTS)]):
            if index == 0:
                marks.append(f"M{x - 2.5:.1f},{y:.1f}a2.5,2.5 0 1,0 5,0a2.5,2.5 0 1,0 -5,0")
            else:
                marks.append(f"M{x - 3:.1f},{y - 3:.1f}l6,6m0,-6l-6,6")
        svg.append(f'<path class="marks" d="{"".join(marks)}" style="stroke:var({variable})"/>')
    said = "; ".join(
        f"{label}: {len(found)} points, {min(x for x, _ in found):g} to {max(x for x, _ in found):g} "
        f"{chart.x_label}, rewards {_number(min(y for _, y in found))} to {_number(max(y for _, y in found))}"
        for label, found in points.items()
    )
    shapes = dict(zip(points, ("o", "x"), strict=False))
    return _figure(chart.title, said, svg, {label: chart.roles[label] for label in points}, shapes)


def chart_html(chart: CurveChart | Histogram | Scatter) -> str:
    draw = {CurveChart: curves_html, Histogram: histogram_html, Scatter: scatter_html}
    return draw[type(chart)](chart)


class _Frame:
    """Axes around points: where on the drawing a point is."""

    def __init__(self, points: list[tuple[float, float]]):
        xs, ys = zip(*points, strict=True)
        self.y_ticks = ticks(min(ys), max(ys))
        self.x_ticks = [tick for tick in ticks(min(xs), max(xs)) if min(xs) <= tick <= max(xs)]
        self._x = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
        self._y = _scale(self.y_ticks[0], self.y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self._x(x), self._y(y)

    def axes(self, x_label: str) -> list[str]:
        svg = []
        for tick in self.y_ticks:
            y = self._y(tick)
            svg.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            svg.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        for tick in self.x_ticks:
            svg.append(f'<text x="{self._x(tick):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{tick:g}</text>')
        label = html.escape(x_label)
        svg.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">{label}</text>')
        return svg


def _figure(title: str, said: str, svg: list[str], legend: dict[str, str], shapes: dict[str, str] | None = None) -> str:
    """said: the chart in words, for who does not see it. legend: label -> role."""
    keys = "".join(
        f"<span>{_swatch(role, (shapes or {}).get(label))}{html.escape(label)}</span>" for label, role in legend.items()
    )
    legend_html = f'<div class="legend">{keys}</div>' if keys else ""
    label = html.escape(f"{title}. {said}.")
    return (
        f'<figure class="curves"><figcaption>{html.escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(svg)}</svg>'
        f"{legend_html}</figure>"
    )


def _swatch(role: str, shape: str | None) -> str:
    variable, _, dashes = COLOURS[role]
    paths = {None: "M0,5H30", "o": "M12,5a3,3 0 1,0 6,0a3,3 0 1,0 -6,0", "x": "M12,2l6,6m0,-6l-6,6"}
    style = f"stroke:var({variable});stroke-dasharray:{'none' if shape else dashes or 'none'}"
    return (
        f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true"><path d="{paths[shape]}" style="{style}"/></svg>'
    )


def _no_points(title: str) -> str:
    return f'<figure class="curves"><figcaption>{html.escape(title)}</figcaption><p>No points were logged.</p></figure>'


def _first_to_last(points: list[tuple[float, float]], x_label: str) -> str:
    (first_x, first), (last_x, last) = points[0], points[-1]
    if len(points) == 1:
        return f"{_number(first)} at {x_label} {first_x:g}"
    return f"from {_number(first)} at {x_label} {first_x:g} to {_number(last)} at {x_label} {last_x:g}"


def _number(value: float) -> str:
    return f"{value:.4g}"


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
