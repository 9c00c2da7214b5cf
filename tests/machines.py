"""The numerical tests as other machines would run them: `python tests/machines.py`, or `make test-machines`.

One line per instruction set, number of threads and seed; exit status 1 and their names where a variant fails. Each
library has a switch of its own: ATen's kernels, oneDNN's and MKL's products, and for Triton's interpreter numpy and
its OpenBLAS. What a CPU lacks is said to be so, never counted as passed.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).parent
SEEDED = """
    repo/test_testing ops/test_logits ops/test_linear ops/test_sequence test_preference
""".split()
# Their inputs do not depend on the seed: once is enough
FIXED = """
    kernels/test_emulated_cuda kernels/test_tuned test_losses test_objective test_attention test_functional test_forward
    training/test_models
""".split()
# Nothing that they compare is a number of this machine's, or they compile for most of their time
NOT_NUMERICAL = "bad_input or bad_calls or opcheck or compile or flops or refused or cover_the_vocabulary or checking"
# The interpreter, which takes most of the time, is of one thread: with more seeds and threads its budgets will do
FEW_KERNELS = "(budget or not triton)"

ISAS = ("default", "avx2", "avx512")
# What each switch calls them. MKL_ENABLE_INSTRUCTIONS has no effect on AMD, where MKL_CBWR has
SWITCHES = {
    "ATEN_CPU_CAPABILITY": ISAS,
    "ONEDNN_MAX_CPU_ISA": ("SSE41", "AVX2", "AVX512_CORE"),
    "MKL_ENABLE_INSTRUCTIONS": ("SSE4_2", "AVX2", "AVX512"),
    "MKL_CBWR": ("COMPATIBLE", "AVX2", "AVX512"),
    "OPENBLAS_CORETYPE": ("Prescott", "Haswell", "SkylakeX"),
    "NPY_DISABLE_CPU_FEATURES": ("X86_V3 X86_V4 AVX512_ICL AVX512_SPR", "X86_V4 AVX512_ICL AVX512_SPR", ""),
}
PROBE = """
import torch
NAMES = ("X86_V4", "X86_V3", "X86_V2")
try:
    from numpy._core._multiarray_umath import __cpu_features__ as features
except ImportError:
    from numpy.core._multiarray_umath import __cpu_features__ as features
if "X86_V3" not in features:  # numpy before 2.4
    NAMES = ("AVX512F", "AVX2", "SSE41")
print(torch.backends.cpu.get_cpu_capability(), next((n for n in NAMES if features.get(n)), "?"))
"""


def environment(isa: str, threads: int = 1, seed: int = 0) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in SWITCHES and not k.startswith("DPO_FAST_")}
    env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    env |= {"DPO_FAST_TEST_SEED": str(seed), "TOKENIZERS_PARALLELISM": "false"}
    if isa != "as it is":
        env |= {switch: names[ISAS.index(isa)] for switch, names in SWITCHES.items()}
    return env


def probe(isa: str) -> tuple[str, str]:
    """What ATen and numpy say is in force."""
    command = [sys.executable, "-c", PROBE]
    found = subprocess.run(command, env=environment(isa), capture_output=True, text=True, check=True)
    aten, numpy = found.stdout.split()
    return aten.lower(), numpy


def run(isa: str, threads: int, seed: int, arguments: list[str]) -> tuple[bool, str]:
    files = [str(TESTS / f"{name}.py") for name in SEEDED + (FIXED if seed == 0 else [])]
    chosen = f"not ({NOT_NUMERICAL})" + ("" if (threads, seed) == (1, 0) else f" and {FEW_KERNELS}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    start = time.perf_counter()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    done = subprocess.run(
        [*command, *arguments, *files], env=environment(isa, threads, seed), cwd=TESTS.parent, **pipes
    )
    lines = done.stdout.strip().splitlines() or ["no output"]
    failed = [line for line in lines if re.match("(FAILED|ERROR) ", line)]
    said = f"{lines[-1]} [{time.perf_counter() - start:.0f} s]"
    return done.returncode == 0, "\n".join([said, *(f"    {line}" for line in failed)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--isa", nargs="+", default=[*ISAS], choices=[*ISAS, "as it is"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    chosen, arguments = parser.parse_known_args()  # the rest goes to pytest

    best, _ = probe("as it is")
    order = ISAS if best in ISAS else ("default",)
    jobs, absent = [], []
    for isa in chosen.isa:
        if isa in ISAS and (isa not in order or ISAS.index(isa) > ISAS.index(best if best in ISAS else "default")):
            absent.append(isa)
            print(f"{isa:<9} not on this CPU, whose best is {best}", flush=True)
            continue
        aten, numpy = probe(isa)
        if isa in ISAS and aten != isa:
            print(f"{isa:<9} asked for, but ATen runs {aten}")
            return 1
        jobs += [(isa, t, s, f"{isa:<9} ATen {aten}, numpy {numpy}") for t in chosen.threads for s in chosen.seeds]

    broken = []
    for threads, group in itertools.groupby(sorted(jobs, key=lambda job: job[1]), key=lambda job: job[1]):
        group = list(group)
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // threads)) as pool:
            results = pool.map(lambda job: run(*job[:3], arguments), group)
            for (isa, _, seed, label), (passed, said) in zip(group, results, strict=True):
                print(f"{label}, threads {threads}, seed {seed}: {'pass' if passed else 'FAIL'}, {said}", flush=True)
                if not passed:
                    broken.append(f"{isa}/{threads} threads/seed {seed}")
    ran = f"{len(jobs) - len(broken)} of {len(jobs)} variants pass"
    print(ran + (f"; not on this CPU: {', '.join(absent)}" if absent else ""))
    if broken:
        print("failed: " + "; ".join(broken))
    return 1 if broken or not jobs else 0


if __name__ == "__main__":
    sys.exit(main())
