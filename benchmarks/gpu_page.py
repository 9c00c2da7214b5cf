"""The results of a GPU as one table and as one HTML page: plots are SVG, nothing is loaded from elsewhere."""

import html
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .gpu_stages import STAGES
from .provenance import benchmark_of

DONE = "done"


def results(folder: Path) -> dict[str, dict]:
    """Stem -> result of a benchmark, of those whose file is there."""
    names = [part.name for stage in STAGES for part in stage.parts]
    order = {name: i for i, name in enumerate(names)}
    paths = sorted(folder.glob("*.json"), key=lambda path: (order.get(path.stem, len(order)), path.stem))
    return {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in paths if p.stem != "gpu"}


# --- what a result comes to ------------------------------------------------------------------------------------------


def _steps(result: dict) -> Iterator[str]:
    for row in result["rows"]:
        if "wall_s" not in row:  # the largest batch
            yield f"{row['provider']} {row['largest_batch']} pairs"
            continue
        shares = row.get("shares") or {}
        profile = "".join(f", {name} {share:.0%}" for name, share in shares.items())
        peak = f"{row['peak_mib'] / 1024:.1f} GiB"
        times = f", {row['times_faster']:.2f} x" if row.get("times_faster") else ""
        yield f"{row['provider']} {row['wall_s']:.3f} s{times}, {row['tokens_per_s']:,.0f} tokens/s, {peak}{profile}"


def _head(result: dict) -> Iterator[str]:
    for row in result["rows"]:
        if "to_floor" in row:
            took = f"{row['wall_median_ms']:.4g} ms ({row['to_floor']:.2f} of the GEMMs)"
            yield f"{row['mode']}, {row['provider']} {took}"


def _attention(result: dict) -> Iterator[str]:
    for row in result["rows"]:
        peak = f"{row['peak_mib']:,.0f} MiB"
        yield f"{row['case']}, {row['implementation']} {row['wall_median_ms']:.4g} ms, {peak}"


def _gemm(result: dict) -> Iterator[str]:
    for row in result["rows"]:
        rate = f"{row['tflops']:.0f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:,.0f} GB/s"
        yield f"{row['role']} {row['rows']} rows, {row['result']} {rate}"


def _level1(result: dict) -> Iterator[str]:
    for row in result["rows"]:
        yield f"{row['case']} {row['gb_per_s']:,.0f} GB/s"


def _sweep(result: dict) -> Iterator[str]:
    yield str(result["entries"])


SAYS: dict[str, Callable[[dict], Iterator[str]]] = {
    "train_step": _steps,
    "head": _head,
    "attention": _attention,
    "gemm": _gemm,
    "level1": _level1,
    "sweep": _sweep,
}


def says(stem: str, result: dict) -> list[str]:
    found = list(SAYS.get(benchmark_of(stem) or "", lambda _: iter(()))(result))
    return found if result.get("complete", True) else [*found, "(stopped before its end)"]


def text(folder: Path, parts: dict, states: dict) -> str:
    """One table of what was asked for: part, state, seconds, and the first line of what it says."""
    found, lines = results(folder), ["", f"{'part':<32} {'state':<12} {'s':>5}  result"]
    for name, state in states.items():
        of_part = parts.get(name, {})
        comes_to = says(name, found[name]) if name in found else []
        first = "; ".join(comes_to[:3]) if state == DONE else of_part.get("because", "")
        lines.append(f"{name:<32} {state or '':<12} {of_part.get('seconds', 0):>5.0f}  {first}")
    return "\n".join(lines)


# --- the roofline ----------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    name: str
    flops: float
    bytes: float  # the least that must be moved
    ms: float


def points(stem: str, result: dict) -> Iterator[Point]:
    """What has been timed, with its operations and the bytes that it cannot avoid."""
    benchmark = benchmark_of(stem)
    if not result["rows"]:
        return
    if benchmark == "gemm":
        H, V = result["H"], result["V"]
        for row in result["rows"]:
            if "tflops" in row:
                n = row["rows"]
                out = {"logits": n * V, "d_hidden": n * H, "d_weight": 2 * V * H}[row["role"]]
                operands = {"logits": (n + V) * H, "d_hidden": n * V + V * H, "d_weight": n * (V + H)}[row["role"]]
                size = 4 if row["result"] == "float32" else 2
                name = f"{row['role']}, {n} rows, {row['result']}"
                yield Point(name, 2 * n * H * V, 2 * operands + size * out, row["wall_median_ms"])
    elif benchmark == "head" and "N" in result:
        N, H, V, size = result["N"], result["H"], result["V"], 4 if result["dtype"] == "float32" else 2
        gemms = {"score": 1, "frozen": 2, "trained": 3}
        for row in result["rows"]:
            if row["provider"].startswith("ours"):
                k = gemms[row["mode"]]
                least = size * k * (N * H + V * H)  # hidden and weight read or written once a product
                name = f"{result['shape']}, {row['mode']}, {row['provider']}"
                yield Point(name, k * 2 * N * H * V, least, row["wall_median_ms"])
    elif benchmark == "level1":
        size = 4 if result["dtype"] == "float32" else 2
        for row in result["rows"]:
            if row["case"] != "copy":
                passes = 3 if "backward" in row["case"] else 1
                logits = result["N"] * result["V"]
                yield Point(row["case"], 4 * passes * logits, size * passes * logits, row["wall_median_ms"])
    elif benchmark == "attention":
        for row in result["rows"]:
            case = result.get("cases", {}).get(row["case"])
            if case:
                name = f"attention {row['case']}, {row['implementation']}"
                yield Point(name, *_attention_work(case), row["wall_median_ms"])


def _attention_work(case: dict) -> tuple[float, float]:
    """(FLOPs, bytes) forward and backward, causal over each sequence's own tokens."""
    prefix, *branches = case["lengths"]
    looks = prefix**2 / 2 + sum(prefix * n + n**2 / 2 for n in branches)
    flops = 3.5 * 4 * case["pairs"] * case["heads"] * case["width"] * looks
    tokens = case["pairs"] * sum(case["lengths"])
    return flops, 2 * 4 * tokens * case["width"] * (case["heads"] + case["kv_heads"])


def rates(found: dict[str, dict]) -> tuple[float, float] | None:
    """(TFLOP/s of the best GEMM, GB/s of the copy), both measured; None where one of them was not."""
    rows = [row for stem, result in found.items() if benchmark_of(stem) in ("gemm", "level1") for row in result["rows"]]
    flops = max((row["tflops"] for row in rows if "tflops" in row), default=None)
    copies = [row["gb_per_s"] for row in rows if row.get("case") == "copy" or row.get("role") == "copy"]
    return (flops, max(copies)) if flops and copies else None


WIDE, HIGH, EDGE = 760, 420, 56


class Axes:
    """Logarithmic both ways."""

    def __init__(self, xs: list[float], ys: list[float]):
        self.x, self.y = self.decades(xs), self.decades(ys)

    @staticmethod
    def decades(values: list[float]) -> tuple[int, int]:
        low = math.floor(math.log10(min(values)))
        return low, max(low + 1, math.ceil(math.log10(max(values))))

    def at(self, x: float, y: float) -> tuple[float, float]:
        def along(value, low, high):
            return (math.log10(value) - low) / (high - low)

        across, up = along(x, *self.x), along(y, *self.y)
        return EDGE + across * (WIDE - 2 * EDGE), HIGH - EDGE - up * (HIGH - 2 * EDGE)

    def grid(self) -> Iterator[str]:
        for k in range(self.x[0], self.x[1] + 1):
            x, bottom = self.at(10.0**k, 10.0 ** self.y[0])
            yield f'<line x1="{x:.1f}" y1="{EDGE}" x2="{x:.1f}" y2="{bottom:.1f}" class="grid"/>'
            yield f'<text x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{_power(k)}</text>'
        for k in range(self.y[0], self.y[1] + 1):
            left, y = self.at(10.0 ** self.x[0], 10.0**k)
            yield f'<line x1="{left:.1f}" y1="{y:.1f}" x2="{WIDE - EDGE}" y2="{y:.1f}" class="grid"/>'
            yield f'<text x="{left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{_power(k)}</text>'


def _power(k: int) -> str:
    return f"{10**k:,}" if k >= 0 else f"{10.0**k:g}"


COLOURS = {"head": "#2a7f62", "gemm": "#999999", "attention": "#b0562f", "level1": "#3a6ea5"}


def roofline(found: dict[str, dict]) -> str:
    roofs = rates(found)
    timed = [(benchmark_of(stem), point) for stem, result in found.items() for point in points(stem, result)]
    if roofs is None or not timed:
        return "<p>No roofline: it needs the results of gemm, with its copy.</p>"
    peak, copy = roofs
    knee = peak * 1e12 / (copy * 1e9)
    rate = {point: point.flops / point.ms / 1e9 for _, point in timed}  # TFLOP/s
    xs = [p.flops / p.bytes for p in rate]
    axes = Axes([*xs, knee], [*rate.values(), peak])
    low, high = 10.0 ** axes.x[0], 10.0 ** axes.x[1]
    roof = [axes.at(low, max(low * copy / 1e3, 10.0 ** axes.y[0])), axes.at(knee, peak), axes.at(high, peak)]
    if low * copy / 1e3 < 10.0 ** axes.y[0]:
        roof[0] = axes.at(10.0 ** axes.y[0] * 1e3 / copy, 10.0 ** axes.y[0])
    parts = [*axes.grid(), f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in roof)}" class="roof"/>']
    for benchmark, point in timed:
        x, y = axes.at(point.flops / point.bytes, rate[point])
        bound = min(peak, point.flops / point.bytes * copy / 1e3)
        title = f"{point.name}: {rate[point]:.3g} TFLOP/s, {rate[point] / bound:.0%} of its roof"
        dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[benchmark]}">'
        parts.append(f"{dot}<title>{html.escape(title)}</title></circle>")
    for i, name in enumerate(dict.fromkeys(benchmark for benchmark, _ in timed)):
        parts.append(f'<circle cx="{EDGE + 14}" cy="{EDGE + 14 + 18 * i}" r="4" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{EDGE + 24}" y="{EDGE + 18 + 18 * i}">{name}</text>')
    middle = f'<text x="{WIDE / 2}" y="{HIGH - 12}" text-anchor="middle">FLOP per byte that must be moved</text>'
    title = f"TFLOP/s; roofs measured here: {peak:.3g} TFLOP/s, {copy:,.0f} GB/s"
    parts += [middle, f'<text x="{EDGE}" y="{EDGE - 20}">{title}</text>']
    return f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img">{"".join(parts)}</svg>'


# --- steps -----------------------------------------------------------------------------------------------------------

SHARES = {"head": "#2a7f62", "attention": "#b0562f", "optimizer": "#8a6fb0", "rest": "#c9b37e", "idle": "#dddddd"}
SHARES |= {"not profiled": "#8a8a8a"}


def steps(result: dict) -> str:
    """A bar per trainer: seconds per step, cut by what the device did where it was profiled."""
    rows = [row for row in result["rows"] if "wall_s" in row]
    if not rows:
        return ""
    longest, parts, left = max(row["wall_s"] for row in rows), [], 230
    for i, row in enumerate(rows):
        y, x = 8 + 26 * i, float(left)
        parts.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{html.escape(row["provider"])}</text>')
        for name, share in (row.get("shares") or {"not profiled": 1.0}).items():
            width = share * row["wall_s"] / longest * (WIDE - left - 110)
            box = f'<rect x="{x:.1f}" y="{y}" width="{max(width, 0):.1f}" height="20" fill="{SHARES[name]}">'
            parts.append(f"{box}<title>{name} {share:.0%}</title></rect>")
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{row["wall_s"]:.3g} s</text>')
    y = 8 + 26 * len(rows)
    for i, (name, colour) in enumerate(SHARES.items()):
        parts.append(f'<rect x="{left + 85 * i}" y="{y + 6}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + 85 * i + 15}" y="{y + 15}">{name}</text>')
    return f'<svg viewBox="0 0 {WIDE} {y + 26}" role="img">{"".join(parts)}</svg>'


# --- the page --------------------------------------------------------------------------------------------------------

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .2rem .6rem .2rem 0;
vertical-align: top; border-bottom: 1px solid #ddd } svg { width: 100%; font: 12px system-ui, sans-serif }
.grid { stroke: #e4e4e4 } .roof { fill: none; stroke: #222; stroke-width: 2 } li { margin: .1rem 0 }
"""


def write(folder: Path, parts: dict) -> Path:
    """index.html in `folder`, from what it holds."""
    found = results(folder)
    stamps = [result for result in found.values() if result.get("versions")]
    versions = ", ".join(f"{k} {v}" for k, v in stamps[0]["versions"].items() if v) if stamps else "nothing measured"
    lines = [f"<h1>{html.escape(folder.name)}</h1><p>{html.escape(versions)}</p>"]
    lines.append("<table><tr><th>part<th>state<th>seconds<th>what it decides</tr>")
    for stage in STAGES:
        for part in stage.parts:
            of_part = parts.get(part.name, {})
            state = ": ".join(filter(None, [of_part.get("state", "not tried"), of_part.get("because")]))
            cells = [part.name, state, f"{of_part.get('seconds', 0):.0f}", stage.decides]
            lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in cells) + "</tr>")
    lines += ["</table><h2>Roofline</h2>", roofline(found), "<p>Points have titles.</p>"]
    for stem, result in found.items():
        lines.append(f"<h2>{html.escape(stem)}</h2><p>commit {html.escape(str(result.get('commit'))[:18])}</p>")
        if benchmark_of(stem) == "train_step":
            lines.append(steps(result))
        lines.append("<ul>" + "".join(f"<li>{html.escape(line)}" for line in says(stem, result)) + "</ul>")
    path = folder / "index.html"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(folder.name)}</title>'
    path.write_text(f"{page}<style>{STYLE}</style>{''.join(lines)}</html>\n", encoding="utf-8")
    return path
