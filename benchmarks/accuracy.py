"""Accuracy in bf16: token log-probs and sequence sums against fp64, ours and TRL's on the same tensors.

python -m benchmarks.accuracy --N 2000 --H 512 --V 32000
"""

import argparse
import sys

import torch

from dpo_fast import linear_token_logps, sequence_logps

from .head_gate import truth_of
from .head_providers import Problem, trl
from .record import Record, add_arguments, table


def measure(N: int, H: int, V: int) -> dict:
    """One sequence of N tokens; errors in nats."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    p = Problem.make(N, 1, H, V, torch.bfloat16, None, device)
    truth = truth_of(p)
    one = torch.zeros(len(truth), dtype=torch.int64, device=device)
    candidates = {"ours": linear_token_logps(p.hidden, p.weight, p.labels)}
    try:
        candidates["trl-1.16"] = trl(p, p.hidden, p.weight)
    except ImportError as reason:
        print(f"trl-1.16: left out, {reason}")
    rows = []
    for name, logps in candidates.items():
        error = (logps.double() - truth).abs()
        total = sequence_logps(logps, one, 1).double() - truth.sum()
        rows.append(
            {
                "provider": name,
                "token_rms_error": error.square().mean().sqrt().item(),
                "token_max_error": error.max().item(),
                "sequence_error": total.abs().item(),
            }
        )
    return {"N": N, "H": H, "V": V, "dtype": "bfloat16", "rows": rows}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.accuracy", description=__doc__.splitlines()[0])
    for name, default in (("N", 2000), ("H", 512), ("V", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    record = Record.of("accuracy", argv, a, parser)
    result = measure(a.N, a.H, a.V)
    print(table(result["rows"], ["provider", "token_rms_error", "token_max_error", "sequence_error"]))
    record.save("accuracy", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
