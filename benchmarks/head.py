"""The head: from hidden states to a DPO loss and its gradients, ours per plan against everyone.

    python -m benchmarks.head --shape cpu-bar --rounds 5
    python -m benchmarks.head --shape bar llama3-1b-chat --tile-mib 256 1024 2048
    python -m benchmarks.head --growth --shape cpu-bar

A provider that computes wrong numbers (head_gate.py) prints no speed. `error` is the largest error of token log-probs
(or, where a provider gives none, of the loss) against fp64, `gradient_error` that of d_hidden or d_weight relative to
its largest entry. `to_floor` and `to_ours` are times over those of the bare GEMMs and of ours, round by round: their
median and range. `gemms` are the products over N x H x V that a provider computes, `carries` says what its gradient can
be of: one that knows a single number for all tokens is held to the likelihood, and no DPO loss could be had from it.
"""

import argparse
import functools
import sys

import torch

from dpo_fast.ops.plan import DEFAULT_TILE_MIB

from .head_gate import Gate
from .head_plot import plot, plot_growth
from .head_providers import (
    MODES,
    ONE,
    OURS,
    SHAPES,
    Likelihood,
    Problem,
    case,
    facts_of,
    floors,
    ours,
    ours_fused,
    providers,
)
from .measure import interleaved, peak_mib, ratios
from .record import Record, add_arguments, line, table

COLUMNS = [
    "provider",
    "mode",
    "gemms",
    "carries",
    "wall_median_ms",
    "processor_median_ms",
    "to_floor",
    "to_ours",
    "to_ours_min",
]
COLUMNS += ["to_ours_max", "peak_mib", "beyond_gradients_mib", "error", "gradient_error"]


def bench(shape: str, rounds: int, modes=tuple(MODES), only=None, tiles_mib=(), keep=lambda result: None) -> dict:
    """`keep` gets the result so far after each mode."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    N, pairs, H, V, dtype, softcap = SHAPES[shape]
    sizes = dict(N=N, pairs=pairs, H=H, V=V, dtype=str(dtype)[6:], softcap=softcap)
    result = {"shape": shape, **sizes, "rows": []}
    p = Problem.make(*SHAPES[shape], device)
    gates, candidates = Gates(p), providers(p, only, tiles_mib)
    for mode in modes:
        result["rows"] += measure(gates, candidates, mode, rounds)
        keep(result)
    return result


class Gates:
    """The problem, its gate, and those of the likelihood for who computes nothing else, made when one is here."""

    def __init__(self, p: Problem):
        self.p, self.pairs = p, Gate(p)

    @functools.cached_property
    def likelihood(self) -> Gate:
        return Gate(Likelihood(**vars(self.p)))

    def of(self, name: str) -> Gate:
        return self.likelihood if facts_of(name).carries == ONE else self.pairs


def measure(gates: Gates, candidates: dict, mode: str, rounds: int) -> list[dict]:
    """A row per provider whose numbers are right, and one of the bare GEMMs."""
    p, cases, found = gates.p, {}, {}
    for name, provider in candidates.items():
        if name.startswith("ours-fused") and mode != "trained":
            continue
        gate = gates.of(name)
        run = case(gate.p, provider, mode)
        try:
            found[name] = gate.errors(name, *run())
        except (AssertionError, ImportError, RuntimeError, NotImplementedError, TypeError, ValueError) as reason:
            print(f"{name} ({mode}): no speed, {type(reason).__name__}: {str(reason).splitlines()[0][:160]}")
            continue
        cases[name] = run
        facts = facts_of(name)
        found[name] |= {"gemms": facts.gemms[list(MODES).index(mode)], "carries": facts.carries}
        found[name]["peak_mib"] = peak_mib(run)
        gradients = {"score": 0, "frozen": p.hidden.nbytes, "trained": p.hidden.nbytes + p.weight.nbytes}[mode]
        found[name]["beyond_gradients_mib"] = found[name]["peak_mib"] - gradients / 2**20
    floor = f"floor-{MODES[mode]}-gemm"
    timings = interleaved({floor: floors(p)[floor], **cases}, rounds)
    rows = []
    for name, timing in timings.items():
        row = {"mode": mode, "provider": name, **timing.summary(), **found.get(name, {})}
        for what, base in (("to_floor", floor), ("to_ours", OURS[mode])):
            if base in timings:
                ratio = ratios(timing, timings[base])
                row |= {what: ratio["median"], f"{what}_min": ratio["min"], f"{what}_max": ratio["max"]}
        rows.append(row)
    return rows


def growth(shape: str, tokens: list[int], keep=lambda result: None) -> dict:
    """Time and memory per plan as N grows at fixed H and V, and as V grows at the smallest N; `keep` as in `bench`."""
    _, _, H, V, dtype, softcap = SHAPES[shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {"shape": shape, "H": H, "dtype": str(dtype)[6:], "tile_mib": DEFAULT_TILE_MIB, "rows": []}
    rows = result["rows"]
    for N, columns in [*((n, V) for n in tokens), *((tokens[0], v) for v in (V // 4, V // 2, 2 * V, 4 * V))]:
        p = Problem.make(N, max(2, N // 256), H, columns, dtype, softcap, device)
        for plan, mode, provider in (
            ("score", "score", ours),
            ("frozen", "frozen", ours),
            ("pairwise", "trained", ours_fused),
            ("recompute", "trained", ours),
        ):
            run = case(p, provider, mode)
            timing = interleaved({plan: run}, 1, warmup=0)[plan].summary()
            gradients = {"score": 0, "frozen": p.hidden.nbytes, "trained": p.hidden.nbytes + p.weight.nbytes}[mode]
            beyond = peak_mib(run) - gradients / 2**20
            rows.append({"plan": plan, "N": N, "V": columns, **timing, "beyond_gradients_mib": beyond})
            print(line(rows[-1], ["plan", "N", "V", "wall_median_ms", "processor_median_ms", "beyond_gradients_mib"]))
        keep(result)
    return result


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.head", description=__doc__.splitlines()[0])
    default = "bar" if torch.cuda.is_available() else "cpu-bar"
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=[default], help="a result file each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--only", nargs="+", help="providers")
    parser.add_argument("--tile-mib", type=int, nargs="+", default=[], help="ours also with tiles of these sizes")
    parser.add_argument("--growth", action="store_true", help="the growth curve instead")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192, 32_768])
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    record = Record.of("head", argv, a, parser)
    for shape in a.shape:
        name = f"head-growth-{shape}" if a.growth else f"head-{shape}"

        def keep(result, name=name):
            record.save(name, result, complete=False)
            if not a.growth:
                mode = result["rows"][-1]["mode"]
                print(table([row for row in result["rows"] if row["mode"] == mode], COLUMNS), flush=True)

        if a.growth:
            result = growth(shape, a.tokens, keep)
            columns = ["plan", "N", "V", "wall_median_ms", "processor_median_ms", "beyond_gradients_mib"]
            print(table(result["rows"], columns))
        else:
            result = bench(shape, a.rounds, a.modes, a.only, a.tile_mib, keep)
        path = record.save(name, result)
        if path:
            (plot_growth if a.growth else plot)(result, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
