"""What was measured on this device, next to what we ask of it: one table from the JSON in benchmarks/results/<device>/.

python -m benchmarks.bars
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from .measure import RESULTS, device_name, table

MODES = ("score", "frozen", "trained")
BEST = {"score": "ours", "frozen": "ours", "trained": "ours-fused"}  # the provider that runs the mode's plan
# N=8192 H=4096 V=131,072 in bf16 on an H200, where each GEMM takes 11.1 ms at 790 TFLOP/s
GPU_MS = {"score": 13, "frozen": 27, "trained": 40}
GPU_GEMM_SHARE = {"score": 0.85, "frozen": 0.82, "trained": 0.83}  # what these milliseconds amount to there
CPU_TO_FLOOR = {"score": 1.15, "frozen": 1.1, "trained": 1.1}


def lines(folder: Path) -> Iterator[tuple[str, float, str, float, str]]:
    """(what, value, "<=" or ">=", bar, file) of whatever has been measured in `folder`."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if path.stem == "level1":
            shares = {row["case"]: row["share_of_copy"] for row in result["rows"]}
            yield "level 1, forward: share of the copy bandwidth", shares["ours, forward"], ">=", 0.90, path.name
            both = shares["ours, forward + backward"]
            yield "level 1, forward + backward: share of the copy bandwidth", both, ">=", 0.85, path.name
        elif path.stem in ("head-bar", "head-cpu-bar"):
            on_gpu = path.stem == "head-bar"
            for line in (head_on_gpu if on_gpu else head_on_cpu)(result["rows"]):
                yield *line, path.name
        elif path.stem == "head-growth-cpu-bar":
            most = max(row["beyond_gradients_mib"] for row in result["rows"])
            yield "head, growth: MiB beyond gradients, largest", most, "<=", 1.1 * result["tile_mib"], path.name
        elif path.stem == "accuracy":
            ours, trl = ({row["provider"]: row for row in result["rows"]}[name] for name in ("ours", "trl-1.16"))
            share = ours["token_rms_error"] / trl["token_rms_error"]
            yield "bf16 token log-probs: error, share of TRL's", share, "<=", 0.1, path.name
            yield "sequence of 2,000 tokens: nats off", ours["sequence_error"], "<=", 1e-3, path.name
        elif path.stem.startswith("train-step-cpu-bar") and not result["checkpointing"]:
            for line in train_step(result):
                yield *line, path.name


def by_mode(rows: list[dict], mode: str) -> dict[str, dict]:
    return {row["provider"]: row for row in rows if row["mode"] == mode}


def head_on_gpu(rows: list[dict]) -> Iterator[tuple]:
    for mode in MODES:
        found = by_mode(rows, mode)
        ours = found.get(BEST[mode])
        if ours is None:
            continue
        yield f"head, {mode}: ms", ours["wall_median_ms"], "<=", GPU_MS[mode]
        yield f"head, {mode}: MiB beyond gradients", ours["beyond_gradients_mib"], "<=", 0.6 * 1024
        yield f"head, {mode}: share of the GEMM rate", 1 / ours["to_floor"], ">=", GPU_GEMM_SHARE[mode]


def head_on_cpu(rows: list[dict]) -> Iterator[tuple]:
    for mode in MODES:
        found = by_mode(rows, mode)
        ours, trl, peer = (found.get(name) for name in (BEST[mode], "trl-1.16", "cut-cross-entropy"))
        if ours is None:
            continue
        time = "processor_median_ms"
        yield f"head, {mode}: time / bare GEMMs", ours["to_floor"], "<=", CPU_TO_FLOOR[mode]
        if peer:
            yield f"head, {mode}: cut-cross-entropy's time / ours", peer[time] / ours[time], ">=", 1.0
            share = ours["beyond_gradients_mib"] / peer["beyond_gradients_mib"]
            yield f"head, {mode}: memory, share of cut-cross-entropy's", share, "<=", 0.5
        if trl and mode != "score":
            yield f"head, {mode}: TRL's time / ours", trl[time] / ours[time], ">=", 2.6


def train_step(result: dict) -> Iterator[tuple]:
    faster = {"FastDPOTrainer": 4.2, "dpo_fast.trl": 3.6}
    if result["mode"] == "lora":
        faster = dict.fromkeys(faster, 2.8)
    elif result["mix"] == "long":
        faster = dict.fromkeys(faster, 3.5)
    elif result["mix"] != "chat" or result["reference"] != "memory":
        return
    what = f"step, {result['mix']}, {result['mode']}"
    for row in result["rows"]:
        name = row["provider"]
        if name in faster:
            yield f"{what}: {name}, times TRL's speed", row["times_faster"], ">=", faster[name]
            yield f"{what}: {name}, share of TRL's memory", row["peak_ratio"], "<=", 0.42
            yield f"{what}: {name}, loss differs by", result["differences"][name]["loss"], "<=", 1e-4
            norm = result["differences"][name]["grad_norm (relative)"]
            yield f"{what}: {name}, gradient norm differs by", norm, "<=", 0.01


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.bars", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS / device_name())
    folder = parser.parse_args(argv).folder
    rows = [
        {"what": what, "measured": value, "bar": f"{sign} {bar:g}", "met": "yes" if met else "NO", "file": file}
        for what, value, sign, bar, file in lines(folder)
        for met in [value <= bar if sign == "<=" else value >= bar]
    ]
    if not rows:
        print(f"nothing has been measured yet in {folder}")
        return 1
    print(table(rows, ["what", "measured", "bar", "met", "file"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
