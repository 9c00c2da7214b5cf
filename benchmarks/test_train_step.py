"""One whole optimizer step of each trainer, collation and logging included, as `train_step` measures it."""

import tempfile
from pathlib import Path

import pytest

from benchmarks.groups import CUDA, Left, Measured
from benchmarks.train_step import run as train_step
from benchmarks.train_step.worker import PROVIDERS, reason_against

MIX, WARMUP, ROUNDS = "chat", 2 if CUDA else 1, 10 if CUDA else 3
LONGEST, PAIRS = (2048, 8) if CUDA else (512, 2)  # tokens of prompt + completion, pairs per step
OPTIONS = ["--mix", MIX, "--steps", str(ROUNDS), "--warmup", str(WARMUP), "--rounds", "1", "--no-save"]
OPTIONS += ["--longest", str(LONGEST), "--pairs", str(PAIRS)]


def measure() -> dict:
    """Each trainer in a process of its own, which has its own peak memory; on a CPU they take turns step by step."""
    arguments = train_step.parse(OPTIONS)
    found = {name: Left(reason_against(name), wrong=False) for name in PROVIDERS if reason_against(name)}
    with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
        result = train_step.bench(arguments, Path(folder))
    wrong = train_step.wrong_providers(result)
    for row in result["rows"]:
        clock = "wall_s" if CUDA else "processor_s"
        times = [1e3 * step[clock] for step in row["steps"][0][WARMUP:]]
        extra = {"peak_mib": row["peak_mib"], "wall_ms": 1e3 * row["wall_s"], "tokens_per_s": row["tokens_per_s"]}
        reason = f"its curves are not those of {train_step.baseline_of(result['curves'])}"
        found[row["provider"]] = Left(reason, True) if row["provider"] in wrong else Measured(times, extra)
    return found


@pytest.mark.parametrize("member", PROVIDERS)
def test_train_step(measured, speed, member):
    group = f"one optimizer step of {PAIRS} pairs, {MIX} lengths up to {LONGEST}"
    speed(group, member, measured(group, measure))
