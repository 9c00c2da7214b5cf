"""Reports: self-contained, escaped, written whole or not at all; charts as HTML and PNG from the same data."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
from html_pages import Balanced, check

from dpo_fast.cli import main
from dpo_fast.report import compare, record, run
from dpo_fast.report.charts import (
    COLOURS,
    RUN_ROLES,
    Bar,
    BarChart,
    Curve,
    CurveChart,
    Histogram,
    format_share,
    logged_points,
    pair_charts,
    training_curves,
)
from dpo_fast.report.files import replace_directory, replace_file, write_text
from dpo_fast.report.page import DPO_LOSS, STYLE, Page, text_table
from dpo_fast.report.png import draw_png
from dpo_fast.report.svg import bars_html, curves_html, histogram_html, scatter_html, ticks

LOG = [
    {"step": 1, "loss": "0.6931", "rewards/chosen": 0.0, "rewards/rejected": 0.0, "rewards/margins": 0.0},
    {"step": 5, "eval_loss": 0.6, "eval_rewards/margins": 0.2},
    {"step": 9, "loss": 0.5, "rewards/chosen": 0.3, "rewards/rejected": -0.4, "rewards/margins": 0.7},
    {"step": 9, "train_runtime": 1.0},
]


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


def test_a_write_that_is_killed_leaves_the_whole_page_before_it(tmp_path):
    path = write_text(tmp_path / "report.html", "<p>whole</p>")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom dpo_fast.report.files import replace_file\n"
        "with replace_file(Path(sys.argv[1])) as temporary:\n"
        "    file = temporary.open('w')\n    file.write('<p>ha')\n    file.flush()\n    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert path.read_text() == "<p>whole</p>"


# --- charts that say what they show ----------------------------------------------------------------------------------


def test_a_value_stands_at_the_updates_that_its_weights_had():
    log = [
        {"step": 0, "eval_loss": 0.7},
        {"step": 1, "loss": 0.69},  # weights of no update
        {"step": 5, "loss": 0.6},  # of 1 to 4
        {"step": 5, "eval_loss": 0.5},  # of 5
        {"step": 6, "loss": 0.4},  # of 5
    ]
    assert logged_points(log, "loss") == [(0, 0.69), (2.5, 0.6), (5, 0.4)]
    assert logged_points(log, "eval_loss") == [(0, 0.7), (5, 0.5)]


def test_charts_say_their_values_in_words():
    text = curves_html(CurveChart("Loss", [Curve("a & b", [(0, 0.6931), (9, 0.25)]), Curve("c", [(4, 1.0)])]))
    label = re.search(r'role="img" aria-label="([^"]*)"', text)[1]
    assert label == "Loss. a &amp; b from 0.6931 at step 0 to 0.25 at step 9; c 1 at step 4."
    pairs = {"chosen_rewards": [1.0, 3.0], "rejected_rewards": [-1.0, math.nan]}
    histogram, scatter = pair_charts({**pairs, "chosen_tokens": [4, 8], "rejected_tokens": [5, 6]})
    assert "chosen: 2 values from 1 to 3, mean 2; rejected: 1 values from -1 to -1" in histogram_html(histogram)
    drawn = scatter_html(scatter)
    assert "chosen: 2 points, 4 to 8 tokens of the completion, rewards 1 to 3" in drawn and "nan" not in drawn
    assert "No points" in histogram_html(Histogram("h", {"chosen": []}, {}, "x"))


def test_histogram_counts_every_value():
    values = [0.0] * 5 + [1.0] * 2
    text = histogram_html(Histogram("h", {"chosen": values}, {"chosen": "good"}, "x"))
    corners = [point.split(",") for point in re.search(r'polyline points="([^"]*)"', text)[1].split()]
    ys = [float(y) for _, y in corners]
    floor, top = max(ys), min(ys)
    assert ys.count(top) == 2 and floor - top == pytest.approx(2.5 * (floor - sorted(set(ys))[1]), rel=0.02)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_enough_in_light_and_dark():
    """WCAG 2.2: 4.5 for text, 3 for lines."""
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in STYLE.split("@media (prefers-color", 1))
    assert set(light) == set(dark.keys() & light.keys()) and len(light) >= 15
    for theme in (light, dark):
        for ground in (theme["paper"], theme["card"]):
            for name, colour in theme.items():
                needed = {"ink": 4.5, "soft": 4.5, "good": 4.5, "paper": 0, "card": 0, "line": 0}.get(name, 3)
                assert contrast(colour, ground) >= needed, (name, colour, ground)


def test_curves_differ_by_colour_and_by_dashes():
    variables = {variable for variable, _, _ in COLOURS.values()}
    assert all(f"{variable}:" in STYLE for variable in variables)
    runs = [COLOURS[role] for role in RUN_ROLES]
    assert len(set(runs)) == len(runs) and len({(dashes) for _, _, dashes in runs[:6]}) == 6
    for chart in training_curves(LOG):
        assert len({COLOURS[curve.role][2] for curve in chart.curves}) == len(chart.curves)


def test_page_works_by_keyboard_and_is_named():
    page = Page("t", "l")
    page.table(["name", "value"], [["a", "b"]], "Rows")
    page.table(["name", "value"], [["a", "b"]], "More", folded=True)
    page.facts([("what", "chosen", "why")])
    text = page.html()
    assert text.count("<th scope=col>") == 4 and text.count("<th scope=row>") == 2
    assert '<a class="skip" href="#content">' in text and 'id="content" tabindex="-1"' in text
    assert "<details><summary>More</summary>" in text and ":focus-visible" in text
    assert text.count('role=region tabindex=0 aria-label="') == 2 and "<dt>what</dt><dd>chosen</dd>" in text
    assert "refresh" not in text and 'http-equiv="refresh" content="5"' in Page("t", "l", refresh=5).html()


# --- records and runs side by side -----------------------------------------------------------------------------------

RUN = {
    "title": "<run>",
    "finished": True,
    "trainer": "dpo_fast.training.trainer.FastDPOTrainer",
    "device": "cpu",
    "pairs": 8,
    "settings": {"beta": 0.1, "learning_rate": 1e-3, "loss_type": ["sigmoid"], "output_dir": "a"},
    "changed": ["learning_rate"],
    "seeds": {"seed": 42},
    "versions": {"torch": "2.9"},
    "command": "python <train>.py",
    "steps": 9,
    "max_steps": 9,
    "seconds": 3.0,
    "training_seconds": 2.7,
    "before": {"eval_loss": 0.6931},
    "after": {"eval_loss": 0.6},
    "has_evaluation": True,
    "log": LOG,
    "facts": {"how": [["reference", "<frozen>", "because <u>"]], "lengths": None, "notes": ["1 < 2"]},
}


def test_page_of_a_run_is_whole_and_escaped_while_it_trains_and_after():
    finished = run.page(RUN)
    live = run.page({**RUN, "finished": False, "steps": 4, "after": {}})
    early = run.page({**RUN, "finished": False, "ended_early": True, "steps": 4})
    for text in (finished, live, early):
        check(text)
        assert "&lt;run&gt;" in text and "&lt;frozen&gt;" in text and "<train>" not in text and "<u>" not in text
    assert 'http-equiv="refresh" content="5"' in live and "Training, step 4 of 9 on 8 pairs" in live
    assert 'value="4" max="9"' in live
    assert "refresh" not in finished + early and "Ended early, after step 4 of 9" in early
    assert "held out" not in finished and "eval_split: 0.1" in run.page({**RUN, "has_evaluation": False, "before": {}})
    assert "not the rewards of its pairs" in finished


def test_report_of_several_runs(tmp_path, capsys):
    names = ["<one>", "two"]
    for name, beta in zip(names, (0.1, 0.5), strict=True):
        whole = 1.0 if beta == 0.1 else 1  # the same number, from a command line and from a script
        settings = {**RUN["settings"], "beta": beta, "output_dir": name, "save_steps": whole}
        write_text(tmp_path / name / "results.json", json.dumps({**RUN, "settings": settings}))
    out = tmp_path / "side.html"
    assert main(["report", *(str(tmp_path / name) for name in names), "--output", str(out)]) == 0
    text = out.read_text()
    check(text)
    assert "&lt;one&gt;" in text and "<one>" not in text
    assert "<th scope=row>beta</th><td>0.1</td><td>0.5</td>" in text
    assert "<th scope=row>loss, evaluation after</th><td>0.6000</td><td>0.6000</td>" in text
    assert not [
        name for name in ("learning_rate", "output_dir", "save_steps") if f">{name}<" in text
    ]  # the same, and of no interest
    styles = re.findall(r'<polyline [^>]*style="([^"]*)"', text)
    assert len(set(styles[:2])) == 2 and "run0" in styles[0] and "run1" in styles[1] and "none" in styles[0]
    assert re.search(r'aria-label="Loss, training. &lt;one&gt; from 0.6931 at step 0 to 0.5 at step 4.5; two', text)
    assert str(out) in capsys.readouterr().out


def test_runs_of_one_name_are_told_apart(tmp_path):
    for folder in ("a/run", "b/run"):
        write_text(tmp_path / folder / "results.json", json.dumps(RUN))
    text = compare.compare([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "b/run"])
    assert "a/run" in text and "b/run (2)" in text and "b/run (3)" in text


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "holds no results.json; dpo-fast train and ReportCallback write it"),
        ("{", "results.json cannot be read"),
        ("\xff", "results.json cannot be read"),
        ("[]", "is not of a training"),
        ('{"claims": []}', "is not of a training"),
        ('{"log": [{"step": "x"}]}', "is not of a training"),
        ('{"log": [], "before": 3}', "'before' is no object"),
        ('{"log": [{"step": 1, "loss": "much"}]}', "'loss' is no number, but 'much'"),
        ('{"log": [], "before": {"eval_rewards/margins": null}}', "'eval_rewards/margins' is no number, but 'None'"),
        ('{"log": [], "seconds": []}', "'seconds' is no number"),
        ('{"log": [], "facts": {"how": [[1]]}}', "'how' holds no rows of three"),
    ],
)
def test_what_is_no_run_is_one_sentence_and_status_2(tmp_path, capsys, content, said):
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "results.json").write_bytes(content.encode("latin-1"))
    assert main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "r.html")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dpo-fast report: ") and said in lines[0]
    assert not (tmp_path / "r.html").exists()
    assert main(["report", str(tmp_path / "nowhere"), "--output", str(tmp_path / "r.html")]) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_a_record_of_little_is_read(tmp_path):
    """Of another version, or of a Trainer that says less."""
    write_text(tmp_path / "results.json", json.dumps({"log": LOG}))
    check(compare.compare([tmp_path]))


def test_secrets_are_in_no_record():
    words = ["dpo-fast", "train", "--hub_token", "hf_a", "--hub-token=hf_b", "--dataset", "x y", "--beta", "1"]
    words += ["--model_init_kwargs", '{"token": "hf_c", "a": 1}', "--model_init_kwargs={token: hf_d}"]
    line = record.command_line(words)
    assert "hf_" not in line and line.count("(not shown)") == 4 and "'x y' --beta 1" in line and '"a": 1' in line
    assert record.plain({"token": "hf_c", "a": [{"api_key": "k"}], "b": None}, "model_init_kwargs") == {
        "token": "(not shown)", "a": [{"api_key": "(not shown)"}], "b": None,
    }  # fmt: skip
