"""Other frameworks' own DPO trainers, before and after the lines of docs/swap.md: same numbers, seconds, memory.

    python -m benchmarks.interop trl-0.24 trl-1.9    # all of frameworks.py, if none is named; `make interop NAME`
    python -m benchmarks.interop --page              # only writes docs/swap.md from the results that are there

Each framework is installed from the registry, with the versions of frameworks.py, into an environment of its own:
.interop/NAME, or $DPO_FAST_INTEROP/NAME. It is used again while its pins are the same. A script runs in it twice per
round, each time in a process of its own, before and after in turns; this checkout is imported from the working
directory. The task is task.py's: six steps of four pairs in fp32, on one thread of the processor.

What both have logged must agree to 1e-5: losses, gradient norms, metrics, and the weights after the last step, each
difference over the larger of one and the value. The sign of a reward in the first step is left out: policy and
reference are one there, and an accuracy counts rounding. Seconds are those of the steps after the first, which holds
what is done once; memory is the peak above what stood before training. Ratios are medians over rounds.

Status 1: numbers that differ, a bar that is missed, or no result.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import torch

from ..record import Record, add_arguments
from . import page
from .frameworks import FRAMEWORKS, Framework

ROOT = Path(__file__).parents[2]
WAYS = ("before", "after")
LIMIT = 1e-5
ROUNDS = 3


class NoResult(RuntimeError):
    """A framework could not be installed, its script failed, or what it gave is no comparison."""


# --- environments ----------------------------------------------------------------------------------------------------


def python_of(framework: Framework) -> Path:
    """The interpreter of a framework's environment, which is made where it is missing or its pins have changed."""
    owner = next(f for f in FRAMEWORKS if f.name == (framework.environment or framework.name))
    folder = Path(os.environ.get("DPO_FAST_INTEROP") or ROOT / ".interop") / owner.name
    python, written = folder / "bin" / "python", folder / "pins.txt"
    wanted = "\n".join([*owner.pins, *(f"{pin} without its dependencies" for pin in owner.bare)]) + "\n"
    if written.exists() and written.read_text(encoding="utf-8") == wanted:
        return python
    print(f"{owner.name}: installing into {folder}", flush=True)
    venv.create(folder, with_pip=True, symlinks=True, clear=written.exists())
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for pins in filter(None, (owner.pins, owner.bare and ("--no-deps", *owner.bare))):
        if subprocess.run([*pip, *pins]).returncode:
            raise NoResult(f"pip install {' '.join(pins)} failed")
    written.write_text(wanted, encoding="utf-8")
    return python


# --- rounds ----------------------------------------------------------------------------------------------------------


def run_rounds(framework: Framework, rounds: int) -> dict:
    python = python_of(framework)
    with tempfile.TemporaryDirectory(prefix="interop_") as path:
        folder = Path(path)
        call(python, ["benchmarks.interop.task", str(folder / "task")], folder)
        found = []
        for turn in range(rounds):
            order = WAYS if turn % 2 == 0 else WAYS[::-1]
            found.append({way: run_script(framework, python, way, folder) for way in order})
            found[-1]["differences"] = differences(found[-1], weights(folder))
    return outcome(found)


def run_script(framework: Framework, python: Path, way: str, folder: Path) -> dict:
    out = folder / f"{way}.json"
    call(python, [f"benchmarks.interop.{framework.script}", way, str(out), *framework.options], folder)
    found = json.loads(out.read_text(encoding="utf-8"))
    seconds, peak = sum(found["measured"]["processor_s"][1:]), found["measured"]["peak_mib"]
    print(f"{framework.name} {way}: {seconds:.1f} s, {peak:.0f} MiB", flush=True)
    return found


def call(python: Path, module: list[str], folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    run = subprocess.run(
        [str(python), "-m", *module],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode:
        raise NoResult(f"{' '.join(module)}: status {run.returncode}\n" + "\n".join(run.stdout.splitlines()[-15:]))


def weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {way: torch.load(folder / f"{way}.pt") for way in WAYS}


# --- the comparison --------------------------------------------------------------------------------------------------


def differences(found: dict, weights: dict) -> dict[str, float]:
    """Largest difference of each curve and of the weights, over the larger of one and the value before."""
    before, after = (curves_of(found[way]) for way in WAYS)
    absent = before.keys() ^ after.keys() or weights["before"].keys() ^ weights["after"].keys()
    if absent:
        raise NoResult(f"only one of before and after has {', '.join(sorted(absent))}")
    if max(before["loss"]) - min(before["loss"]) < 1e-3:
        raise NoResult(f"nothing was learned: losses {before['loss']}")
    apart = {}
    for name in before:
        first = 1 if "accurac" in name else 0  # of policy == reference
        apart[name] = largest(torch.tensor(before[name][first:]), torch.tensor(after[name][first:]))
    theirs, ours = weights["before"], weights["after"]
    apart["weights"] = max(largest(theirs[name], ours[name]) for name in theirs)
    return apart


def curves_of(found: dict) -> dict[str, list[float]]:
    return {"loss": found["losses"], "grad_norm": found["grad_norms"], **found["metrics"]}


def largest(before: torch.Tensor, after: torch.Tensor) -> float:
    apart = (before.double() - after.double()).abs() / before.double().abs().clamp(min=1.0)
    return torch.where(apart.isnan(), torch.inf, apart).max().item()  # max() passes over a NaN


def outcome(rounds: list[dict]) -> dict:
    """What goes into the result file, but for its stamp."""
    measured = [{way: found[way]["measured"] for way in WAYS} for found in rounds]
    seconds, wall = (
        [{way: sum(m[way][clock][1:]) for way in WAYS} for m in measured] for clock in ("processor_s", "wall_s")
    )
    peaks = [{way: m[way]["peak_mib"] for way in WAYS} for m in measured]
    names = rounds[0]["differences"]
    result = {"differences": {name: max(found["differences"][name] for found in rounds) for name in names}}
    for way in WAYS:
        result[way] = {
            "processor_s": statistics.median(s[way] for s in seconds),
            "wall_s": statistics.median(s[way] for s in wall),
            "peak_mib": statistics.median(p[way] for p in peaks),
            "curves": curves_of(rounds[0][way]),
        }
    faster = [s["before"] / s["after"] for s in seconds]
    memory = [p["after"] / p["before"] for p in peaks]
    result["faster"], result["faster_rounds"] = statistics.median(faster), faster
    result["memory"], result["memory_rounds"] = statistics.median(memory), memory
    return {**result, "rounds": measured, "versions": rounds[0]["before"]["versions"]}


def reasons_against(framework: Framework, result: dict) -> list[str]:
    """What a result says no to: numbers apart, bars missed."""
    apart = {name: value for name, value in result["differences"].items() if not value <= LIMIT}
    found = [f"{name} differs by {value:.1e}, {LIMIT:.0e} is asked for" for name, value in apart.items()]
    if framework.faster and not result["faster"] >= framework.faster:
        found.append(f"{result['faster']:.2f} times faster, {framework.faster} is asked for")
    if framework.memory and not result["memory"] <= framework.memory:
        found.append(f"{result['memory']:.2f} of the memory, {framework.memory} is asked for")
    return found


# --- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = {framework.name: framework for framework in FRAMEWORKS}
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(known))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--page", action="store_true", help="only write docs/swap.md from the results")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in known]
    if unknown:
        parser.error(f"no framework {', '.join(unknown)}: there are {', '.join(known)}")
    torch.set_num_threads(1)  # what the stamp of a result reports
    status = 0
    if not arguments.page:
        record = Record.of("interop", argv, arguments, parser, under="interop")
        for name in arguments.names or known:
            status |= bench(known[name], arguments.rounds, record)
    if not arguments.no_save and arguments.out == parser.get_default("out"):
        page.write()
    return status


def bench(framework: Framework, rounds: int, record: Record) -> int:
    if framework.not_run:
        print(f"{framework.name}: not run, {framework.not_run}")
        return 0
    try:
        result = run_rounds(framework, rounds)
    except NoResult as reason:
        print(f"{framework.name}: no result, {reason}", flush=True)
        return 1
    record.save(framework.name, result)
    against = reasons_against(framework, result)
    worst = max(result["differences"], key=result["differences"].get)
    print(
        f"{framework.name}: {result['faster']:.2f} times faster, {result['memory']:.2f} of the memory, largest "
        f"difference {result['differences'][worst]:.1e} ({worst})",
        *(f"  not met: {reason}" for reason in against),
        sep="\n",
        flush=True,
    )
    return int(bool(against))
