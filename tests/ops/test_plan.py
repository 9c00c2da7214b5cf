"""The planner by itself: which plan, how large its tiles, what it costs."""

import pytest
import torch

from dpo_fast.ops.plan import GEMMS, plan_head

LLAMA = dict(N=8192, H=4096, V=128_256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "needs, name",
    [
        (dict(hidden_grad=False, head_grad=False), "score"),
        (dict(head_grad=False), "frozen"),
        (dict(head_grad=False, separable=False), "frozen"),
        (dict(pair_lengths=[300] * 27), "pairwise"),
        (dict(pair_lengths=[4000, 300]), "pending"),
        (dict(pair_lengths=[4000, 4000]), "pending"),
        (dict(pair_lengths=[2700] * 3), "recompute"),  # the passes over d_weight take longer than a fourth GEMM
        (dict(separable=False), "recompute"),
        (dict(separable=False, pair_lengths=[4000]), "recompute"),
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
    assert plan_head(16_384, 4096, V, dtype, head_grad=False).chunk_rows == 2048
    for gib in (141, 80, 24, 8):
        plan = plan_head(16_384, 4096, V, dtype, head_grad=False, device_memory=gib << 30)
        assert plan.chunk_rows == 2048 or plan.workspace_bytes > 0.8 * (gib << 30) / 32 or plan.chunk_rows <= 512
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


def test_work_space_is_flat_in_tokens():
    small, large = (plan_head(n, 1024, 32_000, pair_lengths=[200]).workspace_bytes for n in (4096, 65_536))
    assert small == large == 2048 * (32_000 + 2 * 1024) * 4


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
    plan = plan_head(8192, 4096, 131_072, torch.bfloat16, pair_lengths=[2048] * 4)
    assert plan.name == "pairwise" and plan.chunk_rows == 2048
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
