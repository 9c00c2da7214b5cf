"""Attention over a shared-prefix row, forward and backward: time and memory of each implementation.

    python -m benchmarks.attention --case chat long

The first call builds what layers share, a block mask for instance: `first_peak_mib` holds it, `peak_mib` does not. An
implementation whose numbers are not within the budget of eager attention in the same dtype prints no speed.
"""

import argparse
import sys
from typing import NamedTuple

import torch

from dpo_fast.attention import IMPLEMENTATIONS, shared_prefix_attention
from dpo_fast.layout import make_layout
from dpo_fast.testing import assert_within_budget

from .measure import interleaved, peak_mib
from .record import Record, add_arguments, line, table

COLUMNS = ["case", "implementation", "wall_median_ms", "wall_min_ms", "peak_mib", "first_peak_mib"]


class Case(NamedTuple):
    pairs: int
    lengths: tuple[int, int, int]  # prefix, chosen, rejected, of each pair
    heads: int
    kv_heads: int
    width: int  # of a head


CASES = {
    "chat": Case(8, (150, 200, 200), 32, 8, 64),  # 4,400 tokens
    "long": Case(8, (1024, 1024, 1024), 32, 8, 64),  # 24,576 tokens
    "small": Case(4, (150, 200, 200), 8, 4, 64),  # chat for a CPU: 2,200 tokens
    "tiny": Case(4, (9, 15, 12), 4, 2, 16),
}


class Problem:
    """A packed row of random queries, keys and values in the device's dtype, its truth in fp64, and eager's numbers."""

    def __init__(self, case: Case):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.case, self.dtype = case, torch.bfloat16 if device == "cuda" else torch.float32
        self.tokens = case.pairs * sum(case.lengths)
        torch.manual_seed(0)
        self.inputs = [
            torch.randn(1, heads, self.tokens, case.width, device=device).to(self.dtype)
            for heads in (case.heads, *[case.kv_heads] * 2)
        ]
        self.cotangent = torch.randn(1, self.tokens, case.heads, case.width, device=device).to(self.dtype)
        self.truth, self.eager = self.both("eager", torch.float64)(), self.both("eager")()

    def both(self, implementation: str, dtype: torch.dtype | None = None):
        """A callable: output, d_query, d_key, d_value."""
        dtype, case = dtype or self.dtype, self.case
        leaves = [x.to(dtype).requires_grad_() for x in self.inputs]
        layout = make_layout([case.lengths] * case.pairs).to(self.cotangent.device)

        def run():
            knobs = dict(scaling=case.width**-0.5, implementation=implementation)
            out = shared_prefix_attention(*leaves, layout, **knobs)
            return out.detach(), *torch.autograd.grad(out, leaves, self.cotangent.to(dtype))

        return run

    def check(self, name: str, found) -> None:
        """Raise AssertionError where `name` is not as near to fp64 as eager attention in the same dtype."""
        for what, *results in zip(
            ("output", "d_query", "d_key", "d_value"), found, self.eager, self.truth, strict=True
        ):
            assert_within_budget(*(x.flatten(0, 2) for x in results), what=f"{name}, {what}")


def bench(name: str, rounds: int, implementations=IMPLEMENTATIONS, keep=lambda rows: None) -> list[dict]:
    """`keep` gets the rows so far after each implementation."""
    p, rows = Problem(CASES[name]), []
    for implementation in implementations:
        run, found = p.both(implementation), []
        try:
            first = peak_mib(lambda run=run, found=found: found.extend(run()))
            p.check(implementation, found)
        except (AssertionError, RuntimeError, NotImplementedError, ValueError) as reason:
            lines = str(reason).splitlines() or [""]
            print(f"{name}, {implementation}: no speed, {type(reason).__name__}: {lines[0][:160]}", flush=True)
            continue
        found.clear()
        summary = interleaved({implementation: run}, rounds)[implementation].summary()
        peaks = {"peak_mib": peak_mib(run), "first_peak_mib": first}
        rows.append({"case": name, "tokens": p.tokens, "implementation": implementation, **summary, **peaks})
        keep(rows)
    return rows


def main(argv=None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.attention", description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", choices=CASES, default=["chat", "long"] if cuda else ["tiny"])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--rounds", type=int, default=10 if cuda else 1)
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    record, rows = Record.of("attention", argv, a, parser), []
    for name in a.case:

        def keep(found, before=tuple(rows)):
            print(line(found[-1], COLUMNS), flush=True)
            record.save("attention", {"rows": [*before, *found]}, complete=False)

        rows += bench(name, a.rounds, a.implementations, keep)
    print(table(rows, COLUMNS))
    record.save("attention", {"rows": rows, "cases": {name: CASES[name]._asdict() for name in a.case}})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
