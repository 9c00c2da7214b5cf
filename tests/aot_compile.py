"""Compile every kernel for GPUs that are not here and print what the machine code uses, as JSON lines.

Runs as a script of its own: the interpreter, which the tests need, replaces the compiler for a whole process.
    python tests/aot_compile.py cuda:90 hip:gfx942

What is counted is counted in the part that each logit passes (machine_code.py).
"""

import json
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import machine_code
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpo_fast.kernels import sequence_sum, token_logps

SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
STATS = ("ENTROPY", "MEAN_LOGITS", "IS_TOP1", "LOG_SUM_SQ_PROBS")


def case(
    name,
    kernel,
    pointers,
    constexprs,
    columns,
    element,
    *,
    written=0,
    integers=(),
    floats=(),
    ones=(),
    divisible=(),
    loads=True,
    **options,
):
    """How a launch would specialise `kernel`. A program takes `columns` logits at a time, of `element` bytes, and
    writes `written` bytes for each. Pointers are 16-byte aligned; `ones` are arguments equal to 1 (contiguous rows),
    `divisible` integer arguments that are multiples of 16."""
    kinds = {**pointers, **{n: "i32" for n in integers}, **{n: "fp32" for n in floats}}
    constants = {**constexprs, **{n: 1 for n in ones}}
    signature = {n: "constexpr" if n in constants else kinds[n] for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if n in pointers or n in divisible]
    return dict(
        name=name,
        source=(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        options=options,
        columns=columns,
        element=element,
        written=written,
        wide_loads=loads,
    )


def label_of(dtype: str, V: int, softcap: bool, negative: bool, stats: bool = False) -> str:
    return f"{dtype} V={V}{' softcap' * softcap}{' negative' * negative}{' stats' * stats}"


def level_1_knobs(V: int, tile: bool) -> dict:
    """How arguments specialise, of level 1 or of the head's tile, whose rows are always aligned. A vocabulary that is a
    multiple of 16 is read and written without masks."""
    strides = ("stride_outer", "stride_inner", "d_stride_outer", "d_stride_inner")
    return dict(
        integers=("V", "inner", "ignore_index", "lowest", *strides),
        floats=("factor", "factor_rest", "slope", "slope_log2", "derivative"),
        divisible=(("V", *strides) if V % 16 == 0 else strides if tile else ()) + (() if tile else ("lowest",)),
    )


ROWS = {n: "*fp32" for n in ("logps_ptr", "row_max_ptr", "log_sum_ptr", "entropy_ptr", "mean_logits_ptr")}
ROWS |= {"is_top1_ptr": "*fp32", "log_sum_sq_probs_ptr": "*fp32", "d_logps_ptr": "*fp32", "labels_ptr": "*i64"}


def forward(target, dtype, *, softcap=False, stats=False, negative=False, V=128_256, tile=False):
    """Of logits, or of the head's fp32 tile."""
    config = token_logps.forward_config(V, SIZES[dtype], tile or V % 16 == 0, target)
    yield case(
        f"token_logps_fwd {label_of(dtype + ' tile' * tile, V, softcap, negative, stats)}",
        token_logps.token_logps_fwd_kernel,
        {"logits_ptr": f"*{dtype}", **ROWS},
        {"HAS_SOFTCAP": softcap, "NEGATIVE": negative, **dict.fromkeys(STATS, stats)}
        | {n: value for n, value in config.items() if n.isupper()},
        config["LANES"] * config["WIDTH"],
        SIZES[dtype],
        ones=("stride_v",),
        loads=config["ADJACENT"],
        num_warps=config["num_warps"],
        **level_1_knobs(V, tile),
    )


def backward(target, dtype, d_dtype, *, softcap=False, negative=False, V=128_256):
    """Of logits in the dtype of their gradient, or of the head's fp32 tile, whose rows are always aligned."""
    config = token_logps.backward_config(V, target)
    tile = dtype != d_dtype
    yield case(
        f"token_logps_bwd {label_of(f'{dtype} to {d_dtype}' if tile else dtype, V, softcap, negative)}",
        token_logps.token_logps_bwd_kernel,
        {"logits_ptr": f"*{dtype}", "d_logits_ptr": f"*{d_dtype}", **ROWS},
        {"HAS_SOFTCAP": softcap, "NEGATIVE": negative} | {n: value for n, value in config.items() if n.isupper()},
        config["BLOCK_V"],
        SIZES[dtype],
        written=SIZES[d_dtype],
        ones=("stride_v", "d_stride_v"),
        loads=V % 16 == 0,
        num_warps=config["num_warps"],
        **level_1_knobs(V, tile),
    )


def cases(target: str):
    for softcap in (False, True):
        for V in (128_256, 50_257):  # GPT-2's: rows of logits are not aligned
            for dtype in ("bf16", "fp32"):
                yield from forward(target, dtype, softcap=softcap, V=V)
                yield from backward(target, dtype, dtype, softcap=softcap, V=V)
            for dtype in ("bf16", "fp16"):
                yield from backward(target, "fp32", dtype, softcap=softcap, V=V)
        for dtype in ("bf16", "fp32"):
            yield from forward(target, dtype, softcap=softcap, stats=True)
    yield from forward(target, "fp32", V=50_257, tile=True)
    yield from forward(target, "bf16", V=50_257, softcap=True, stats=True)
    yield from forward(target, "fp16")
    yield from backward(target, "fp16", "fp16")
    yield from forward(target, "bf16", negative=True)
    yield from backward(target, "bf16", "bf16", negative=True)
    yield case(
        "sequence_sum",
        sequence_sum.sequence_sum_kernel,
        {"values_ptr": "*fp32", "ids_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": "*fp32"},
        {"WEIGHTED": True, "BLOCK_N": 1024},
        1024,
        16,  # an id, a value and a weight
        integers=("N",),
        loads=False,
        num_warps=4,
    )


def cuobjdump(cubin: bytes, option: str) -> str:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def report(target: str, item: dict) -> dict:
    backend, arch = target.split(":")
    gpu = GPUTarget("hip", arch, 64) if backend == "hip" else GPUTarget("cuda", int(arch), 32)
    kernel = triton.compile(ASTSource(*item["source"]), target=gpu, options=item["options"])
    threads = gpu.warp_size * item["options"]["num_warps"]
    found = {"target": target, "kernel": item["name"], "threads": threads}
    share = item["columns"] // threads, item["element"]
    found |= {"bytes": item["element"] + item["written"], "shared": kernel.metadata.shared}
    found["wide_loads_expected"] = item["wide_loads"]
    if backend == "hip":
        assembly = kernel.asm["amdgcn"]
        counts = {k: int(v) for k, v in re.findall(r"\.(\w*(?:spill_count|vgpr_count)):\s+(\d+)", assembly)}
        found |= {"registers": counts["vgpr_count"], "spills": counts["vgpr_spill_count"] + counts["sgpr_spill_count"]}
        return found | machine_code.AMD.figures(assembly, *share)
    usage = cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups())
    sass = cuobjdump(kernel.asm["cubin"], "--dump-sass")
    spills = stack + local + len(re.findall(r"\b(?:LDL|STL)\b", sass))
    return found | {"registers": registers, "spills": spills} | machine_code.NVIDIA.figures(sass, *share)


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for item in cases(target):
            print(json.dumps(report(target, item)), flush=True)
