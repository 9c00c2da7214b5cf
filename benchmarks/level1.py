"""Level 1: token log-probs from logits, forward and backward, as a share of the copy bandwidth of the same run.

python -m benchmarks.level1 --N 8192 --V 131072 --dtype bfloat16
"""

import argparse

import torch

from dpo_fast import logits_token_logps
from dpo_fast.testing import make_logits

from .measure import interleaved, save, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def bench(N: int, V: int, dtype: torch.dtype, rounds: int) -> dict:
    """The floor is bytes over bandwidth: the forward reads N V once, with the backward it is read twice and written."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, labels = make_logits(N, V, dtype=dtype, ignored=0.0, device=device)
    leaf = logits.clone().requires_grad_()
    other = torch.empty_like(logits)
    cotangent = torch.ones(N, device=device)

    def forward():
        logits_token_logps(logits, labels)

    def forward_backward():
        torch.autograd.grad(logits_token_logps(leaf, labels), leaf, cotangent)

    def eager_forward():
        logits.float().log_softmax(-1).gather(1, labels[:, None])

    def eager_forward_backward():
        torch.autograd.grad(leaf.float().log_softmax(-1).gather(1, labels[:, None])[:, 0], leaf, cotangent)

    cases = {
        "copy": (lambda: other.copy_(logits), 2),
        "ours, forward": (forward, 1),
        "ours, forward + backward": (forward_backward, 3),
        "eager, forward": (eager_forward, 1),
        "eager, forward + backward": (eager_forward_backward, 3),
    }
    timings = interleaved({name: run for name, (run, _) in cases.items()}, rounds)
    unit = logits.nbytes / 1e6  # MB over ms is GB/s
    rows = []
    for name, (_, passes) in cases.items():
        summary = timings[name].summary()
        rows.append({"case": name, **summary, "gb_per_s": passes * unit / summary["wall_median_ms"]})
    for row in rows:
        row["share_of_copy"] = row["gb_per_s"] / rows[0]["gb_per_s"]
    return {"N": N, "V": V, "dtype": str(dtype)[6:], "rows": rows}


def main(argv=None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.level1", description=__doc__.splitlines()[0])
    parser.add_argument("--N", type=int, default=8192 if cuda else 256)
    parser.add_argument("--V", type=int, default=131_072 if cuda else 32_000)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16" if cuda else "float32")
    parser.add_argument("--rounds", type=int, default=20 if cuda else 5)
    parser.add_argument("--no-save", action="store_true")
    a = parser.parse_args(argv)
    result = bench(a.N, a.V, DTYPES[a.dtype], a.rounds)
    print(table(result["rows"], ["case", "wall_median_ms", "wall_min_ms", "gb_per_s", "share_of_copy"]))
    if not a.no_save:
        print(f"written to {save('level1', result)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
