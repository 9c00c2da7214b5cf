"""The page of one run, made from its record."""

import math
import time

from .charts import format_share, pair_charts, training_curves
from .page import DPO_LOSS, Page, text_table
from .record import RESULTS

SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
REFRESH = 5  # seconds
HOLD_OUT = (
    "No pairs are held out, so nothing here tells how the model does on pairs that it has not trained on. "
    "eval_split: 0.1 in the recipe of dpo-fast train holds a tenth of them out; for a trainer, "
    "dataset.train_test_split(0.1, seed=0) gives the two parts."
)
CONVENTION = (
    "A value of training is a mean over the steps since the log before, and stands at the mean number of updates that "
    "the weights had had: the first one, of step 1, at 0. An evaluation stands at the step after which it was made."
)


def summary(record: dict) -> str:
    """The table that ends the command."""
    return text_table(*before_and_after(record))


def before_and_after(record: dict) -> tuple[tuple[str, str, str], list[tuple[str, str, str]]]:
    """(header, rows): on the evaluation data, or the first and the last of what training logged."""
    if record["before"] and (record["after"] or not record.get("finished", True)):
        first, last, header = record["before"], record["after"], ("evaluation data", "before", "after")
        names = [name for name in first if any(name == f"eval_{n}" or name.endswith(f"_{n}") for n in SHOWN)]
        names.sort(key=lambda name: next(i for i, n in enumerate(SHOWN) if name.endswith(n)))
    else:
        logged = [logs for logs in record["log"] if "loss" in logs] or [{}]
        first, last, header = logged[0], logged[-1], ("training data", "first logged", "last logged")
        names = [name for name in SHOWN if name in first]
    missing = "" if record.get("finished", True) or record.get("ended_early") else "not yet"
    rows = [(name.removeprefix("eval_"), number(first[name]), number(last.get(name)) or missing) for name in names]
    return header, rows


def number(value) -> str:
    return "" if value is None else f"{float(value):.4f}"


def page(record: dict) -> str:
    """The page as HTML; while the run is going on, one that loads itself anew."""
    done, total = record["steps"], record.get("max_steps", 0)
    live = not record["finished"] and not record.get("ended_early")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    built = Page(
        record["title"],
        _model(record) + _lead(record),
        footer=f"{versions}. All numbers are in {RESULTS} beside this file.",
        refresh=REFRESH if live else None,
    )
    if live:
        built.progress(done, total, f"step {done} of {total}")
    header, rows = before_and_after(record)
    if rows:
        built.table(header, rows, "Before and after" if record["before"] else "First and last logged")
    if record.get("has_evaluation") is False:
        built.prose(HOLD_OUT)
    _training(built, record)
    _pairs(built, record)
    _data(built, record)
    _speed(built, record)
    _how(built, record)
    if record.get("samples"):
        built.heading("What the model writes")
        built.prose("Greedy answers to the first prompts of the data.")
        built.samples((sample["prompt"], sample["before"], sample["after"]) for sample in record["samples"])
    _again(built, record)
    return built.html()


def _lead(record: dict) -> str:
    done, total, pairs = record["steps"], record.get("max_steps", 0), record.get("pairs")
    on_pairs = f" on {pairs:,} pairs" if pairs else ""
    if record["finished"]:
        return f"{done:,} steps{on_pairs}, {duration(record['seconds'])} on {record['device']}."
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    if record.get("ended_early"):
        return f"Ended early, after step {done:,} of {total:,}{on_pairs}, on {record['device']}, at {now}."
    return (
        f"Training, step {done:,} of {total:,}{on_pairs}, on {record['device']}. Written at {now}; "
        f"this page loads itself anew every {REFRESH} seconds."
    )


def _model(record: dict) -> str:
    return f"{record['job']['model']}: " if record.get("job") else ""


def _training(built: Page, record: dict) -> None:
    built.heading("Training")
    charts = training_curves(record["log"])
    if not charts:
        built.prose("Nothing is logged yet.")
        return
    settings = record.get("settings", {})
    loss, beta = settings.get("loss_type") or ["sigmoid"], settings.get("beta")
    names = ", ".join([loss] if isinstance(loss, str) else map(str, loss))
    sigmoid = names == "sigmoid" and not settings.get("label_smoothing")
    built.prose(
        f"The loss is {names}{'' if beta is None else f' with β = {beta:g}'}. Rewards are β times the log of policy "
        f"over reference. Before the first update both are 0{', the loss is ln 2 = 0.6931' if sigmoid else ''}, and no "
        "pair is ranked right, as none is ahead."
        if settings.get("loss_type") or sigmoid
        else "Rewards are β times the log of policy over reference."
    )
    if sigmoid:
        built.equation(DPO_LOSS)
    built.curves(charts)
    built.prose(CONVENTION)


def _pairs(built: Page, record: dict) -> None:
    if not record["finished"] or not record.get("has_evaluation"):
        return
    built.heading("Rewards of single pairs")
    pairs = record.get("evaluated_pairs")
    if not pairs:
        built.prose(
            "This trainer gives means over the evaluation set, not the rewards of its pairs, so there is no histogram "
            "of rewards here, and no chart of length against reward. FastDPOTrainer and dpo-fast train have both."
        )
        return
    shown, total = len(pairs["chosen_rewards"]), pairs["total"]
    built.curves(pair_charts(pairs))
    longer = [c - r for c, r in zip(pairs["chosen_tokens"], pairs["rejected_tokens"], strict=True)]
    margins = [c - r for c, r in zip(pairs["chosen_rewards"], pairs["rejected_rewards"], strict=True)]
    related = _correlation(longer, margins)
    built.prose(
        f"{'All' if shown == total else f'{shown:,} of the'} {total:,} pairs of the evaluation data, after training."
        + (
            ""
            if related is None
            else f" How much longer the chosen answer is and how far its reward leads have a correlation of "
            f"{related:.2f}; near 1 or -1, the model may have learned length."
        )
    )


def _correlation(xs: list[float], ys: list[float]) -> float | None:
    found = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(found) < 3:
        return None
    mean_x, mean_y = (sum(values) / len(found) for values in zip(*found, strict=True))
    over = sum((x - mean_x) * (y - mean_y) for x, y in found)
    under = math.sqrt(sum((x - mean_x) ** 2 for x, _ in found) * sum((y - mean_y) ** 2 for _, y in found))
    return over / under if under else None


def _data(built: Page, record: dict) -> None:
    facts = record.get("facts") or {}
    lengths, notes = facts.get("lengths"), facts.get("notes", [])
    if not lengths and not notes:
        return
    built.heading("Data")
    if lengths:
        rows = [
            (name, f"{part['mean']:.1f}", f"{part['median']:g}", f"{part['longest']:,}")
            for name, part in lengths["parts"].items()
        ]
        built.table(["tokens", "mean", "median", "longest"], rows, "Lengths, before truncation")
        pairs = "all" if lengths["looked_at"] == lengths["pairs"] else f"the first {lengths['looked_at']:,} of"
        cut = f"{lengths['cut']:,} ({format_share(lengths['cut'] / lengths['looked_at'])}) are"
        built.prose(
            f"Of {pairs} {lengths['pairs']:,} training pairs, {cut if lengths['cut'] else 'none is'} cut to the limits "
            f"({lengths['limits']}). {format_share(lengths['scored'])} of the tokens of prompts and completions are "
            "scored, each prompt counted once per pair."
        )
    built.prose(*notes)


def _speed(built: Page, record: dict) -> None:
    steps, seconds = record["steps"] - record.get("first_step", 0), record.get("training_seconds")
    if not seconds or steps <= 0:
        return
    built.heading("Speed and memory")
    counts, settings = record.get("counts") or {}, record.get("settings", {})
    cards = {"seconds per step, without evaluations, logs and checkpoints": f"{seconds / steps:.3g}"}
    pairs = counts.get("pairs")
    if pairs is None and "per_device_train_batch_size" in settings:
        pairs = steps * settings["per_device_train_batch_size"] * settings.get("gradient_accumulation_steps", 1)
    of = " of each process" if record.get("processes", 1) > 1 else ""
    if pairs:
        cards[f"pairs per second{of}"] = f"{pairs / seconds:,.3g}"
    tokens, scored = counts.get("tokens"), counts.get("scored")
    if tokens is None:
        logged = [logs["num_tokens"] for logs in record["log"] if "num_tokens" in logs]
        tokens = logged[-1] / record.get("processes", 1) if logged else None
    if tokens:
        cards[f"tokens per second{of}"] = f"{tokens / seconds:,.0f}"
    if tokens and scored:
        cards["of the positions that the model read were scored"] = format_share(scored / tokens)
    if memory := record.get("memory"):
        mib = memory["mib"]
        cards[f"most memory used ({memory['of']})"] = f"{mib / 1024:.2f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"
    built.stats(cards)


def _how(built: Page, record: dict) -> None:
    facts = record.get("facts") or {}
    rows = list(facts.get("how", []))
    if record.get("trainer"):
        processes = record.get("processes", 1)
        rows.insert(0, ("trainer", record["trainer"], "one process" if processes == 1 else f"{processes} processes"))
    if rows:
        built.heading("How it ran")
        built.facts(rows)


def _again(built: Page, record: dict) -> None:
    built.heading("To run it again")
    if record.get("command"):
        built.code(record["command"])
    seeds = ", ".join(f"{name} {value}" for name, value in record.get("seeds", {}).items())
    built.prose(f"Seeds: {seeds}." if seeds else "No seed is known.")
    given = (record.get("job") or {}).get("given")
    settings = record.get("settings", {})
    if given:
        built.table(["key", "value"], sorted(given.items()), "The keys that were set", wrap=True, folded=True)
    elif settings:
        rows = [(name, settings[name]) for name in record.get("changed", []) if name in settings]
        built.table(["argument", "value"], rows, "Arguments that are not at their default", wrap=True, folded=True)
    if settings:
        built.table(["argument", "value"], sorted(settings.items()), "All arguments", wrap=True, folded=True)


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
