"""Level 1: token log-probs from logits, forward and backward, as a share of the copy bandwidth of the same run.

python -m benchmarks.level1 --N 8192 --V 131072 --dtype bfloat16
"""

import argparse
import sys

import torch

from dpo_fast import logits_token_logps

from .measure import interleaved, random_logits, ratios
from .record import Record, add_arguments, line, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def eager(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def providers() -> dict:
    """Name -> (logits (N, V), labels (N,)) -> log-probs (N,)."""
    return {"ours": logits_token_logps, "eager": eager}


COLUMNS = ["case", "wall_median_ms", "wall_min_ms", "gb_per_s", "share_of_copy", "share_min", "share_max"]


def bench(N: int, V: int, dtype: torch.dtype, rounds: int, keep=lambda result, complete: None) -> dict:
    """The floor is bytes over bandwidth: the forward reads N V once, with the backward it is read twice and written.

    A case and the copy take turns; `keep` gets the result after each case."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, labels = random_logits(N, V, dtype, device)
    leaf = logits.clone().requires_grad_()
    other = torch.empty_like(logits)
    cotangent = torch.ones(N, device=device)

    def forward(function):
        return lambda: function(logits, labels)

    def forward_backward(function):
        return lambda: torch.autograd.grad(function(leaf, labels), leaf, cotangent)

    cases = {}
    for name, function in providers().items():
        cases |= {
            f"{name}, forward": (forward(function), 1),
            f"{name}, forward + backward": (forward_backward(function), 3),
        }
    result = {"N": N, "V": V, "dtype": str(dtype)[6:], "rows": []}
    unit = logits.nbytes / 1e6  # MB over ms is GB/s
    for name, (run, passes) in cases.items():
        timings = interleaved({"copy": lambda: other.copy_(logits), name: run}, rounds)
        copy = timings["copy"].summary()
        if not result["rows"]:
            result["rows"].append({"case": "copy", **copy, "gb_per_s": 2 * unit / copy["wall_median_ms"]})
        summary, share = timings[name].summary(), ratios(timings["copy"], timings[name], "wall_ms")
        row = {"case": name, **summary, "gb_per_s": passes * unit / summary["wall_median_ms"]}
        names = {"median": "share_of_copy", "min": "share_min", "max": "share_max"}
        row |= {names[kind]: value * passes / 2 for kind, value in share.items()}
        result["rows"].append(row)
        keep(result, complete=name == list(cases)[-1])
    return result


def main(argv=None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.level1", description=__doc__.splitlines()[0])
    parser.add_argument("--N", type=int, default=8192 if cuda else 256)
    parser.add_argument("--V", type=int, default=131_072 if cuda else 32_000)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5)
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    record = Record.of("level1", argv, a, parser)

    def keep(result, complete):
        print(line(result["rows"][-1], COLUMNS), flush=True)
        record.save("level1", result, complete=complete)

    print(table(bench(a.N, a.V, DTYPES[a.dtype], a.rounds, keep)["rows"], COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
