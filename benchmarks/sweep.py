"""Block sizes and warps of each kernel, timed: what a table of tuned sizes would be made of. Nothing tunes at run time.

python -m benchmarks.sweep --kernel fwd bwd
"""

import argparse
import ast
import functools
import itertools
import sys

import torch
import triton

from dpo_fast.kernels import token_logps
from dpo_fast.kernels.numerics import Knobs

from .measure import interleaved, random_logits
from .record import Record, add_arguments, device_name, table

# what is swept -> its entry in kernels/tuned.py, and the entry's fields
NAMES = {
    "fwd": ("token_logps_fwd", ("LANES", "num_warps")),
    "bwd": ("token_logps_bwd", ("BLOCK_V", "num_warps")),
}


def forward_candidates():
    for lanes, warps in itertools.product((256, 512, 1024, 2048), (4, 8, 16)):
        yield {"LANES": lanes, "num_warps": warps}


def backward_candidates():
    for block, warps in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16)):
        yield {"BLOCK_V": block, "num_warps": warps}


class LogitsRuns:
    """A kernel over rows of logits."""

    def __init__(self, kernel: str, N: int, V: int, dtype: torch.dtype, device: str):
        self.kernel = kernel
        self.logits, self.labels = random_logits(N, V, dtype, device)
        self.rows, self.d_logits = (1, N, 0, V), torch.empty_like(self.logits)
        self.d_logps = torch.ones(N, device=device)
        self.out = {name: torch.empty(N, device=device) for name in ("logps", "row_max", "log_sum")}
        self.forward()
        candidates = forward_candidates() if kernel == "fwd" else backward_candidates()
        rule = token_logps.forward_config(V, dtype.itemsize) if kernel == "fwd" else token_logps.backward_config(V)
        self.candidates = [rule | candidate for candidate in candidates]
        if kernel == "bwd":  # where it is used most: from the head's fp32 tile to the D that 16-bit GEMMs take
            self.logits = self.logits.float()

    def forward(self) -> None:
        token_logps.token_logps_fwd(self.logits, self.rows, self.labels, self.out, Knobs())

    def run(self, config: dict | None) -> None:
        with replaced("forward_config" if self.kernel == "fwd" else "backward_config", config):
            {"fwd": self.forward, "bwd": self.backward}[self.kernel]()

    def backward(self) -> None:
        saved = (self.labels, self.out["row_max"], self.out["log_sum"], self.d_logps)
        arguments = (self.logits, self.d_logits, self.rows, self.rows, *saved)
        token_logps.token_logps_bwd(*arguments, Knobs())


class replaced:
    """A rule of kernels/token_logps.py answers `config` inside; None leaves it as it is."""

    def __init__(self, rule: str, config: dict | None):
        self.rule, self.config, self.original = rule, config, getattr(token_logps, rule)

    def __enter__(self):
        if self.config is not None:
            setattr(token_logps, self.rule, lambda *_, **__: dict(self.config))

    def __exit__(self, *_):
        setattr(token_logps, self.rule, self.original)


def sweep(kernel: str, N: int, V: int, dtype: torch.dtype, rounds: int) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = LogitsRuns(kernel, N, V, dtype, device)
    cases = {}
    for label, config in {"rule": None, **{str(c): c for c in runs.candidates}}.items():
        run = functools.partial(runs.run, config)
        try:
            run()
        except (triton.OutOfResources, ValueError) as reason:
            print(f"{kernel} {label}: left out, {type(reason).__name__}")
            continue
        cases[label] = run
    timings = interleaved(cases, rounds)
    rows = [{"kernel": kernel, "config": label, **timing.summary()} for label, timing in timings.items()]
    return sorted(rows, key=lambda row: row["wall_median_ms"])


def entries(rows: list[dict]) -> dict:
    """The fastest candidate of each kernel that is 3 % faster than its rule, as kernels/tuned.py has it."""
    found = {"device": f"{device_name()}, torch {torch.__version__}, triton {triton.__version__}"}
    for kernel, (name, fields) in NAMES.items():
        times = {row["config"]: row["wall_median_ms"] for row in rows if row["kernel"] == kernel}
        best = min(times, key=times.get, default="rule")
        if best != "rule" and times[best] < 0.97 * times["rule"]:
            config = ast.literal_eval(best)
            found[name] = tuple(config[field] for field in fields)
    return found


def main(argv=None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--N", type=int, default=4096 if cuda else 2)
    parser.add_argument("--V", type=int, default=131_072 if cuda else 512)
    parser.add_argument("--rounds", type=int, default=10 if cuda else 1)
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    record = Record.of("sweep", argv, a, parser)
    dtype, rows = torch.bfloat16 if cuda else torch.float32, []
    for kernel in a.kernel:
        found = sweep(kernel, a.N, a.V, dtype, a.rounds)
        print(table(found, ["kernel", "config", "wall_median_ms", "wall_min_ms"]))
        print("for kernels/tuned.py, where it beats the rule:", entries(found), flush=True)
        rows += found
        result = {"N": a.N, "V": a.V, "entries": entries(rows), "rows": rows}
        record.save("sweep", result, complete=kernel == a.kernel[-1])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
