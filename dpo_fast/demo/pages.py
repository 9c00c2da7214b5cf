"""The demo's report: text, charts and tables made from `story.run`'s results, which hold every number shown."""

from pathlib import Path

from dpo_fast.report.charts import Bar, BarChart, Curve, CurveChart, format_share, training_curves
from dpo_fast.report.files import write_text
from dpo_fast.report.page import DPO_LOSS, Page, text_table
from dpo_fast.report.png import can_draw_png, draw_png

# p*(chosen) / p*(rejected) = p_ref(chosen) / p_ref(rejected) * (q / (1 - q))^(1 / beta)
OPTIMUM = """
<mrow><mfrac><mrow><msup><mi>p</mi><mo>*</mo></msup><mo>(</mo><msub><mi>y</mi><mi>w</mi></msub><mo>)</mo></mrow>
<mrow><msup><mi>p</mi><mo>*</mo></msup><mo>(</mo><msub><mi>y</mi><mi>l</mi></msub><mo>)</mo></mrow></mfrac><mo>=</mo>
<mfrac><mrow><msub><mi>p</mi><mtext>ref</mtext></msub><mo>(</mo><msub><mi>y</mi><mi>w</mi></msub><mo>)</mo></mrow>
<mrow><msub><mi>p</mi><mtext>ref</mtext></msub><mo>(</mo><msub><mi>y</mi><mi>l</mi></msub><mo>)</mo></mrow></mfrac>
<msup><mrow><mo>(</mo><mfrac><mi>q</mi><mrow><mn>1</mn><mo>-</mo><mi>q</mi></mrow></mfrac><mo>)</mo></mrow>
<mrow><mn>1</mn><mo>/</mo><mi>β</mi></mrow></msup></mrow>
"""


def write(results: dict, out: Path) -> list[Path]:
    """Write report.html and, where matplotlib is installed, the PNGs; returns the paths."""
    paths = [write_text(out / "report.html", report(results))]
    if can_draw_png():
        opinions, form = results["opinions"], results["format"]
        paths += [
            draw_png([frequency_chart(results)], out / "1_frequencies.png"),
            draw_png([opinion_chart(results)], out / "2_opinions.png"),
            draw_png([format_chart(results)], out / "3_format.png"),
            draw_png(training_curves(opinions["log"]), out / "2_opinions_training.png"),
            draw_png(training_curves(form["log"]), out / "3_format_training.png"),
        ]
    return paths


def summary(results: dict) -> str:
    """The table that ends the demo."""
    form = results["format"]
    compared = [question for question in results["opinions"]["questions"] if question["agreement"] is not None]

    def mean(key: str) -> float:
        return sum(question[key] for question in compared) / len(compared)

    rows = [
        ("opinions: preferred answer, mean probability", mean("before"), mean("after")),
        ("opinions: rejected answer, mean probability", mean("other_before"), mean("other_after")),
        ("format: samples that are the required JSON", form["before"]["sampled"], form["after"]["sampled"]),
        ("format: greedy answers that are the required JSON", form["before"]["greedy"], form["after"]["greedy"]),
        ("format: probability of the exact right JSON answer", form["before"]["exact"], form["after"]["exact"]),
        ("content: greedy answers that are right", form["before"]["right_greedy"], form["after"]["right_greedy"]),
        ("content: samples that are right", form["before"]["right_sampled"], form["after"]["right_sampled"]),
    ]
    cells = [(text, format_share(before), format_share(after)) for text, before, after in rows]
    return text_table(["measured by this run", "before DPO", "after DPO"], cells)


def plain(answer: str) -> str:
    """An opinion without its full stop."""
    return answer.rstrip(".")


def frequency_chart(results: dict) -> BarChart:
    groups: dict[str, list[Bar]] = {}
    for answer in results["language_model"]["answers"]:
        bars = groups.setdefault(answer["question"], [])
        bars.append(Bar(f"{plain(answer['answer'])}, text", answer["share"], "known"))
        bars.append(Bar(f"{plain(answer['answer'])}, model", answer["probability"], "before"))
    return BarChart("How often an answer was read, and how probable the model finds it", groups)


def opinion_chart(results: dict) -> BarChart:
    groups = {}
    for q in results["opinions"]["questions"]:
        preferred, other = plain(q["preferred"]), plain(q["other"])
        asked = "nobody was asked" if q["agreement"] is None else f"{q['agreement']:.0%} prefer {preferred.lower()}"
        role = "known" if q["agreement"] is None else "good"
        groups[f"{q['question']} ({asked})"] = [
            Bar(f"{preferred}, before", q["before"], "before"),
            Bar(f"{preferred}, after", q["after"], role),
            Bar(f"{other}, before", q["other_before"], "before"),
            Bar(f"{other}, after", q["other_after"], role if q["agreement"] is None else "bad"),
        ]
    return BarChart("Probability of each answer before and after DPO", groups)


def format_chart(results: dict) -> BarChart:
    before, after = results["format"]["before"], results["format"]["after"]

    def group(key: str) -> list[Bar]:
        return [Bar("before DPO", before[key], "before"), Bar("after DPO", after[key], "good")]

    return BarChart(
        "Held-out questions",
        {
            "Samples that are the required JSON": group("sampled"),
            "Greedy answers that are the required JSON": group("greedy"),
            "Greedy answers that are right, in any wording": group("right_greedy"),
            "Probability of the exact right JSON answer": group("exact"),
        },
    )


def report(results: dict) -> str:
    """The whole page."""
    model, form = results["language_model"], results["format"]
    compared = [question for question in results["opinions"]["questions"] if question["agreement"] is not None]
    page = Page(
        "How preferences move a language model",
        f"A model of {model['parameters']:,} parameters was trained from nothing, then aligned twice with Direct "
        f"Preference Optimization, in {results['seconds']:.0f} seconds on a CPU. Every number below was measured "
        "in that run.",
        footer=f"dpo-fast demo, seed {results['settings']['seed']}. "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ". All numbers are in results.json beside this file.",
    )
    page.stats(
        {
            "held-out answers in the required format, sampled before DPO": format_share(form["before"]["sampled"]),
            "the same after DPO on pairs about other facts": format_share(form["after"]["sampled"]),
            "held-out answers that are right after DPO, greedy": format_share(form["after"]["right_greedy"]),
            "compared opinions where the preferred answer gained": f"{sum(q['after'] > q['before'] for q in compared)}"
            f" of {len(compared)}",
        }
    )
    _frequencies(page, results)
    _opinions(page, results)
    _format(page, results)
    page.heading("What was claimed, and what came of it")
    page.table(
        ["claim", "measured", "holds"],
        [(claim["claim"], claim["measured"], "yes" if claim["holds"] else "NO") for claim in results["claims"]],
    )
    return page.html()


def _frequencies(page: Page, results: dict) -> None:
    model, before = results["language_model"], results["format"]["before"]
    page.heading("1. A language model mirrors its data")
    page.prose(
        f"The model read {model['documents']:,} short texts, {results['settings']['epochs']} times over, "
        f"{model['tokens_read']:,} tokens in all, and learned one thing: which token comes next. Some questions occur "
        "with different answers at a known ratio. A model that predicts well has to answer them at that ratio: nothing "
        "in its training says which answer is better, only which is more frequent.",
        f"The same holds for the form of an answer. {format_share(model['styles']['json'])} of the texts about facts "
        f"answer in JSON, and {format_share(before['sampled'])} of the model's own samples do. It can write JSON; it "
        "has no reason to prefer it.",
    )
    page.bars(frequency_chart(results))
    page.curves([CurveChart("Loss of next-token training, nats per token", [Curve("loss", model["loss"])])])


def _opinions(page: Page, results: dict) -> None:
    opinions = results["opinions"]
    compared = [question for question in opinions["questions"] if question["agreement"] is not None]
    against = sum(question["before"] < question["other_before"] for question in compared)
    page.heading("2. DPO moves probability from one answer to another")
    page.prose(
        "A preference pair is a question with a chosen and a rejected answer. DPO raises the chosen one's probability "
        "relative to the rejected one's, each measured against a frozen copy of the model, the reference:"
    )
    page.equation(DPO_LOSS)
    page.prose(
        f"β (here {opinions['beta']:g}) is how strongly the reference holds the model back. No reward model is "
        "trained: β times the log of policy over reference is the reward. "
        f"In {against} of the {len(compared)} compared questions the model starts out on the side of the answer that "
        "people reject. Questions that nobody was asked about are shown as well: they should stay where they were.",
    )
    page.bars(opinion_chart(results))
    page.prose(
        "When a share q of the people prefers the chosen answer, the loss is least at a ratio of probabilities that "
        "can be computed before training:"
    )
    page.equation(OPTIMUM)
    page.table(
        ["question", "q", "preferred before", "after", "share of both: predicted", "measured"],
        [
            (q["question"], f"{q['agreement']:.0%}", *map(format_share, (q["before"], q["after"])),
             f"{q['predicted']:.3f}", f"{q['share_after']:.3f}")
            for q in compared
        ],
    )  # fmt: skip
    page.prose(
        "The equation fixes the ratio of two answers and leaves their sum free: an optimizer may also let both sink. "
        "This demo takes plain SGD steps, which follow the gradient, and the gradient takes from the rejected answer "
        "what it gives to the chosen one. Adam rescales every weight's step and, in a model this small, lets part of "
        "the probability leak to answers that nobody compared."
    )
    page.curves(training_curves(opinions["log"]))


def _format(page: Page, results: dict) -> None:
    form = results["format"]
    before, after = form["before"], form["after"]
    page.heading("3. DPO teaches a format")
    page.prose(
        "Now both answers of a pair are right, and differ in form: the chosen one is a JSON object with the fields "
        f"topic and answer, the rejected one is prose. Training takes {form['steps']} steps of "
        f"{form['pairs_per_step']} pairs. The test is on {form['questions']} questions about facts that no pair "
        "mentions, neither in this wording nor in another; the comparisons of numbers among them are in no training "
        "text at all, the language model's included.",
        "What counts is what the model writes: each answer is parsed, and passes only if the whole of it is one JSON "
        "object with exactly these two fields, both strings. "
        f"Of the samples that parse after DPO, {format_share(after['right_if_json'])} also hold the right topic and "
        f"answer; before, it was {format_share(before['right_if_json'])} of the few that parsed.",
    )
    page.bars(format_chart(results))
    page.curves(training_curves(form["log"]))
    page.heading("What the model writes")
    shown: dict[str, list] = {}
    for sample in form["samples"]:
        shown.setdefault(sample["topic"], []).append((sample["prompt"], sample["before"], sample["after"]))
    page.prose("Held-out questions, greedy decoding, the first two of each topic.")
    page.samples([row for rows in shown.values() for row in rows[:2]])
