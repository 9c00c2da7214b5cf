"""Reports: self-contained, escaped, written whole or not at all; charts as HTML and PNG from the same data."""

import math
import os
import re
from html.parser import HTMLParser

import pytest

from dpo_fast.report.charts import Bar, BarChart, Curve, CurveChart, format_share, training_curves
from dpo_fast.report.files import replace_directory, replace_file, write_text
from dpo_fast.report.page import DPO_LOSS, Page, text_table
from dpo_fast.report.png import draw_png
from dpo_fast.report.svg import bars_html, curves_html, ticks

LOG = [
    {"step": 1, "loss": "0.6931", "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0},
    {"step": 5, "eval_loss": 0.6, "eval_rewards/margins": 0.2},
    {"step": 9, "loss": 0.5, "rewards/chosen": 0.3, "rewards/rejected": -0.4, "rewards/margins": 0.7},
    {"step": 9, "train_runtime": 1.0},
]


class Balanced(HTMLParser):
    """Fails on a tag that is closed out of order or never."""

    VOID = {"meta", "br", "line", "polyline", "circle"}

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_page_is_self_contained_balanced_and_escaped():
    page = Page("A <b>title</b>", "lead & more", footer="end")
    page.heading("1 < 2")
    page.prose("a <script>alert(1)</script> b")
    page.stats({"what": "97 %"})
    page.equation(DPO_LOSS)
    page.bars(BarChart("bars", {"group": [Bar("<i>", 0.5, "good")]}))
    page.curves(training_curves(LOG))
    page.samples([("<q>", "old", '{"a": "b"}')])
    page.table(["x"], [["<y>"]])
    text = page.html()
    parser = Balanced()
    parser.feed(text)
    assert parser.open == []
    assert "<script" not in text and not re.search(r'src\s*=|href="[^#]|url\(|@import', text)
    for escaped in ("A &lt;b&gt;title", "1 &lt; 2", "&lt;script&gt;", "&lt;i&gt;", "&lt;q&gt;", "&lt;y&gt;"):
        assert escaped in text


def test_training_curves_take_what_the_log_has():
    charts = {chart.title: chart for chart in training_curves(LOG)}
    assert list(charts) == ["DPO loss", "Implicit reward", "Margin between the rewards"]  # no accuracies were logged
    assert charts["DPO loss"].curves == [
        Curve("training", [(0, 0.6931), (4.5, 0.5)], "good"),  # weights of no update; of 1 to 8 updates
        Curve("evaluation", [(5, 0.6)], "known"),
    ]
    assert training_curves([]) == []


def test_curves_draw_only_finite_points_inside_the_frame():
    svg = curves_html(CurveChart("c", [Curve("a", [(0, 1.0), (1, math.nan), (2, math.inf), (3, -4.0)])]))
    points = re.search(r'polyline points="([^"]*)"', svg)[1].split()
    assert len(points) == 2 and "nan" not in svg and "inf" not in svg
    for x, y in (point.split(",") for point in points):
        assert 0 <= float(x) <= 360 and 0 <= float(y) <= 210
    assert "No points" in curves_html(CurveChart("c", [Curve("a", [(0, math.nan)])]))
    assert "<circle" in curves_html(CurveChart("c", [Curve("a", [(1, 0.0)])]))


@pytest.mark.parametrize("low, high", [(0, 1), (0.4, 0.693), (-3.8, 1.1), (0, 0), (5, 5), (1, 1725), (1e-9, 2e-9)])
def test_ticks_cover_the_range_in_equal_round_steps(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9 and 2 <= len(marks) <= 7
    steps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    assert min(steps) > 0 and max(steps) - min(steps) < 1e-6 * max(steps) + 1e-9


def test_bars_show_the_share():
    bars = [Bar("a", 0.123, "before"), Bar("b", math.nan, "good"), Bar("c", 1.0, "bad")]
    text = bars_html(BarChart("t", {"g": bars}))
    assert "width:12.3%" in text and "12.3 %" in text and "none" in text and "100.0 %" in text
    assert format_share(0.0) == "0.0 %"


def test_png(tmp_path):
    pytest.importorskip("matplotlib")
    bars = BarChart("t", {"g": [Bar("a", 0.1, "before"), Bar("b", 0.9, "good")]})
    for charts in ([bars], training_curves(LOG)):
        path = draw_png(charts, tmp_path / "new" / "chart.png")
        assert path.read_bytes().startswith(b"\x89PNG") and os.listdir(path.parent) == ["chart.png"]


def test_text_table_aligns():
    assert text_table(["name", "x"], [["a", "1.5"], ["long name", "22.5"]]).splitlines() == [
        "  name          x",
        "  ───────────────",
        "  a           1.5",
        "  long name  22.5",
    ]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = write_text(tmp_path / "report.html", "old")
    with pytest.raises(RuntimeError), replace_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["report.html"]


def test_a_directory_is_replaced_whole(tmp_path):
    target = tmp_path / "model"
    for text in ("one", "two"):
        with replace_directory(target) as temporary:
            (temporary / text).write_text(text)
        assert os.listdir(target) == [text] and os.listdir(tmp_path) == ["model"]
    with pytest.raises(RuntimeError), replace_directory(target) as temporary:
        raise RuntimeError
    assert os.listdir(target) == ["two"] and os.listdir(tmp_path) == ["model"]
