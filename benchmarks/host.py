"""What the host does for a batch before the model sees it, beside turning the same token ids into one tensor.

    python -m benchmarks.host                # processor ms of one core; no GPU takes part

Pairs of n tokens: a third each of prompt, chosen, rejected. `shared_prefix_batch` and `padded_batch` take lists, `of
arrays` is what `FastDPOTrainer`'s loader hands over; `packed_rows` takes TRL's padded tensors. The bar is twice the one
tensor.
"""

import argparse
import random
import sys
from collections.abc import Callable

import numpy as np
import torch

from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.layout import make_layout, shared_prefix_batch
from dpo_fast.rows import packed_rows

from .measure import interleaved
from .record import Record, add_arguments, table

ONE_TENSOR, BAR = "one tensor", 2.0
BARRED = ("shared_prefix_batch", "shared_prefix_batch of arrays", "padded_batch", "packed_rows")
SHAPES = ((8, 2048), (8, 3000), (32, 2048))
COLUMNS = ["part", "pairs", "tokens", "processor_median_ms", "processor_min_ms", "to_one_tensor"]


def parts(pairs: int, tokens: int) -> dict[str, Callable[[], object]]:
    rng, third = random.Random(0), tokens // 3
    ids = [[rng.choices(range(30_000), k=k) for k in (tokens - 2 * third, third, third)] for _ in range(pairs)]
    lists = [TokenPair(prompt, chosen, prompt, rejected) for prompt, chosen, rejected in ids]
    of_arrays = [[np.array(x) for x in of_pair] for of_pair in ids]
    arrays = [TokenPair(prompt, chosen, prompt, rejected) for prompt, chosen, rejected in of_arrays]
    flat = [token for of_pair in ids for part in of_pair for token in part]
    lengths = [tuple(map(len, of_pair)) for of_pair in ids]
    padded = padded_batch(lists, 0)
    labels = torch.full((padded.input_ids.numel(),), -100).index_copy(0, padded.predictors + 1, padded.targets)
    rows = padded.input_ids, padded.attention_mask, labels.view_as(padded.input_ids)
    return {
        ONE_TENSOR: lambda: torch.tensor(flat),
        "shared_prefix_batch": lambda: shared_prefix_batch(lists),
        "shared_prefix_batch of arrays": lambda: shared_prefix_batch(arrays),
        "make_layout, of it": lambda: make_layout(lengths),
        "padded_batch": lambda: padded_batch(lists, 0),
        "packed_rows": lambda: packed_rows(*rows),
    }


def bench(pairs: int, tokens: int, rounds: int) -> list[dict]:
    timings = interleaved(parts(pairs, tokens), rounds, warmup=2)
    found = {name: timing.summary() for name, timing in timings.items()}
    one = found[ONE_TENSOR]["processor_median_ms"]
    shape = {"pairs": pairs, "tokens": tokens}
    return [
        {"part": name, **shape, **times, "to_one_tensor": times["processor_median_ms"] / one}
        for name, times in found.items()
    ]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=31)
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    a = parser.parse_args(argv)
    record = Record.of("host", argv, a, parser)
    torch.set_num_threads(1)
    rows = [row for shape in SHAPES for row in bench(*shape, a.rounds)]
    print(table(rows, COLUMNS))
    record.save("host", {"rows": rows})
    above = [row for row in rows if row["part"] in BARRED and row["to_one_tensor"] > BAR]
    print(f"above {BAR:g} times the one tensor: {', '.join(row['part'] for row in above) or 'none'}")
    return bool(above)


if __name__ == "__main__":
    sys.exit(main())
