"""Random calls of every public op against fp64: `python tests/fuzz.py`, or `make fuzz`.

One line per op and mode: the cases, and how many were outside of the error budget, raised where they should not, or did
not where they should. Exit status 1 for any; hypothesis then prints the smallest case that it finds, whose `check` is
the reproducer. `--seed` makes the same cases again.
"""

import argparse
import os
import random
import sys
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))
if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which the modules below may do

import torch
from fuzz_heads import Head, Hooked
from fuzz_inputs import MODES
from fuzz_logits import Logits, Sums
from fuzz_losses import Losses, Preference
from fuzz_rows import BatchLogits, Rows
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import UnsatisfiedAssumption

OPS = {
    "logits_token_logps": Logits,
    "logits_token_stats": Logits,
    "linear_token_logps": Head,
    "linear_token_stats": Head,
    "linear_preference_loss": Preference,
    "sequence_logps": Sums,
    "preference_loss": Losses,
    "attach": Hooked,
    "get_batch_logps": BatchLogits,
    "completion_logps": Rows,
}
COUNTS = {"eager": 2000, "interpreter": 200, "compiled": 20}


def modes_of(op: str) -> list[str]:
    if op == "completion_logps":  # fp64 models, which no kernel takes; the host reads each batch
        return ["eager"]
    return [mode for mode in MODES if not (op == "preference_loss" and mode == "interpreter")]  # it has no kernel


def options(count: int, **more) -> settings:
    return settings(
        max_examples=count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        **more,
    )


def count_failures(op: str, mode: str, count: int, number: int) -> tuple[int, list[str]]:
    """-> cases, and what those said that failed, each on its own."""
    ran, failed = 0, []

    @seed(number)
    @options(count)
    @given(OPS[op].drawn(op, mode))
    def run(case):
        nonlocal ran
        try:
            case.check(mode)
        except UnsatisfiedAssumption:
            raise
        except Exception:  # whatever it is, a legal call has not given what it should
            failed.append(f"{traceback.format_exc()}{case}")
        ran += 1

    run()
    return ran, failed


def show_smallest(op: str, mode: str, count: int, number: int, first: str) -> None:
    @seed(number)
    @options(count, print_blob=True, report_multiple_bugs=False)
    @given(OPS[op].drawn(op, mode))
    def check(case):
        case.check(mode)

    try:
        check()
    except Exception:
        traceback.print_exc(file=sys.stdout)
    else:
        print(f"not seen again; the first was\n{first}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--counts", nargs="+", type=int, help="cases of each mode")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")  # of create_graph=True, and numpy's under the interpreter
    counts = COUNTS if chosen.counts is None else dict(zip(chosen.modes, chosen.counts, strict=True))

    print(f"seed {chosen.seed}")
    start, outside, broken = time.perf_counter(), 0, []
    for mode in chosen.modes:
        for op in chosen.ops:
            if mode not in modes_of(op):
                continue
            began = time.perf_counter()
            ran, failed = count_failures(op, mode, counts[mode], chosen.seed)
            took = time.perf_counter() - began
            print(f"{op:<24}{mode:<13}{ran:>5} cases {len(failed):>5} outside the budget {took:>6.0f} s", flush=True)
            outside += len(failed)
            broken += [(op, mode, failed[0])] if failed else []
    for op, mode, first in broken:
        print(f"\n--- {op}, {mode}: python tests/fuzz.py --seed {chosen.seed} --ops {op} --modes {mode}")
        show_smallest(op, mode, counts[mode], chosen.seed, first)
    print(f"{outside} outside the budget; {(time.perf_counter() - start) / 60:.1f} minutes")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
