"""The three matrix products of the head by themselves: how fast with how many rows, and what an fp32 result costs.

    python -m benchmarks.gemm --H 4096 --V 131072

With n rows of a tile: logits (n, H) x (H, V); d_hidden (n, V) x (V, H); d_weight (V, n) x (n, H), added to what is
there. Operands are 16-bit; the result is in their dtype or, on a GPU, in fp32 (as the head has logits and d_weight).
First a copy of the weight's size, V rows of H in fp32: what the device's memory can do.
"""

import argparse
import sys

import torch

from .measure import interleaved
from .record import Record, add_arguments, line, table

COLUMNS = ["role", "rows", "result", "wall_median_ms", "wall_min_ms", "tflops", "gb_per_s"]
ROLES = ("logits", "d_hidden", "d_weight")


def product(role: str, n: int, H: int, V: int, operands: torch.dtype, result: torch.dtype, device: str):
    """A callable that multiplies into a matrix that exists."""
    shapes = {"logits": ((n, H), (V, H)), "d_hidden": ((n, V), (V, H)), "d_weight": ((n, V), (n, H))}[role]
    a, b = (torch.randn(shape, device=device).to(operands) for shape in shapes)
    a, b = {"logits": (a, b.T), "d_hidden": (a, b), "d_weight": (a.T, b)}[role]
    out = torch.zeros(a.shape[0], b.shape[1], dtype=result, device=device)
    wide = {} if result == operands else {"out_dtype": result}
    if role == "d_weight":
        return lambda: torch.addmm(out, a, b, out=out, **wide)
    return lambda: torch.mm(a, b, out=out, **wide)


def copied(H: int, V: int, rounds: int, device: str) -> dict:
    """The row of a copy: each byte is read and written."""
    a, b = (torch.zeros(V, H, device=device) for _ in range(2))
    summary = interleaved({"copy": lambda: b.copy_(a)}, rounds, warmup=2)["copy"].summary()
    rate = 2 * a.nbytes / summary["wall_median_ms"] / 1e6
    return {"role": "copy", "rows": V, "result": "float32", **summary, "gb_per_s": rate}


def bench(H: int, V: int, rows: list[int], rounds: int, keep=lambda result: None) -> dict:
    """`keep` gets the result so far after each line. An fp32 result of 16-bit operands needs a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operands = torch.bfloat16
    result = {"H": H, "V": V, "operands": str(operands)[6:], "rows": [copied(H, V, rounds, device)]}
    keep(result)
    for role in ROLES:
        for n in rows:
            for dtype in (torch.float32, operands) if device == "cuda" else (operands,):
                run = product(role, n, H, V, operands, dtype, device)
                summary = interleaved({role: run}, rounds, warmup=2)[role].summary()
                rate = 2 * n * H * V / summary["wall_median_ms"] / 1e9
                result["rows"].append({"role": role, "rows": n, "result": str(dtype)[6:], **summary, "tflops": rate})
                keep(result)
    return result


def main(argv=None) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="benchmarks.gemm", description=__doc__.splitlines()[0])
    parser.add_argument("--H", type=int, default=4096 if cuda else 64)
    parser.add_argument("--V", type=int, default=131_072 if cuda else 512)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 1024, 2048, 4096] if cuda else [16, 32])
    parser.add_argument("--rounds", type=int, default=10 if cuda else 1)
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    record = Record.of("gemm", argv, a, parser)
    name = f"gemm-H{a.H}-V{a.V}"

    def keep(result):
        print(line(result["rows"][-1], COLUMNS), flush=True)
        record.save(name, result, complete=False)

    result = bench(a.H, a.V, a.rows, a.rounds, keep)
    print(table(result["rows"], COLUMNS))
    record.save(name, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
