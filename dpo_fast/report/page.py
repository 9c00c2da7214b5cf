"""A report as one self-contained HTML file: no scripts, no network, light and dark, readable on a phone."""

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .charts import BarChart, CurveChart, Histogram, Scatter
from .svg import bars_html, chart_html

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #ffffff; --ink: #1d232b; --soft: #5b6572; --line: #e4e1d9;
  --before: #7d8797; --good: #2463c9; --bad: #c9660a; --known: #1f8a70; --run0: #0072b2; --run1: #c9560a;
  --run2: #00795a; --run3: #a8407f; --run4: #4a4a4a; --run5: #806600; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1c2027; --ink: #e8eaed; --soft: #a3acb8;
  --line: #303640; --before: #7c8798; --good: #6aa2ff; --bad: #f0a04b; --known: #4fc3a1; --run0: #56b4e9;
  --run1: #f0903c; --run2: #35c79a; --run3: #e08fc0; --run4: #c8c8c8; --run5: #e0c341; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 860px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: clamp(27px, 6vw, 40px); line-height: 1.15; letter-spacing: -.02em; margin: 8px 0 12px;
  text-wrap: balance; }
h2 { font-size: clamp(21px, 4.4vw, 27px); line-height: 1.25; letter-spacing: -.01em; margin: 56px 0 10px; }
h3 { font-size: 15px; margin: 0 0 4px; }
a { color: var(--good); }
:focus-visible { outline: 3px solid var(--good); outline-offset: 3px; border-radius: 4px; }
main:focus { outline: 0; }
.skip { position: absolute; left: -9999px; }
.skip:focus { left: 12px; top: 12px; padding: 8px 14px; background: var(--card); z-index: 1; }
progress { width: 100%; height: 14px; margin: 8px 0 16px; accent-color: var(--good); }
details { margin: 14px 0; }
summary { cursor: pointer; color: var(--good); padding: 4px 0; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; margin: 14px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; }
p { margin: 10px 0; max-width: 68ch; }
.lead { font-size: 19px; color: var(--soft); }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0; }
.stat, figure, .equation, .samples { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.stat { padding: 14px 16px; }
.stat b { display: block; font-size: 25px; line-height: 1.2; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.stat span { color: var(--soft); font-size: 14px; line-height: 1.35; display: block; margin-top: 4px; }
figure { margin: 18px 0; padding: 16px; }
figcaption { font-weight: 600; margin-bottom: 10px; font-size: 15px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 14px;
  margin: 18px 0; }
.grid figure { margin: 0; }
.bars { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 18px 28px; }
.bars figcaption { grid-column: 1 / -1; margin: 0; }
.bar { display: grid; grid-template-columns: minmax(6.5em, 34%) 1fr 4.2em; gap: 10px; align-items: center;
  font-size: 14px; line-height: 1.3; padding: 2px 0; }
.bar .track { background: color-mix(in srgb, var(--line) 60%, transparent); border-radius: 4px; height: 13px; }
.bar i { display: block; height: 100%; border-radius: 4px; min-width: 2px; }
.bar .value { text-align: right; font-variant-numeric: tabular-nums; }
.bar .name { color: var(--soft); }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: var(--soft); font-family: inherit; }
svg .grid { stroke: var(--line); }
svg polyline, svg path { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .marks { stroke-width: 1.3; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); }
.legend .swatch { display: inline-block; width: 30px; height: 10px; margin-right: 6px; vertical-align: 0; }
.equation { padding: 14px 16px; overflow-x: auto; margin: 16px 0; }
.equation math { font-size: clamp(13px, 3.6vw, 18px); }
.samples { margin: 18px 0; overflow: hidden; }
.sample { padding: 12px 16px; border-top: 1px solid var(--line); }
.sample:first-child { border-top: 0; }
.sample b { display: block; }
.sample div { display: grid; grid-template-columns: 5em 1fr; gap: 8px; font-size: 15px; }
.sample div span:first-child { color: var(--soft); font-size: 13px; padding-top: 2px; }
code, .text { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .88em;
  overflow-wrap: anywhere; white-space: pre-wrap; }
.scroll { overflow-x: auto; margin: 18px 0; }
table { border-collapse: collapse; font-size: 15px; font-variant-numeric: tabular-nums; width: 100%; }
dl { margin: 14px 0; }
dl div { display: grid; grid-template-columns: 10em 1fr; gap: 0 16px; padding: 8px 0;
  border-bottom: 1px solid var(--line); }
dt { color: var(--soft); grid-row: span 2; }
dd { margin: 0; grid-column: 2; overflow-wrap: anywhere; }
dd.why { color: var(--soft); font-size: 15px; }
@media (max-width: 560px) { dl div { grid-template-columns: 1fr; } dd { grid-column: 1; } }
h3 + .scroll { margin-top: 0; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; }
.wrap td { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
th[scope=row] { font-weight: 400; min-width: 7em; position: sticky; left: 0; background: var(--paper); }
th[scope=col] { color: var(--soft); font-weight: 500; font-size: 13px; }
footer { margin-top: 64px; color: var(--soft); font-size: 14px; border-top: 1px solid var(--line); padding-top: 16px; }
"""


# L = -log sigmoid(beta (log p(y_w)/p_ref(y_w) - log p(y_l)/p_ref(y_l)))
DPO_LOSS = """
<mrow><mi>L</mi><mo>=</mo><mo>-</mo><mi>log</mi><mo>&#x2061;</mo><mi>σ</mi><mo>(</mo><mi>β</mi>
<mo>[</mo><mi>log</mi><mfrac><mrow><mi>p</mi><mo>(</mo><msub><mi>y</mi><mi>w</mi></msub><mo>|</mo><mi>x</mi><mo>)</mo>
</mrow><mrow><msub><mi>p</mi><mtext>ref</mtext></msub><mo>(</mo><msub><mi>y</mi><mi>w</mi></msub><mo>|</mo><mi>x</mi>
<mo>)</mo></mrow></mfrac><mo>-</mo><mi>log</mi><mfrac><mrow><mi>p</mi><mo>(</mo><msub><mi>y</mi><mi>l</mi></msub>
<mo>|</mo><mi>x</mi><mo>)</mo></mrow><mrow><msub><mi>p</mi><mtext>ref</mtext></msub><mo>(</mo><msub><mi>y</mi><mi>l</mi>
</msub><mo>|</mo><mi>x</mi><mo>)</mo></mrow></mfrac><mo>]</mo><mo>)</mo></mrow>
"""


@dataclass
class Page:
    """A report under construction; `html()` is the finished document. Plain text is escaped, markup is not."""

    title: str
    lead: str
    footer: str = ""
    refresh: int | None = None  # seconds after which a browser loads the page anew
    parts: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.parts.append(f"<h2>{html.escape(text)}</h2>")

    def prose(self, *paragraphs: str) -> None:
        """Paragraphs of plain text."""
        self.parts += [f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs]

    def stats(self, values: Mapping[str, str]) -> None:
        """A row of large numbers: caption -> number."""
        cards = "".join(
            f"<div class=stat><b>{html.escape(number)}</b><span>{html.escape(caption)}</span></div>"
            for caption, number in values.items()
        )
        self.parts.append(f"<div class=stats>{cards}</div>")

    def bars(self, chart: BarChart) -> None:
        self.parts.append(bars_html(chart))

    def curves(self, charts: Iterable[CurveChart | Histogram | Scatter]) -> None:
        self.parts.append(f'<div class="grid">{"".join(map(chart_html, charts))}</div>')

    def progress(self, done: int, total: int, label: str) -> None:
        self.parts.append(
            f'<progress value="{done}" max="{max(total, 1)}" aria-label="{html.escape(label)}"></progress>'
        )

    def facts(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """(name, value, why) each."""
        cells = "".join(
            f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
            + (f"<dd class=why>{html.escape(why)}</dd>" if why else "")
            + "</div>"
            for name, value, why in rows
        )
        self.parts.append(f"<dl>{cells}</dl>")

    def code(self, text: str) -> None:
        """Something to copy."""
        self.parts.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def equation(self, mathml: str) -> None:
        """MathML, without the `math` element."""
        self.parts.append(f'<div class="equation"><math display="block">{mathml}</math></div>')

    def samples(self, rows: Iterable[tuple[str, str, str]]) -> None:
        """What the model writes: (prompt, before, after)."""
        cells = "".join(
            f"<div class=sample><b class=text>{html.escape(prompt)}</b>"
            f'<div><span>before</span><span class="text">{html.escape(before)}</span></div>'
            f'<div><span>after</span><span class="text">{html.escape(after)}</span></div></div>'
            for prompt, before, after in rows
        )
        self.parts.append(f"<div class=samples>{cells}</div>")

    def table(
        self,
        header: Sequence[str],
        rows: Iterable[Sequence[str]],
        caption: str = "",
        *,
        wrap: bool = False,
        folded: bool = False,
    ) -> None:
        """The first cell of a row names it. wrap: cells of prose. folded: closed at first, under its caption."""
        head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            f"<tr><th scope=row>{html.escape(str(row[0]))}</th>"
            + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row[1:])
            + "</tr>"
            for row in rows
        )
        name = html.escape(caption or header[0])
        above = f"<h3>{name}</h3>" if caption and not folded else ""
        table = (
            f'<div class="scroll{" wrap" if wrap else ""}" role=region tabindex=0 aria-label="{name}">'
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        self.parts.append(f"<details><summary>{name}</summary>{table}</details>" if folded else above + table)

    def html(self) -> str:
        title = html.escape(self.title)
        refresh = f'<meta http-equiv="refresh" content="{self.refresh}">' if self.refresh else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">{refresh}'
            f'<title>{title}</title><style>{STYLE}</style></head><body><a class="skip" href="#content">Skip to content'
            f'</a><main id="content" tabindex="-1"><h1>{title}</h1>'
            f'<p class="lead">{html.escape(self.lead)}</p>\n'
            + "\n".join(self.parts)
            + f"\n<footer>{html.escape(self.footer)}</footer></main></body></html>\n"
        )


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    cells = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "  " + "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]  # fmt: skip
    rule = "  " + "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])
