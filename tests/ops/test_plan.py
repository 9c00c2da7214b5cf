"""The planner by itself: which plan, how large its tiles, what it costs."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dpo_fast.ops.plan import GEMMS, MEMORY_SHARE, TILE_ROWS, plan_head
from dpo_fast.ops.roofline import H100, H200, PLAIN, Device, describe_device

LLAMA = dict(N=8192, H=4096, V=128_256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "needs, name",
    [
        (dict(hidden_grad=False, head_grad=False), "score"),
        (dict(head_grad=False), "frozen"),
        (dict(head_grad=False, separable=False), "frozen"),
        (dict(pair_lengths=[300] * 27), "pairwise"),
        (dict(pair_lengths=[4000, 4000]), "pairwise"),  # in one tile
        (dict(pair_lengths=[7000, 300]), "pending"),
        (
            dict(pair_lengths=[1500] * 5, tile_mib=512),
            "recompute",
        ),  # the passes over d_weight take longer than a fourth GEMM
        (dict(separable=False), "recompute"),
        (dict(separable=False, pair_lengths=[7000]), "recompute"),
    ],
)
def test_choice(needs, name):
    plan = plan_head(**LLAMA, **needs)
    assert plan.name == name and plan.gemms == GEMMS[name]
    assert plan.flops == plan.gemms * 2 * 8192 * 4096 * 128_256
    assert name in plan.describe() and plan.reason in plan.describe()


def test_a_frozen_backbone_saves_a_gemm():
    assert plan_head(**LLAMA, hidden_grad=False, pair_lengths=[300]).gemms == 2
    assert plan_head(**LLAMA, hidden_grad=False, separable=False).gemms == 3


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_mib", [16, 256])
@pytest.mark.parametrize("N", [1, 512, 32_768])
@pytest.mark.parametrize("V", [32_000, 256_000])
def test_a_tile_stays_within_its_budget(device_type, dtype, tile_mib, N, V):
    bytes_per_logit = 6 if dtype == torch.bfloat16 and device_type == "cuda" else 4
    for head_grad, separable in ((False, True), (True, True), (True, False)):
        plan = plan_head(
            N, 1024, V, dtype, head_grad=head_grad, separable=separable, tile_mib=tile_mib, device_type=device_type
        )
        assert plan.chunk_rows * plan.chunk_columns * bytes_per_logit <= tile_mib << 20
        assert plan.chunk_rows * (plan.chunk_columns * bytes_per_logit + 2 * 1024 * 4) <= 1.1 * (tile_mib << 20)
        if plan.name == "recompute":
            assert plan.slice_columns * N * bytes_per_logit <= tile_mib << 20
        assert 1 <= plan.chunk_rows <= N and 1 <= plan.slice_columns <= V


@pytest.mark.parametrize("V", [32_000, 50_257, 128_256, 151_936, 256_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tile_on_an_accelerator_is_whole_tiles_of_its_gemms(V, dtype):
    """Predicted: 523 rows of 128,256 waste 22 % of the tensor cores, 262 of 256,000 47 %."""
    assert plan_head(16_384, 4096, V, dtype, head_grad=False).chunk_rows in TILE_ROWS
    for gib in (141, 80, 24, 8):
        device = replace(PLAIN, memory=gib << 30)
        plan = plan_head(16_384, 4096, V, dtype, head_grad=False, device=device)
        assert plan.chunk_rows in TILE_ROWS or plan.workspace_bytes > 0.8 * (gib << 30) / 32 or plan.chunk_rows <= 512
        assert plan.workspace_bytes <= 1.1 * max(gib << 25, 256 << 20)
        assert plan.chunk_rows % 256 == 0 or gib == 8
    for tile_mib in (64, 256, 1024):
        assert plan_head(16_384, 4096, V, dtype, tile_mib=tile_mib).chunk_rows % 16 == 0
    recompute = plan_head(8192, 4096, V, dtype, separable=False)
    assert recompute.slice_columns % 256 == 0 or recompute.slice_columns == V


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_policy_and_reference_are_scored_in_the_same_tiles(device_type):
    for V in (32_000, 128_256):
        plans = [
            plan_head(9000, 2048, V, torch.bfloat16, device_type=device_type, **needs)
            for needs in (dict(hidden_grad=False, head_grad=False), dict(head_grad=False), dict(separable=False))
        ]
        assert len({(plan.chunk_rows, plan.chunk_columns) for plan in plans}) == 1


@pytest.mark.parametrize("N", [1500, 3200, 8192, 32_768])
@pytest.mark.parametrize("device", [H100, H200, None], ids=lambda device: getattr(device, "name", "unknown"))
@pytest.mark.parametrize("V", [32_000, 128_256, 262_208])
def test_rows_on_an_accelerator_depend_on_no_needs(N, device, V):
    needs = [dict(hidden_grad=False, head_grad=False), dict(head_grad=False), dict(separable=False), dict()]
    needs.append(dict(pair_lengths=[500] * (N // 500)))
    plans = [plan_head(N, 2048, V, torch.bfloat16, device=device, **one) for one in needs]
    assert len({(plan.chunk_rows, plan.chunk_columns) for plan in plans}) == 1


def test_work_space_is_flat_in_tokens():
    small, large = (plan_head(n, 1024, 32_000, pair_lengths=[200]).workspace_bytes for n in (8192, 65_536))
    assert small == large == 2048 * (32_000 + 2 * 1024) * 4


# (N, H, V), of 16 bits: what was asked for, in ms; a prediction, like what it is compared with
ASKED = {
    (8192, 4096, 131_072): {"score": 13.0, "frozen": 26.0, "pairwise": 40.0},
    (2048, 2048, 128_256): {"pairwise": 5.6},
}
NEEDS = {"score": dict(hidden_grad=False, head_grad=False), "frozen": dict(head_grad=False), "pairwise": {}}


def test_predicted_times_on_an_h200_are_those_asked_for():
    for sizes, asked in ASKED.items():
        for name, most in asked.items():
            plan = plan_head(*sizes, torch.bfloat16, device=H200, **NEEDS[name])
            floor = plan.flops / H200.gemm
            assert plan.name == name and floor < plan.seconds <= 1e-3 * most
            assert plan.seconds < plan_head(*sizes, torch.bfloat16, device=H100, **NEEDS[name]).seconds


# Rows of a tile, and the plan of a pair of 3,000 and one of 6,000 tokens
CHOICES = {
    ("Llama-3 8B", 4096, 128_256): {H200: (4096, "pairwise", "pending"), H100: (3328, "pairwise", "pending")},
    ("Llama-3 1B", 2048, 128_256): {H200: (4096, "pairwise", "pending"), H100: (3328, "pairwise", "pending")},
    ("Qwen3 8B", 4096, 151_936): {H200: (4096, "pairwise", "pending"), H100: (2816, "recompute", "recompute")},
    ("Gemma-3 4B", 2560, 262_208): {H200: (2816, "recompute", "pending"), H100: (1536, "recompute", "recompute")},
    ("GPT-2", 768, 50_257): {H200: (4096, "pairwise", "pending"), H100: (4096, "pairwise", "recompute")},
}


@pytest.mark.parametrize("name, H, V", CHOICES)
def test_choices_for_real_models(name, H, V):
    for device, expected in CHOICES[name, H, V].items():
        rows = plan_head(16_384, H, V, torch.bfloat16, device=device).chunk_rows
        assert rows * 6 * V <= device.memory / MEMORY_SHARE
        plans = [plan_head(2 * n, H, V, torch.bfloat16, device=device, pair_lengths=[n, n]).name for n in (3000, 6000)]
        assert (rows, *plans) == expected


def test_more_rows_only_where_they_are_worthwhile():
    """What 2,048 rows take in as many chunks needs no larger tile, and passes over a fast memory are worth none."""
    assert plan_head(2000, 4096, 131_072, torch.bfloat16, device=H200).chunk_rows == 2000
    assert plan_head(4000, 4096, 131_072, torch.bfloat16, device=H200).chunk_rows == 4000
    fast = replace(H200, bandwidth=1e15)
    assert plan_head(8192, 4096, 131_072, torch.bfloat16, device=fast).chunk_rows == 2048


@pytest.mark.parametrize("n", [4200, 5000, 8000, 16_000])
def test_pending_or_recompute_is_a_matter_of_time(n):
    long = dict(pair_lengths=[n], dtype=torch.bfloat16)
    slow, fast = (replace(H200, bandwidth=H200.bandwidth * factor) for factor in (0.1, 10))
    assert plan_head(n, 4096, 131_072, device=slow, **long).name == "recompute"
    assert plan_head(n, 4096, 131_072, device=fast, **long).name == "pending"


def test_a_gradient_in_fp32_that_does_not_fit_is_left_out():
    device = replace(H200, memory=6 << 30)
    plan = plan_head(2048, 4096, 131_072, torch.bfloat16, device=device, tile_mib=256)
    assert plan.name == "pairwise"
    plan = plan_head(2048, 8192, 131_072, torch.bfloat16, device=device, tile_mib=256)
    assert plan.name == "recompute" and "does not fit the device" in plan.reason


@pytest.mark.parametrize("needs", [dict(hidden_grad=False, head_grad=False), dict(head_grad=False), {}])
def test_too_little_memory_is_said_before_work(needs):
    device = replace(H200, memory=1 << 30)
    with pytest.raises(
        MemoryError, match="needs .* GiB of work space beside .* NVIDIA H200 has 1 GiB: take fewer tokens"
    ):
        plan_head(8192, 4096, 262_208, torch.bfloat16, device=device, **needs)
    with pytest.raises(MemoryError, match="a smaller tile_mib"):
        plan_head(8192, 4096, 20_000, torch.bfloat16, device=device, tile_mib=4096, **needs)
    assert plan_head(8192, 4096, 20_000, torch.bfloat16, device=device, **needs).workspace_bytes < 1 << 30


def test_a_device_is_described_by_one_formula():
    """Data sheets say 989, 312 and 1,307 TFLOP/s and 4.8, 2.0 and 5.3 TB/s; these are shares of them."""
    a100 = Device.of("A100", "cuda:80", 108, 80 << 30, 1.41e9, 1.593e9, 5120)
    mi300 = Device.of("MI300X", "hip:gfx942", 304, 192 << 30, 2.1e9, 2.6e9, 8192)
    for device, gemm, bandwidth in ((H200, 1071, 4.92), (a100, 312, 2.04), (mi300, 1307, 5.32)):
        assert 0.72 < device.gemm / (1e12 * gemm) < 0.74 and 0.86 < device.bandwidth / (1e12 * bandwidth) < 0.89
    unknown = Device.of("new", "cuda:130", 200, 100 << 30, 0, 0, 0)  # neither architecture nor clocks
    assert unknown.gemm > 0 and unknown.bandwidth > 0 and plan_head(9000, 4096, 131_072, device=unknown).seconds > 0


def test_torch_describes_a_device(monkeypatch):
    properties = dict(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=139 << 30)
    clocks = dict(clock_rate=1_980_000, memory_clock_rate=3_201_000, memory_bus_width=6144)
    for index, more in enumerate((clocks, {})):  # torch 2.8 has no clocks
        found = SimpleNamespace(**properties, **more)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        device = describe_device.__wrapped__(torch.device("cuda", index))
        assert device == H200 if more else device.memory == H200.memory and 0.8 < device.gemm / H200.gemm < 1.0
    assert describe_device(torch.device("cpu")) is None


def test_plans_on_a_cpu_are_what_they_were():
    """cpu_plans.txt was written before plans knew devices."""
    needs = {
        "score": dict(hidden_grad=False, head_grad=False),
        "frozen": dict(head_grad=False),
        "pairwise": dict(pair_lengths=[300, 20]),
        "long pair": dict(pair_lengths=[5000, 300]),
        "coupled": dict(separable=False),
        "long group": dict(pair_lengths=[5000], sequences=4),
        "frozen backbone": dict(hidden_grad=False, separable=False),
    }
    for line in Path(__file__).with_name("cpu_plans.txt").read_text().splitlines()[1:]:
        case, expected = line.split(" -> ")
        sizes, which = case.split(", ")
        *numbers, dtype, tile_mib = sizes.split()
        tile_mib = None if tile_mib == "-" else int(tile_mib)
        plan = plan_head(
            *map(int, numbers), getattr(torch, dtype), tile_mib=tile_mib, device_type="cpu", **needs[which]
        )
        found = plan.name, plan.chunk_rows, plan.chunk_columns, plan.slice_columns, plan.workspace_bytes
        assert " ".join(map(str, found)) == expected, case
        assert plan.seconds is None


@pytest.mark.parametrize("needs", [dict(hidden_grad=False, head_grad=False), dict(head_grad=False)])
def test_on_cpu_work_space_is_flat_in_the_vocabulary(needs):
    """Plans without d_weight go through the vocabulary slice by slice there: a whole row never exists."""
    small, large = (plan_head(4096, 1024, V, device_type="cpu", **needs) for V in (32_000, 256_000))
    assert small.workspace_bytes == large.workspace_bytes < 20 << 20
    assert large.chunk_columns < 32_000


def test_on_cpu_recompute_is_flat_in_tokens():
    plans = [plan_head(N, 1024, 32_000, separable=False, device_type="cpu") for N in (8192, 65_536)]
    assert plans[0].workspace_bytes == plans[1].workspace_bytes == 64 << 20


def test_a_pair_longer_than_the_preferred_tile_still_fits_the_budget():
    """On CPU tiles are smaller than the budget, for speed; a pair up to the budget gets the tile it needs."""
    plan = plan_head(4096, 64, 32_000, pair_lengths=[1500], device_type="cpu")
    assert plan.name == "pairwise" and plan.chunk_rows == 1500
    assert plan_head(4096, 64, 32_000, pair_lengths=[2500], device_type="cpu").name == "pending"


def test_a_pair_that_just_fits():
    plan = plan_head(8192, 4096, 131_072, torch.bfloat16, pair_lengths=[4096] * 2)
    assert plan.name == "pairwise" and plan.chunk_rows == 4096
    plan = plan_head(8192, 4096, 131_072, torch.bfloat16, pair_lengths=[341] * 24, tile_mib=256)
    assert plan.name == "pairwise" and plan.chunk_rows == 341  # a multiple of 256 would not hold a pair


def test_one_row_larger_than_the_budget():
    assert plan_head(8, 64, 1_000_000, tile_mib=1).chunk_rows == 1


def test_no_tokens():
    plan = plan_head(0, 64, 100)
    assert plan.flops == 0 and plan.chunk_rows == 1


@pytest.mark.parametrize("wrong", [dict(N=-1), dict(H=0), dict(V=0), dict(tile_mib=0)])
def test_sizes_are_checked(wrong):
    with pytest.raises(ValueError, match="sizes must be positive"):
        plan_head(**{**dict(N=1, H=1, V=1), **wrong})
