"""What `gpu.py` runs, in order of worth: of each part the time and memory that it needs, of each stage what it decides.

Seconds and GiB are predictions for an H200, models built and kernels compiled included. A part may take twice its
seconds before it is stopped. It has the name of its result file.
"""

from typing import NamedTuple

from .provenance import ROOT

# By name, so that pytest imports no other: most need packages that a machine with a GPU may lack
GPU_TESTS = tuple(
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
    if "pytest.mark.gpu" in path.read_text(encoding="utf-8")
)


class Part(NamedTuple):
    name: str
    words: tuple[str, ...]  # after `python`
    dry: tuple[str, ...]  # the same at a tiny size on a CPU; empty where another part's is the same
    seconds: int
    gib: float = 2.0  # of the provider that takes most
    needs: tuple[str, ...] = ()  # bf16, sanitizer, or packages
    under: tuple[str, ...] = ()  # what `python` runs under
    saves: bool = True  # its result by itself


class Stage(NamedTuple):
    name: str
    decides: str
    parts: tuple[Part, ...]


def _pytest(*words: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", *words, *GPU_TESTS)


_SELFTEST = ("-c", "import sys; from dpo_fast.selftest import main; sys.exit(main([]))")


def _sanitizer(tool: str, dry: tuple[str, ...] = ()) -> Part:
    under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "3")
    return Part(tool, _SELFTEST, dry, 60, needs=("sanitizer",), under=under, saves=False)


def _steps(name: str, options: str, seconds: int, gib: float, *needs: str, dry: tuple[str, ...] = ()) -> Part:
    module, name = ("-m", "benchmarks.train_step"), f"train-step-{name}"
    words = (*module, *options.split(), "--steps", "8", "--warmup", "3", "--profile", "2", "--name", name)
    dry = (*module, *dry, "--name", name) if dry else ()
    return Part(name, words, dry, seconds, gib, ("datasets", "bf16", *needs))


def _head(shape: str, seconds: int, gib: float, dry: tuple[str, ...] = ()) -> Part:
    words = ("-m", "benchmarks.head", "--shape", shape, "--tile-mib", "256", "1024", "2048", "--rounds", "5")
    return Part(f"head-{shape}", words, dry, seconds, gib, ("bf16",))


_TINY = ("--shape", "cpu-tiny", "--rounds", "1", "--only", "ours", "ours-fused", "eager")


def _gemm(H: int, V: int, dry: tuple[str, ...] = ()) -> Part:
    words = ("-m", "benchmarks.gemm", "--H", str(H), "--V", str(V), "--rounds", "5")
    return Part(f"gemm-H{H}-V{V}", words, dry, 15, 12, ("bf16",))


STAGES = (
    Stage(
        "tests",
        "whether anything below counts",
        (
            Part("tests", _pytest("-v", "--tb=short"), _pytest("-qq", "--collect-only"), 90, saves=False),
            _sanitizer("memcheck", _SELFTEST),
            _sanitizer("racecheck"),
        ),
    ),
    # 8B with all weights: AdamW's two states beside weights, gradients and a reference are 80 GB in bf16, 160 in fp32.
    # SGD has no state; AdamW's pass is then missing from all trainers alike
    Stage(
        "train_step",
        "the README's factor on a GPU, which of sharing, packing and the head it comes from, and what is idle",
        (
            _steps("1b-chat-full", "--shape 1b", 130, 64, dry=("--smoke", "--profile", "1")),
            _steps("1b-chat-full-factors", "--shape 1b --factors", 120, 64, dry=("--smoke", "--factors")),
            _steps("1b-long-full", "--shape 1b --mix long --pairs 4", 130, 64),
            _steps("1b-chat-full-in-turns", "--shape 1b --together", 140, 125),
            _steps("8b-chat-lora", "--shape 8b --mode lora --checkpointing", 260, 60, "peft"),
            _steps("1b-chat-lora", "--shape 1b --mode lora", 110, 60, "peft"),
            _steps("8b-chat-full-sgd", "--shape 8b --optim sgd --checkpointing", 330, 72),
            _steps("8b-long-lora", "--shape 8b --mode lora --mix long --pairs 4 --checkpointing", 260, 60, "peft"),
            _steps("1b-chat-full-16-pairs", "--shape 1b --pairs 16 --checkpointing", 130, 60),
            _steps("1b-chat-full-autocast", "--shape 1b --autocast", 140, 76),
        ),
    ),
    Stage(
        "attention",
        "the order of choice in dpo_fast/attention.py; whether block masks are small",
        (Part("attention", ("-m", "benchmarks.attention"), ("-m", "benchmarks.attention"), 60, 24, ("bf16",)),),
    ),
    Stage(
        "head",
        "rows of a tile, `pending` or `recompute` (dpo_fast/ops/plan.py); whether three plain GEMMs stay the plan",
        (
            _head("bar", 60, 40, dry=("-m", "benchmarks.head", *_TINY)),
            _head("llama3-1b-chat", 40, 20),
            _head("llama3-1b-few", 30, 20),
            _head("llama3-8b", 60, 40),
            _head("qwen3-0.6b-chat", 40, 20),
            _head("gemma2-2b-chat", 50, 32),
        ),
    ),
    Stage(
        "gemm",
        "the rates behind all predictions: rows of a tile (plan.py), fp32 results of 16-bit operands (gemm.py)",
        (_gemm(4096, 131_072, ("-m", "benchmarks.gemm")), _gemm(2048, 128_256)),
    ),
    Stage(
        "level1",
        "whether the loops of kernels/token_logps.py wait for memory or for instructions",
        (
            Part(
                "level1",
                ("-m", "benchmarks.level1"),
                ("-m", "benchmarks.level1", "--N", "16", "--V", "500", "--rounds", "1"),
                30,
                16,
                ("bf16",),
            ),
        ),
    ),
    Stage(
        "sweep",
        "entries of kernels/tuned.py",
        (
            Part(
                "sweep",
                ("-m", "benchmarks.sweep", "--rounds", "5"),
                ("-m", "benchmarks.sweep", "--kernel", "fwd", "--rounds", "1"),
                90,
                12,
                ("bf16",),
            ),
        ),
    ),
)
