"""What was measured on this device, next to what we ask of it: one table from the JSON in benchmarks/results/<device>/.

    python -m benchmarks.bars

Status 0 says that each bar is met by a result of the code that is checked out. Status 1: a bar is missed, has no
result, or a result is older than its code (provenance.py); what measures it anew is printed.

Ratios are medians over rounds in which both sides took turns, and their range stands beside them. Where a bar replaces
one that was asked for first and is not held in a quiet hour, the first one stays visible: see `FIRST`.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .head_providers import OURS
from .provenance import CODE, benchmark_of, reason_against, top_of
from .record import RESULTS, device_name, table


@dataclass(frozen=True)
class Bar:
    what: str
    stem: str  # of the result file
    find: Callable[[dict], tuple]  # what the file holds -> value, or median, least, most; KeyError
    sign: str  # "<=" or ">="
    limit: float

    def met_by(self, value: float) -> bool:
        return value <= self.limit if self.sign == "<=" else value >= self.limit


@dataclass(frozen=True)
class First:
    """What was asked for first; `least` and `most` are medians of whole runs in quiet hours, one run each."""

    asked: float
    least: float
    most: float
    why: str


# Processor time, N=H=1024 V=32,000 fp32, two cores; five runs of seven rounds each
FIRST = {
    "head, frozen: TRL's time / ours": First(2.6, 2.26, 2.41, "2.6 was measured under load, where TRL loses more"),
    "head, trained: TRL's time / ours": First(2.6, 1.78, 1.93, "2.6 was measured under load, where TRL loses more"),
    "head, trained: cut-cross-entropy's time / ours": First(
        1.0, 0.989, 1.001, "a draw: both are at the speed of the same matrix products"
    ),
}


# --- where a bar's number is in a file -----------------------------------------------------------------------------


def row_of(result: dict, **wanted) -> dict:
    for row in result["rows"]:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    raise KeyError("row of " + ", ".join(map(str, wanted.values())))


def of_size(result: dict, **sizes: int) -> dict:
    """The result, if it is of these sizes: a smaller one says nothing about them."""
    if any(result.get(name) != size for name, size in sizes.items()):
        raise KeyError("result of " + ", ".join(f"{name}={size}" for name, size in sizes.items()))
    return result


def ranged(row: dict, name: str) -> tuple:
    return row[name], row[f"{name}_min"], row[f"{name}_max"]


# --- the bars ------------------------------------------------------------------------------------------------------


def level1_bars() -> Iterator[Bar]:
    for case, share in (("forward", 0.90), ("forward + backward", 0.85)):

        def find(result, case=case):
            row = row_of(of_size(result, N=8192, V=131_072), case=f"ours, {case}")
            return row["share_of_copy"], row["share_min"], row["share_max"]

        yield Bar(f"level 1, {case}: share of the copy bandwidth", "level1", find, ">=", share)


def head_bar(mode: str, what: str, stem: str, find: Callable[[dict, dict], tuple], sign: str, limit: float) -> Bar:
    """`find` takes the file and the row of ours."""

    def of_ours(result):
        return find(result, row_of(result, mode=mode, provider=OURS[mode]))

    return Bar(f"head, {mode}: {what}", stem, of_ours, sign, limit)


def gpu_head_bars() -> Iterator[Bar]:
    """N=8192 H=4096 V=131,072 in bf16 on an H200, where each GEMM takes 11.1 ms at 790 TFLOP/s; their shares of the
    GEMM rate hold on others. Memory: a tile of 2,048 rows and what goes with it, and an fp32 d_weight; 614 MiB were
    asked for first, less than such a tile. And a quarter of the tokens, N=2048 H=2048 V=128,256."""

    def time(_, ours):
        return ours["wall_median_ms"], ours["wall_min_ms"], ours["wall_max_ms"]

    H, V = 4096, 131_072
    tile, d_weight = 2048 * (6 * V + 8 * H) / 2**20, 4 * V * H / 2**20
    for mode, ms, rate in (("score", 13, 0.85), ("frozen", 26, 0.82), ("trained", 40, 0.83)):

        def share(_, ours):
            return 1 / ours["to_floor"], 1 / ours["to_floor_max"], 1 / ours["to_floor_min"]

        def memory(_, ours):
            return (ours["beyond_gradients_mib"],)

        yield head_bar(mode, "ms", "head-bar", time, "<=", ms)
        yield head_bar(mode, "share of the GEMM rate", "head-bar", share, ">=", rate)
        limit = 1.1 * (tile + d_weight * (mode == "trained"))
        yield head_bar(mode, "MiB beyond gradients", "head-bar", memory, "<=", limit)
    yield head_bar("trained", "ms, 2,048 tokens of a 1B-shaped model", "head-llama3-1b-few", time, "<=", 5.6)


def cpu_head_bars() -> Iterator[Bar]:
    stem = "head-cpu-bar"
    against_trl = {"frozen": 2.2, "trained": 1.75}  # below each of five quiet runs, see FIRST
    against_cce = {"score": 1.0, "frozen": 1.0, "trained": 0.95}
    for mode, floor in (("score", 1.15), ("frozen", 1.1), ("trained", 1.1)):

        def slower(provider, mode=mode):
            return lambda result, _: ranged(row_of(result, mode=mode, provider=provider), "to_ours")

        def memory(result, ours, mode=mode):
            peer = row_of(result, mode=mode, provider="cut-cross-entropy")
            return (ours["beyond_gradients_mib"] / peer["beyond_gradients_mib"],)

        yield head_bar(mode, "time / bare GEMMs", stem, lambda _, ours: ranged(ours, "to_floor"), "<=", floor)
        peer = slower("cut-cross-entropy")
        yield head_bar(mode, "cut-cross-entropy's time / ours", stem, peer, ">=", against_cce[mode])
        yield head_bar(mode, "memory, share of cut-cross-entropy's", stem, memory, "<=", 0.5)
        if mode in against_trl:
            yield head_bar(mode, "TRL's time / ours", stem, slower("trl-1.16"), ">=", against_trl[mode])


def growth_bar() -> Bar:
    def share(result):
        return (max(row["beyond_gradients_mib"] for row in result["rows"]) / result["tile_mib"],)

    return Bar("head, growth: largest memory beyond gradients / a tile", "head-growth-cpu-bar", share, "<=", 1.1)


def accuracy_bars() -> Iterator[Bar]:
    def share(result):
        of_size(result, N=2000, H=512, V=32_000)
        ours, trl = (row_of(result, provider=name)["token_rms_error"] for name in ("ours", "trl-1.16"))
        return (ours / trl,)

    def sequence(result):
        of_size(result, N=2000, H=512, V=32_000)
        return (row_of(result, provider="ours")["sequence_error"],)

    yield Bar("bf16 token log-probs: error, share of TRL's", "accuracy", share, "<=", 0.1)
    yield Bar("sequence of 2,000 tokens: nats off", "accuracy", sequence, "<=", 1e-3)


OWN, DROP_IN = "FastDPOTrainer", "dpo_fast.trl"
# stem, by its last words -> times TRL's speed, (as it is, and with its head on completions only), of ours
STEPS = {
    "chat-full": {OWN: (4.2, 2.2), DROP_IN: (3.6, 1.8)},
    "chat-lora": {OWN: (2.8, None), DROP_IN: (2.8, None)},
    "long-full": {OWN: (3.5, None), DROP_IN: (3.5, None)},
}


def step_bars() -> Iterator[Bar]:
    for end, providers in STEPS.items():
        for name, (as_it_is, compact) in providers.items():
            stem, what = f"train-step-cpu-bar-{end}", f"step, {end.replace('-', ', ')}: {name}"

            def column(column, name=name):
                return lambda result: (row_of(result, provider=name)[column],)

            def times(column, name=name):
                return lambda result: ranged(row_of(result, provider=name), column)

            def apart(curve, name=name):
                return lambda result: (result["differences"][name][curve],)

            yield Bar(f"{what}, times TRL's speed", stem, times("times_faster"), ">=", as_it_is)
            yield Bar(f"{what}, share of TRL's memory", stem, column("peak_ratio"), "<=", 0.42)
            if compact:
                yield Bar(f"{what}, times compact TRL's speed", stem, times("times_faster_compact"), ">=", compact)
                yield Bar(f"{what}, share of compact TRL's memory", stem, column("peak_ratio_compact"), "<=", 0.55)
            yield Bar(f"{what}, loss differs by", stem, apart("loss"), "<=", 1e-4)
            yield Bar(f"{what}, gradient norm differs by", stem, apart("grad_norm (relative)"), "<=", 0.01)


CPU_BARS = (*cpu_head_bars(), growth_bar(), *accuracy_bars(), *step_bars())
GPU_BARS = (*level1_bars(), *gpu_head_bars())
# stem -> what measures it, where no result says so
COMMANDS = {
    "level1": "python -m benchmarks.level1",
    "head-bar": "python -m benchmarks.head --shape bar",
    "head-llama3-1b-few": "python -m benchmarks.head --shape llama3-1b-few",
    "head-cpu-bar": "python -m benchmarks.head --shape cpu-bar --rounds 7",
    "head-growth-cpu-bar": "python -m benchmarks.head --growth --shape cpu-bar",
    "accuracy": "python -m benchmarks.accuracy",
    "train-step-cpu-bar-chat-full": "python -m benchmarks.train_step --mix chat --mode full",
    "train-step-cpu-bar-chat-lora": "python -m benchmarks.train_step --mix chat --mode lora",
    "train-step-cpu-bar-long-full": "python -m benchmarks.train_step --mix long --mode full --steps 3",
}


# --- the verdict ---------------------------------------------------------------------------------------------------


UNFINISHED = "stopped before its end"


def judge(folder: Path, bars: tuple[Bar, ...]) -> tuple[list[dict], list[dict]]:
    """(a row per bar, what is wrong with files: {file, reason, command}) of the results in `folder`."""
    root = top_of(folder)
    results, problems = {}, []
    for path in sorted(folder.glob("*.json")):
        result = results[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        benchmark = benchmark_of(path.stem)
        if benchmark is None:
            reason = f"is of no benchmark that is known ({', '.join(CODE)})"
        else:
            reason = reason_against(result.get("commit"), CODE[benchmark], root)
        if reason is None and not result.get("complete", True):
            reason = UNFINISHED
        if reason:
            problems.append({"file": path.name, "reason": reason, "command": command_of(path.stem, result)})
    for stem in dict.fromkeys(bar.stem for bar in bars):
        if stem not in results:
            problems.append({"file": f"{stem}.json", "reason": "does not exist", "command": COMMANDS[stem]})
    unusable = {problem["file"] for problem in problems if problem["reason"] != UNFINISHED}
    rows = [verdict(bar, results.get(bar.stem), f"{bar.stem}.json" in unusable) for bar in bars]
    named = {problem["file"] for problem in problems}
    for bar, row in zip(bars, rows, strict=True):
        if row["met"] == "no result" and row["file"] not in named:
            named.add(row["file"])
            problem = {"file": row["file"], "reason": f"has {row['missing']}", "command": COMMANDS[bar.stem]}
            problems.append(problem)
    return rows, problems


def command_of(stem: str, result: dict) -> str:
    return result.get("command") or COMMANDS.get(stem) or f"python -m benchmarks.{benchmark_of(stem)} --help"


def verdict(bar: Bar, result: dict | None, unusable: bool) -> dict:
    row = {"what": bar.what, "bar": f"{bar.sign} {bar.limit:g}", "file": f"{bar.stem}.json"}
    if result is None:
        return row | {"met": "no result"}
    try:
        value, *spread = bar.find(result)
    except KeyError as name:
        return row | {"met": "old" if unusable else "no result", "missing": f"no {name}"}
    row |= {"measured": float(value), "spread": "..".join(f"{x:.3g}" for x in spread)}
    first = FIRST.get(bar.what)
    if first:
        row["asked first"] = f"{first.asked:g}: " + ("held" if value >= first.asked else "missed")
    return row | {"met": "old" if unusable else "yes" if bar.met_by(value) else "NO"}


def report(rows: list[dict], problems: list[dict]) -> int:
    """Print the table and what it comes to; the exit status."""
    print(table(rows, ["what", "measured", "spread", "bar", "met", "asked first", "file"]))
    named = [(what, first) for what, first in FIRST.items() if any(row["what"] == what for row in rows)]
    if named:
        print("\nasked for first, not met, and replaced by the bar above:")
    for what, first in named:
        print(f"  {what}: {first.asked:g}; five quiet runs gave {first.least:g} to {first.most:g} ({first.why})")
    for problem in problems:
        print(f"\n{problem['file']} {problem['reason']}\n  measure anew: {problem['command']}")
    counts = {met: sum(row["met"] == met for row in rows) for met in ("yes", "NO", "old", "no result")}
    for row in rows:
        if row["met"] == "NO":
            print(f"\nmissed: {row['what']} is {row['measured']:.4g}, asked {row['bar']}")
    passed = counts["yes"] == len(rows) and not problems
    print(
        f"\n{'YES' if passed else 'NO'}: {len(rows)} bars, {counts['yes']} met, {counts['NO']} missed, "
        f"{counts['old']} measured with other code, {counts['no result']} without a result; "
        f"{len(problems)} files to measure anew"
    )
    return 0 if passed else 1


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.bars", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS / device_name())
    folder = parser.parse_args(argv).folder
    return report(*judge(folder, CPU_BARS if folder.name.startswith("cpu") else GPU_BARS))


if __name__ == "__main__":
    raise SystemExit(main())
