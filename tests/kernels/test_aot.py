"""Every kernel compiles for GPUs that are not here, without a spill, and reads 16 bytes at a time where it can; what
its machine code uses is no more than benchmarks/static.json holds."""

import functools
import json
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
from machine_code import AMD, NVIDIA

from benchmarks import static

KERNELS = Path(__file__).parents[2] / "kernels"


def kernel_names() -> set[str]:
    defined = [line.split("(")[0] for file in KERNELS.glob("*.py") for line in file.read_text().splitlines()]
    return {n.removeprefix("def ").removesuffix("_kernel") for n in defined if n.startswith("def ") and "_kernel" in n}


# KiB of shared memory that one block of threads can have
SHARED_KIB = {"cuda:80": 163, "cuda:90": 227, "cuda:100": 227, "cuda:120": 99, "hip:gfx942": 64}


@functools.cache
def compiled(target: str) -> list[dict]:
    try:
        return static.counted(target)
    except subprocess.CalledProcessError as failed:
        if "ROCm linker" in failed.stderr:
            pytest.skip("this Triton comes without a linker for ROCm (3.4 does)")
        raise AssertionError(failed.stderr[-3000:]) from None


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_KIB)
def test_compiled_kernels(target):
    reports = compiled(target)
    assert kernel_names() == {report["kernel"].split()[0] for report in reports}
    spilled = [r for r in reports if r["spills"]]
    assert not spilled, spilled
    narrow = [r for r in reports if r["wide_loads_expected"] and r["load_bytes"] != 16]
    assert not narrow, narrow
    too_large = [r for r in reports if r["shared"] > SHARED_KIB[target] * 1024]
    assert not too_large, too_large
    # What is written over what it is made of: no thread hands anything to another, so the one that stores a derivative
    # has loaded its logit itself, and a value that depends on a load is stored after it
    backward = [r for r in reports if r["kernel"].startswith("token_logps_bwd")]
    assert len(backward) >= 16
    handed_on = [r for r in backward if r["exchanges"] or r["shared"]]
    assert not handed_on, handed_on


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_KIB)
def test_no_counted_figure_is_worse_than_the_committed_one(target):
    committed = json.loads(static.COMMITTED.read_text(encoding="utf-8"))
    if committed["triton"] != triton.__version__:
        pytest.skip(f"benchmarks/static.json is of triton {committed['triton']}, this is {triton.__version__}")
    before = [report for report in committed["reports"] if report["target"] == target]
    lines = static.worse(compiled(target), before)
    assert not lines, "python -m benchmarks.static writes the table anew, if this is meant:\n" + "\n".join(lines)


def test_each_figure_that_gets_worse_is_named():
    report = {"target": "cuda:90", "kernel": "k", **dict.fromkeys(static.COUNTED, 8)}
    assert static.worse([report], [report]) == []
    for figure in static.COUNTED:
        bad, good = (7, 9) if figure in static.MORE_IS_BETTER else (9, 7)
        assert static.worse([report | {figure: bad}], [report]) == [f"cuda:90 k: {figure} 8 -> {bad}"]
        assert static.worse([report | {figure: good}], [report]) == []
    assert static.worse([], [report]) == static.worse([report], []) == ["cuda:90 k: not in both"]


def test_the_committed_page_is_of_the_committed_figures():
    committed = json.loads(static.COMMITTED.read_text(encoding="utf-8"))
    assert static.PAGE.read_text(encoding="utf-8") == static.page(committed["reports"], committed["triton"])
    assert {report["target"] for report in committed["reports"]} == set(SHARED_KIB) == set(static.TARGETS)


SASS = """
        /*0000*/                   LDG.E.64 R2, desc[UR6][R2.64] ;
        /*0010*/               @P0 BRA 0x0060 ;
        /*0020*/                   MUFU.EX2 R5, R6 ;
        /*0030*/                   FFMA R5, R6, R7, R8 ;
        /*0040*/                   STG.E [R2], R5 ;
        /*0050*/                   EXIT ;
        /*0060*/                   STG.E [R2], RZ ;
        /*0070*/                   EXIT ;
        /*0080*/                   NOP ;
"""
SASS_LOOP = """
        /*0000*/                   S2R R0, SR_CTAID.X ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;
        /*0020*/              @!P1 LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0030*/                   MUFU.EX2 R5, R6 ;
        /*0040*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0050*/              @!P0 BRA 0x0010 ;
        /*0060*/                   SHFL.BFLY PT, R3, R4 ;
        /*0070*/                   LDG.E.U16 R4, desc[UR6][R2.64] ;
        /*0080*/                   EXIT ;
"""
GCN_LOOP = """
.LBB0_0:
	s_load_dword s12, s[0:1], 0x58
	s_cbranch_scc0 .LBB0_2
.LBB0_1:                                ; %.lr.ph
	global_load_dwordx4 v[12:15], v[4:5], off
	s_waitcnt vmcnt(0)
	v_exp_f32_e32 v12, v30
	v_pk_fma_f32 v[0:1], v[2:3], v[4:5], v[6:7]
	s_cbranch_scc1 .LBB0_1
.LBB0_2:
	ds_bpermute_b32 v1, v2, v3
	s_endpgm
.Lfunc_end0:
	global_load_dwordx2 v[0:1], v[2:3], off
"""


def test_what_is_counted_in_machine_code():
    way = NVIDIA.figures(SASS, logits=2, element=2)
    assert (way["logits"], way["instructions"], way["exponentials"], way["flops"]) == (2, 3.0, 0.5, 1.5)
    assert (way["load_bytes"], way["loads_in_flight"], way["exchanges"]) == (8, 1, 0)
    loop = NVIDIA.figures(SASS_LOOP, logits=1, element=2)
    assert (loop["logits"], loop["instructions"]) == (24, round(5 / 24, 2))
    assert (loop["load_bytes"], loop["loads_in_flight"], loop["exchanges"]) == (16, 2, 1)
    loop = AMD.figures(GCN_LOOP, logits=1, element=4)
    assert (loop["logits"], loop["instructions"], loop["exponentials"], loop["flops"]) == (4, 1.0, 0.25, 1.25)
    assert (loop["load_bytes"], loop["loads_in_flight"], loop["exchanges"]) == (16, 1, 1)
    with pytest.raises(ValueError, match="no way through"):
        NVIDIA.figures("        /*0000*/   EXIT ;\n", logits=1, element=2)


def test_no_kernel_relies_on_a_debug_barrier():
    """It orders threads on NVIDIA, by their machine code; on gfx942 a wave passes it with its loads in flight."""
    assert not [file.name for file in KERNELS.glob("*.py") if "debug_barrier" in file.read_text(encoding="utf-8")]
