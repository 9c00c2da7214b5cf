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
        (dict(longest_pair=300), "pairwise"),
        (dict(longest_pair=4000), "pending"),
        (dict(separable=False), "recompute"),
        (dict(separable=False, longest_pair=4000), "recompute"),
    ],
)
def test_choice(needs, name):
    plan = plan_head(**LLAMA, **needs)
    assert plan.name == name and plan.gemms == GEMMS[name]
    assert plan.flops == plan.gemms * 2 * 8192 * 4096 * 128_256
    assert name in plan.describe() and plan.reason in plan.describe()


def test_a_frozen_backbone_saves_a_gemm():
    assert plan_head(**LLAMA, hidden_grad=False, longest_pair=300).gemms == 2
    assert plan_head(**LLAMA, hidden_grad=False, separable=False).gemms == 3


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_mib", [16, 256])
@pytest.mark.parametrize("N", [1, 512, 32_768])
@pytest.mark.parametrize("V", [32_000, 256_000])
def test_a_tile_stays_within_its_budget(device_type, dtype, tile_mib, N, V):
    for head_grad, separable in ((False, True), (True, True), (True, False)):
        plan = plan_head(
            N, 1024, V, dtype, head_grad=head_grad, separable=separable, tile_mib=tile_mib, device_type=device_type
        )
        assert plan.chunk_rows * plan.chunk_columns * 4 <= tile_mib << 20
        assert plan.chunk_rows * (plan.chunk_columns + 2 * 1024) * 4 <= 1.1 * (tile_mib << 20)
        bytes_per_logit = 6 if dtype == torch.bfloat16 and device_type == "cuda" else 4
        if plan.name == "recompute":
            assert plan.slice_columns * N * bytes_per_logit <= tile_mib << 20
        assert 1 <= plan.chunk_rows <= N and 1 <= plan.slice_columns <= V


def test_work_space_is_flat_in_tokens():
    small, large = (plan_head(n, 1024, 32_000, longest_pair=200).workspace_bytes for n in (4096, 65_536))
    rows = plan_head(1 << 20, 1024, 32_000, longest_pair=200).chunk_rows
    assert small == large == rows * (32_000 + 2 * 1024) * 4


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
    plan = plan_head(4096, 64, 32_000, longest_pair=1500, device_type="cpu")
    assert plan.name == "pairwise" and plan.chunk_rows == 1500
    assert plan_head(4096, 64, 32_000, longest_pair=2500, device_type="cpu").name == "pending"


def test_a_pair_that_just_fits():
    plan = plan_head(8192, 4096, 131_072, torch.bfloat16, longest_pair=512)
    assert plan.name == "pairwise" and plan.chunk_rows == 512


def test_one_row_larger_than_the_budget():
    assert plan_head(8, 64, 1_000_000, tile_mib=1).chunk_rows == 1


def test_no_tokens():
    plan = plan_head(0, 64, 100)
    assert plan.flops == 0 and plan.chunk_rows == 1


@pytest.mark.parametrize("wrong", [dict(N=-1), dict(H=0), dict(V=0), dict(tile_mib=0)])
def test_sizes_are_checked(wrong):
    with pytest.raises(ValueError, match="sizes must be positive"):
        plan_head(**{**dict(N=1, H=1, V=1), **wrong})
