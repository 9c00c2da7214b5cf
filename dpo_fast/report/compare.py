"""Several runs on one page, side by side: `dpo-fast report DIR...`."""

from pathlib import Path

from . import record as records
from .charts import RUN_ROLES, Curve, CurveChart, logged_points
from .page import Page
from .run import CONVENTION, SHOWN, duration, number

# chart -> keys of the log, evaluation's first where a run has it
_OVERLAID = {
    "Loss, training": "loss",
    "Loss, evaluation": "eval_loss",
    "Margin between the rewards, training": "rewards/margins",
    "Margin between the rewards, evaluation": "eval_rewards/margins",
    "Pairs ranked right, training": "rewards/accuracies",
    "Pairs ranked right, evaluation": "eval_rewards/accuracies",
    "Reward of the chosen answer": "rewards/chosen",
    "Reward of the rejected answer": "rewards/rejected",
}
# Differ and say nothing of what was trained
_NO_SETTINGS = {"output_dir", "logging_dir", "run_name", "accelerator_config", "deepspeed_plugin"}


def compare(directories: list[Path]) -> str:
    """The page as HTML. Raises NoRecord for a directory that holds none."""
    runs = dict(zip(_names(directories), map(records.load, directories), strict=True))
    if len(runs) > len(RUN_ROLES):
        raise records.NoRecord(f"{len(runs)} runs are too many for one page; it takes {len(RUN_ROLES)}")
    page = Page(
        "Runs side by side" if len(runs) > 1 else f"DPO: {next(iter(runs))}",
        f"{len(runs)} runs." if len(runs) > 1 else "1 run.",
        footer="dpo-fast report. All numbers are in the results.json of each run.",
    )
    header = ["run", *runs]
    page.heading("What came of them")
    page.table(header, _outcomes(runs), "Numbers after training")
    page.heading("Training")
    page.curves(_charts(runs))
    page.prose(CONVENTION)
    page.heading("What differs")
    rows = _differences(runs)
    if rows:
        page.table(header, rows, "Settings and versions that are not the same in all runs", wrap=True)
    else:
        page.prose("No setting and no version differs.")
    page.heading("To run them again")
    for name, found in runs.items():
        page.prose(f"{name}:")
        page.code(found.get("command") or "(the command is not known)")
    return page.html()


def _names(directories: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    paths = [directory.resolve().parts for directory in directories]
    depth = 1
    while len({part[-depth:] for part in paths}) < len(set(paths)):
        depth += 1
    names = ["/".join(part[-depth:]) for part in paths]
    return [f"{name} ({index})" if names.count(name) > 1 else name for index, name in enumerate(names, 1)]


def _outcomes(runs: dict[str, dict]) -> list[list[str]]:
    rows = [
        ["state", *("finished" if run.get("finished", True) else "training, or ended early" for run in runs.values())],
        ["trainer", *(str(run.get("trainer") or "").rpartition(".")[2] for run in runs.values())],
        ["steps", *(str(run.get("steps", "")) for run in runs.values())],
        ["time", *(duration(run["seconds"]) if "seconds" in run else "" for run in runs.values())],
        ["seconds per step", *(_per_step(run) for run in runs.values())],
        ["most memory, MiB", *(_memory(run) for run in runs.values())],
    ]
    for name in SHOWN:
        rows.append([f"{name}, last of training", *(_last(run, name) for run in runs.values())])
    for name in SHOWN:
        for when in ("before", "after"):
            rows.append(
                [f"{name}, evaluation {when}", *(number(run[when].get(f"eval_{name}")) for run in runs.values())]
            )
    return [row for row in rows if any(row[1:])]


def _per_step(run: dict) -> str:
    steps = run.get("steps", 0) - run.get("first_step", 0)
    return f"{run['training_seconds'] / steps:.3g}" if run.get("training_seconds") and steps > 0 else ""


def _memory(run: dict) -> str:
    return f"{run['memory']['mib']:,.0f}" if run.get("memory") else ""


def _last(run: dict, name: str) -> str:
    return number(next((logs[name] for logs in reversed(run["log"]) if "loss" in logs and name in logs), None))


def _charts(runs: dict[str, dict]) -> list[CurveChart]:
    charts = []
    for title, key in _OVERLAID.items():
        points = {name: logged_points(run["log"], key) for name, run in runs.items()}
        curves = [Curve(name, points[name], RUN_ROLES[i]) for i, name in enumerate(runs) if points[name]]
        if curves:
            charts.append(CurveChart(title, curves))
    return charts


def _differences(runs: dict[str, dict]) -> list[list[str]]:
    """A row per setting or version that is not the same in all runs. Settings that only one trainer knows are none."""
    settings, versions = [run["settings"] for run in runs.values()], [run["versions"] for run in runs.values()]
    chosen = [{**run["job"].get("given", {}), **_chosen(run)} for run in runs.values()]
    common = [name for name in settings[0] if all(name in found for found in settings)]
    rows = []
    for values, names in (
        (chosen, {name for found in chosen for name in found} - set(common)),
        (settings, common),
        (versions, {name for found in versions for name in found}),
    ):
        for name in sorted(set(names) - _NO_SETTINGS):
            shown = [_text(found.get(name)) for found in values]
            if len(set(shown)) > 1:
                rows.append([name, *shown])
    return rows


def _chosen(run: dict) -> dict:
    return {name: value for name, value, _ in (run.get("facts") or {}).get("how", [])}


def _text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:.10g}"  # 1.0 is 1
    return "" if value is None else str(value)
