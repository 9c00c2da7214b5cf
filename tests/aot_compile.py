"""Compile every kernel for GPUs that are not here and print what the machine code uses, as JSON lines.

Runs as a script of its own: the interpreter, which the tests need, replaces the compiler for a whole process.
    python tests/aot_compile.py cuda:90 hip:gfx942
"""

import json
import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dpo_fast.kernels import sequence_sum, token_logps

STATS = ("ENTROPY", "MEAN_LOGITS", "IS_TOP1", "LOG_SUM_SQ_PROBS")


def case(
    name,
    kernel,
    pointers,
    constexprs,
    *,
    integers=(),
    floats=(),
    ones=(),
    divisible=(),
    loads=True,
    **options,
):
    """How a launch would specialise `kernel`. Pointers are 16-byte aligned; `ones` are arguments equal to 1 (contiguous
    rows), `divisible` integer arguments that are multiples of 16."""
    kinds = {**pointers, **{n: "i32" for n in integers}, **{n: "fp32" for n in floats}}
    constants = {**constexprs, **{n: 1 for n in ones}}
    signature = {n: "constexpr" if n in constants else kinds[n] for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if n in pointers or n in divisible]
    return dict(
        name=name,
        source=(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned}),
        options=options,
        wide_loads=loads,
    )


def label_of(dtype: str, V: int, softcap: bool, stats: bool = False) -> str:
    return f"{dtype} V={V}{' softcap' if softcap else ''}{' stats' if stats else ''}"


def level_1_knobs(V: int, tile: bool) -> dict:
    """How arguments specialise, of level 1 or of the head's tile, whose rows are always aligned. A vocabulary that is a
    multiple of 16 is read and written without masks."""
    strides = ("stride_outer", "stride_inner", "d_stride_outer", "d_stride_inner")
    return dict(
        integers=("V", "inner", "ignore_index", "lowest", *strides),
        floats=("logit_scale", "softcap", "inv_temperature"),
        divisible=(("V", *strides) if V % 16 == 0 else strides if tile else ()) + (() if tile else ("lowest",)),
        loads=V % 16 == 0,
    )


ROWS = {n: "*fp32" for n in ("logps_ptr", "row_max_ptr", "log_sum_ptr", "entropy_ptr", "mean_logits_ptr")}
ROWS |= {"is_top1_ptr": "*fp32", "log_sum_sq_probs_ptr": "*fp32", "d_logps_ptr": "*fp32", "labels_ptr": "*i64"}


def forward(target: str, dtype: str, size: int, softcap: bool, stats: bool, V: int = 128_256):
    config = token_logps.forward_config(V, size, target)
    yield case(
        f"token_logps_fwd {label_of(dtype, V, softcap, stats)}",
        token_logps.token_logps_fwd_kernel,
        {"logits_ptr": f"*{dtype}", **ROWS},
        {"HAS_SOFTCAP": softcap, **dict.fromkeys(STATS, stats), "LANES": config["LANES"], "WIDTH": config["WIDTH"]},
        ones=("stride_v",),
        num_warps=config["num_warps"],
        **level_1_knobs(V, tile=False),
    )


def backward(target: str, dtype: str, d_dtype: str, softcap: bool, V: int = 128_256):
    """Of logits in the dtype of their gradient, or of the head's fp32 tile, whose rows are always aligned."""
    config = token_logps.backward_config(V, target)
    tile = dtype != d_dtype
    yield case(
        f"token_logps_bwd {label_of(f'{dtype} to {d_dtype}' if tile else dtype, V, softcap)}",
        token_logps.token_logps_bwd_kernel,
        {"logits_ptr": f"*{dtype}", "d_logits_ptr": f"*{d_dtype}", **ROWS},
        {"HAS_SOFTCAP": softcap, "BLOCK_V": config["BLOCK_V"]},
        ones=("stride_v", "d_stride_v"),
        num_warps=config["num_warps"],
        **level_1_knobs(V, tile),
    )


def cases(target: str):
    for dtype, size in (("bf16", 2), ("fp32", 4)):
        for softcap in (False, True):
            for V in (128_256, 50_257):  # GPT-2's: rows are not aligned
                yield from forward(target, dtype, size, softcap, stats=False, V=V)
                yield from backward(target, dtype, dtype, softcap, V=V)
            yield from forward(target, dtype, size, softcap, stats=True)
    yield from forward(target, "bf16", 2, True, stats=True, V=50_257)
    yield from forward(target, "fp16", 2, False, stats=False)
    yield from backward(target, "fp16", "fp16", False)
    for dtype in ("bf16", "fp16"):
        for softcap in (False, True):
            for V in (128_256, 50_257):
                yield from backward(target, "fp32", dtype, softcap, V=V)
    yield case(
        "sequence_sum",
        sequence_sum.sequence_sum_kernel,
        {"values_ptr": "*fp32", "ids_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": "*fp32"},
        {"WEIGHTED": True, "BLOCK_N": 1024},
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
    found = {"target": target, "kernel": item["name"], "shared": kernel.metadata.shared}
    found |= {"wide_loads_expected": item["wide_loads"]}
    if backend == "hip":
        assembly = kernel.asm["amdgcn"]
        counts = {k: int(v) for k, v in re.findall(r"\.(\w*(?:spill_count|vgpr_count)):\s+(\d+)", assembly)}
        found |= {"registers": counts["vgpr_count"], "spills": counts["vgpr_spill_count"] + counts["sgpr_spill_count"]}
        found["wide_loads"] = len(re.findall(r"(?:global|buffer)_load_dwordx4", assembly))
    else:
        usage = cuobjdump(kernel.asm["cubin"], "--dump-resource-usage")
        registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", usage).groups())
        sass = cuobjdump(kernel.asm["cubin"], "--dump-sass")
        spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
        found |= {"registers": registers, "stack": stack, "local": local, "spills": spills}
        found["wide_loads"] = len(re.findall(r"\b(?:LDG|LDGSTS)\.E\.(?:\w+\.)*128", sass))
    return found


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for item in cases(target):
            print(json.dumps(report(target, item)), flush=True)
