"""Whole optimizer steps: TRL's DPOTrainer, dpo_fast.trl.DPOTrainer and FastDPOTrainer on the same model and pairs.

    python -m benchmarks.train_step --mix chat --mode full --steps 4 --rounds 3
    python -m benchmarks.train_step --suite              # every line of the bar; on a GPU, 1B- and 8B-shaped models
    python -m benchmarks.train_step --factors --profile 2  # without sharing, packing, head; what a step consists of
    python -m benchmarks.train_step --largest-batch      # on a GPU: pairs per step until memory runs out
    python -m benchmarks.train_step --smoke              # seconds, a tiny model

Each provider has its own process, hence its own peak memory. On CPU all of them are loaded and take turns step by
step, so that noise of the machine hits all alike; on a GPU, whose memory they would share, one job runs at a time
unless they are told to run `--together`. A
step is timed from the end of the one before: collation, logging and optimizer included. The first steps are not
counted. All compute the same numbers, or the result says by how much they differ: see `differences`.

`trl` is TRL as it is; `trl-compact` is TRL with its head on completion tokens only, which is its own rule where Triton
runs and is switched on here where it does not. `times_faster` and `peak_ratio` compare with the first,
`times_faster_compact` and `peak_ratio_compact` with the second: medians and ranges over steps on the same batches.
What a GPU user may expect from shared prefixes, no padding and fewer GEMMs is the second.

TRL's metrics cannot be switched off; ours report what FastDPOTrainer reports by default. With a precomputed
reference, computing it is part of `setup_s`, not of the steps.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..record import RESULTS, Record, add_arguments, table
from .inputs import MIXES, SHAPES, packed_tokens, padded_tokens, real_tokens, write_inputs
from .plot import plot
from .worker import FACTORS, PROVIDERS, Job, reason_against

BASELINE, OWN = "trl", "FastDPOTrainer"
COMPACT = "trl-compact"
CURVES = ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins")
CURVES += ("logps/chosen", "logps/rejected")
RELATIVE = ("grad_norm",)  # differences relative to the baseline's value; absolute for the others
LIMITS = {
    "float32": {"loss": 1e-4, "grad_norm (relative)": 0.01},
    "bfloat16": {"loss": 0.05, "grad_norm (relative)": 0.1},  # logits that one of them rounds to 8 bits
}
COLUMNS = ["provider", "processor_s", "processor_min_s", "processor_max_s", "wall_s", "tokens_per_s", "pairs_per_s"]
COLUMNS += ["times_faster", "times_faster_compact", "peak_mib", "peak_ratio", "peak_ratio_compact"]


# --- workers -------------------------------------------------------------------------------------------------------


class WorkerFailed(RuntimeError):
    pass


class Worker:
    """A provider's process; see worker.py."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.log = job, folder / f"{job.provider}.log"
        environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(job.threads)}
        environment.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that spins would count as work
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.train_step.worker", job.dumps()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=RESULTS.parents[1],
                env=environment,
            )

    def answer(self, event: str) -> dict:
        line = self.process.stdout.readline()
        found = json.loads(line) if line else {}
        if found.get("event") != event:
            tail = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-15:])
            raise WorkerFailed(f"{self.job.provider}: no {event!r}, {found or 'it ended'}\n{tail}")
        return found

    def step(self) -> dict:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.answer("step")


@contextlib.contextmanager
def started(job: Job, folder: Path) -> Iterator[Worker]:
    worker = Worker(job, folder)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.communicate()


def run_together(jobs: list[Job], folder: Path) -> dict[str, dict]:
    """All jobs in turns, step by step, the first one another at each step."""
    with contextlib.ExitStack() as stack:
        workers, found = [], {}
        for job in jobs:  # one after the other, so that setups do not disturb each other
            workers.append(stack.enter_context(started(job, folder)))
            found[job.provider] = {"ready": workers[-1].answer("ready"), "steps": []}
        for step in range(jobs[0].steps):
            turn = step % len(workers)
            for worker in workers[turn:] + workers[:turn]:
                found[worker.job.provider]["steps"].append(worker.step())
        for worker in workers:
            found[worker.job.provider]["done"] = worker.answer("done")
        return found


# --- one comparison ------------------------------------------------------------------------------------------------


def bench(arguments, folder: Path, keep=lambda result: None) -> dict:
    """Run a comparison; returns what goes into the result file. `keep` gets the result so far, on a GPU after each
    provider: a provider that fails there is printed, and the others go on."""
    shape, mix = SHAPES[arguments.shape], MIXES[arguments.mix]
    steps = arguments.warmup + arguments.steps + arguments.profile
    dtype = getattr(torch, arguments.dtype)
    inputs = write_inputs(folder, shape, mix, steps * arguments.pairs, arguments.longest, dtype, arguments.seed)
    batches = [inputs["lengths"][i : i + arguments.pairs] for i in range(0, inputs["pairs"], arguments.pairs)]
    jobs = [make_job(arguments, provider, folder, steps) for provider in arguments.providers]
    rounds, failed = [], []
    for turn in range(arguments.rounds):
        first = turn % len(jobs)
        order = jobs[first:] + jobs[:first]
        rounds.append({})
        together = arguments.together or not torch.cuda.is_available()
        for group in [order] if together else [[job] for job in order]:
            if group[0].provider in failed:
                continue
            try:
                rounds[-1] |= run_together(group, folder)
            except WorkerFailed as reason:
                if not torch.cuda.is_available():
                    raise
                names = [job.provider for job in group]
                print(f"{', '.join(names)}: no speed, {reason}", flush=True)
                failed += names
                continue
            keep(outcome(arguments, rounds, batches, failed))
    return outcome(arguments, rounds, batches, failed)


def outcome(arguments, rounds: list[dict], batches: list, failed: list[str]) -> dict:
    """What is known after these rounds, the last of which may be unfinished."""
    whole = [found for found in rounds if found.keys() == rounds[0].keys()]
    timed = slice(arguments.warmup, arguments.warmup + arguments.steps)
    counted = batches[timed]
    curves = {p: curve_of(found["done"]["logs"]) for p, found in whole[0].items()}
    knobs = ("shape", "mix", "mode", "reference", "checkpointing", "dtype", "autocast", "optim", "pairs", "steps")
    knobs += ("warmup", "profile")
    base = baseline_of(curves)
    apart = {p: differences(curves[p], curves[base]) for p in curves if p != base} if base else {}
    return {
        **{
            name: getattr(arguments, name) for name in (*knobs, "rounds", "learning_rate", "longest", "threads", "seed")
        },
        "model": vars(SHAPES[arguments.shape]),
        "lengths": vars(MIXES[arguments.mix]),
        "tokens_per_step": {
            "real": statistics.mean(map(real_tokens, counted)),
            "padded": statistics.mean(map(padded_tokens, counted)),
            "packed": statistics.mean(map(packed_tokens, counted)),
        },
        "rows": summarize(whole, counted, timed),
        "differences": apart,
        "curves": curves,
        "failed": failed,
    }


def make_job(arguments, provider: str, folder: Path, steps: int, pairs: int | None = None) -> Job:
    return Job(
        provider=provider,
        folder=str(folder),
        mode=arguments.mode,
        reference=arguments.reference,
        checkpointing=arguments.checkpointing,
        dtype=arguments.dtype,
        bf16=arguments.autocast or arguments.dtype == "bfloat16",
        pairs_per_step=pairs or arguments.pairs,
        steps=steps,
        learning_rate=arguments.learning_rate,
        longest=arguments.longest,
        threads=arguments.threads,
        seed=arguments.seed,
        optim=arguments.optim,
        profile=arguments.profile,
    )


def baseline_of(providers: Iterable[str]) -> str | None:
    """With whom the others are compared: TRL as it is or, without it, ours."""
    return next((name for name in (BASELINE, OWN) if name in providers), None)


def summarize(rounds: list[dict], batches: list, timed: slice) -> list[dict]:
    """A row per provider. Seconds per step are medians over steps and rounds, rates are over all of them."""
    clock = "wall_s" if torch.cuda.is_available() else "processor_s"
    rows, times = [], {}
    for provider in sorted(rounds[0], key=(*PROVIDERS, *FACTORS).index):
        runs = [found[provider] for found in rounds]
        steps = [step for run in runs for step in run["steps"][timed]]
        wall, processor = ([step[name] for step in steps] for name in ("wall_s", "processor_s"))
        times[provider] = [step[clock] for step in steps]
        rows.append(
            {
                "provider": provider,
                "processor_s": statistics.median(processor),
                "processor_min_s": min(processor),
                "processor_max_s": max(processor),
                "wall_s": statistics.median(wall),
                "wall_min_s": min(wall),
                "wall_max_s": max(wall),
                "tokens_per_s": len(rounds) * sum(map(real_tokens, batches)) / sum(wall),
                "tokens_per_processor_s": len(rounds) * sum(map(real_tokens, batches)) / sum(processor),
                "pairs_per_s": len(rounds) * sum(map(len, batches)) / sum(wall),
                "peak_mib": max(peak_of(run["done"]) for run in runs),
                **{name: value for name, value in runs[0]["done"].items() if name.startswith("peak")},
                "imported_mib": runs[0]["ready"]["imported_mib"],
                "setup_s": runs[0]["ready"]["setup"]["wall_s"],
                "shares": runs[0]["done"].get("shares"),
                "steps": [[{k: step[k] for k in ("wall_s", "processor_s")} for step in run["steps"]] for run in runs],
            }
        )
    peaks = {row["provider"]: row["peak_mib"] for row in rows}
    for row in rows:
        for suffix, other in {"": baseline_of(times), "_compact": COMPACT}.items():
            if other in times:
                ratios = [theirs / own for theirs, own in zip(times[other], times[row["provider"]], strict=True)]
                row[f"times_faster{suffix}"] = statistics.median(ratios)
                row[f"times_faster{suffix}_min"], row[f"times_faster{suffix}_max"] = min(ratios), max(ratios)
                row[f"peak_ratio{suffix}"] = row["peak_mib"] / peaks[other]
    return rows


def peak_of(done: dict) -> float:
    return done.get("peak_device_mib", done["peak_process_mib"])


def curve_of(logs: list[dict]) -> dict[str, list[float]]:
    return {name: [float(log[name]) for log in logs] for name in CURVES}


def differences(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, float]:
    """Largest difference of each curve over the steps."""
    found = {}
    for name in CURVES:
        if len(ours[name]) != len(theirs[name]):
            raise ValueError(f"{name}: {len(ours[name])} steps to compare with {len(theirs[name])}")
        relative = name in RELATIVE
        apart = [abs(a - b) / (abs(b) if relative else 1) for a, b in zip(ours[name], theirs[name], strict=True)]
        # max() would pass over a NaN
        found[f"{name} (relative)" if relative else name] = max(x if x == x else float("inf") for x in apart)
    return found


def coincide(found: dict[str, float], dtype: str) -> bool:
    """Whether a provider trains what the baseline trains; its speed is not worth printing otherwise."""
    return all(found[name] <= limit for name, limit in LIMITS[dtype].items())


# --- the largest batch ---------------------------------------------------------------------------------------------


def largest_batch(arguments, folder: Path, most: int = 512) -> dict:
    """Pairs a step that fit the device's memory, per provider, to an eighth, and their speed in the second step."""
    shape, mix, dtype = SHAPES[arguments.shape], MIXES[arguments.mix], getattr(torch, arguments.dtype)
    write_inputs(folder, shape, mix, most, arguments.longest, dtype, arguments.seed)
    rows = []
    for provider in arguments.providers:
        speeds = {}

        def fits(pairs: int, provider=provider, speeds=speeds) -> bool:
            try:
                found = run_together([make_job(arguments, provider, folder, 2, pairs)], folder)[provider]
                speeds[pairs] = pairs / found["steps"][-1]["wall_s"]
            except WorkerFailed as failure:
                if "out of memory" not in str(failure):
                    raise
                return False
            return True

        largest = search(fits, arguments.pairs, most)
        rows.append({"provider": provider, "largest_batch": largest, "pairs_per_s": speeds.get(largest)})
        print(f"{provider}: {largest} pairs per step")
    base = next((row["largest_batch"] for row in rows if row["provider"] == BASELINE), None)
    for row in rows:
        row["times_larger"] = row["largest_batch"] / base if base else None
    return {name: getattr(arguments, name) for name in ("shape", "mix", "mode", "checkpointing", "dtype")} | {
        "rows": rows
    }


def search(fits, start: int, most: int) -> int:
    """The largest number up to `most` that fits, to an eighth of it; 0 if not even 1 does."""
    low, high = 0, start
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# --- command line --------------------------------------------------------------------------------------------------

CPU_SUITE = (
    ["--mix", "chat", "--mode", "full"],
    ["--mix", "chat", "--mode", "lora"],
    ["--mix", "long", "--mode", "full", "--steps", "3"],
    ["--mix", "short", "--mode", "full", "--steps", "3"],
    ["--mix", "chat", "--mode", "full", "--checkpointing", "--steps", "3"],
    ["--mix", "chat", "--mode", "full", "--reference", "precomputed", "--steps", "3"],
)
GPU_SUITE = (
    ["--shape", "1b", "--mix", "chat", "--mode", "full"],
    ["--shape", "1b", "--mix", "chat", "--mode", "lora"],
    ["--shape", "1b", "--mix", "chat", "--mode", "full", "--checkpointing", "--largest-batch"],
    ["--shape", "8b", "--mix", "chat", "--mode", "lora", "--checkpointing"],
)


def parse(argv: list[str]) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b" if cuda else "cpu-bar")
    parser.add_argument("--mix", choices=MIXES, default="chat")
    parser.add_argument("--mode", choices=("full", "lora"), default="full")
    parser.add_argument("--reference", choices=("memory", "precomputed"), default="memory")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if cuda else "float32")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast, over float32 weights")
    parser.add_argument("--optim", choices=("adamw_torch", "sgd"), default="adamw_torch", help="sgd has no state")
    parser.add_argument("--together", action="store_true", help="in turns on a GPU, too, whose memory holds them all")
    parser.add_argument("--factors", action="store_true", help="ours, and ours with one thing taken out at a time")
    parser.add_argument("--profile", type=int, default=0, help="more steps, for shares of attention, head, idle time")
    parser.add_argument("--pairs", type=int, default=8 if cuda else 4, help="pairs per step")
    parser.add_argument("--steps", type=int, default=10 if cuda else 4, help="steps that are counted")
    parser.add_argument("--warmup", type=int, default=3 if cuda else 1, help="steps before them")
    parser.add_argument("--rounds", type=int, default=1, help="times that everything is done, in new processes")
    parser.add_argument(
        "--providers", nargs="+", choices=(*PROVIDERS, *FACTORS), help="all that can run here, if omitted"
    )
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--longest", type=int, default=2048, help="tokens of prompt + completion; lengths stay below")
    parser.add_argument("--threads", type=int, default=2, help="of the processor, per provider")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest-batch", action="store_true", help="search it instead (needs a GPU)")
    parser.add_argument("--suite", action="store_true", help="all comparisons for this device")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and two steps, to see that it runs")
    parser.add_argument("--name", help="of the result files; made from the options if omitted")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    arguments.parser = parser
    if arguments.largest_batch and not cuda:
        parser.error("--largest-batch needs a GPU: without one, memory that runs out takes the machine with it")
    if arguments.autocast:
        arguments.dtype = "float32"
    if arguments.smoke:
        for name, value in dict(shape="tiny", mix="tiny", pairs=2, steps=2, warmup=1, longest=64, threads=1).items():
            setattr(arguments, name, value)
    everyone = (OWN, *FACTORS) if arguments.factors else PROVIDERS
    against = {provider: reason_against(provider) for provider in arguments.providers or everyone}
    absent = [f"{provider}: left out, {reason}" for provider, reason in against.items() if reason]
    if arguments.providers and absent:
        parser.error("; ".join(absent))
    if absent:
        print("\n".join(absent))
    arguments.providers = [provider for provider, reason in against.items() if reason is None]
    return arguments


def result_name(arguments) -> str:
    parts = ["train-step", arguments.shape, arguments.mix, arguments.mode]
    parts += ["checkpointing"] * arguments.checkpointing + ["precomputed"] * (arguments.reference == "precomputed")
    parts += ["autocast"] * arguments.autocast + ["sgd"] * (arguments.optim == "sgd") + ["factors"] * arguments.factors
    parts += ["largest-batch"] * arguments.largest_batch
    return "-".join(parts)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    if arguments.suite:
        failed = 0
        others = [option for option in argv if option != "--suite"]
        for options in GPU_SUITE if torch.cuda.is_available() else CPU_SUITE:
            failed |= main([*options, *others])
        return failed
    if not arguments.providers:
        print("nothing was measured: no trainer can run here")
        return 0
    record = Record.of("train_step", argv, arguments, arguments.parser)
    name = arguments.name or result_name(arguments)
    torch.set_num_threads(arguments.threads)  # what the stamp of the result reports

    def keep(result: dict) -> None:
        if len(result["rows"]) < len(arguments.providers):
            print(table(result["rows"], COLUMNS), flush=True)
        record.save(name, result, complete=False)

    with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
        path = Path(folder)
        result = largest_batch(arguments, path) if arguments.largest_batch else bench(arguments, path, keep)
    report(result)
    saved = record.save(name, result)
    if saved and "curves" in result:
        plot(result, saved.with_suffix(".png"))
    return 1 if wrong_providers(result) or result.get("failed") else 0


def wrong_providers(result: dict) -> list[str]:
    precision = "bfloat16" if result.get("autocast") else result["dtype"]
    return [p for p, found in result.get("differences", {}).items() if not coincide(found, precision)]


def report(result: dict) -> None:
    if "curves" not in result:
        print(table(result["rows"], ["provider", "largest_batch", "times_larger", "pairs_per_s"]))
        return
    tokens = result["tokens_per_step"]
    print(
        f"{result['shape']} {result['dtype']}, {result['mix']} mix, {result['mode']}, reference {result['reference']}, "
        f"gradient checkpointing {'on' if result['checkpointing'] else 'off'}, {result['pairs']} pairs per step: "
        f"{tokens['real']:.0f} real tokens, in {tokens['padded']:.0f} positions padded or {tokens['packed']:.0f} packed"
    )
    wrong = wrong_providers(result)
    print(table([row for row in result["rows"] if row["provider"] not in wrong], COLUMNS))
    for provider, found in result["differences"].items():
        print(f"{provider}, largest difference: " + ", ".join(f"{k} {v:.2e}" for k, v in found.items()))
    for row in result["rows"]:
        if row["shares"]:
            print(f"{row['provider']}, profiled: " + ", ".join(f"{k} {v:.1%}" for k, v in row["shares"].items()))
    for provider in wrong:
        print(f"{provider}: no speed, its curves are not those of {baseline_of(result['curves'])}")
