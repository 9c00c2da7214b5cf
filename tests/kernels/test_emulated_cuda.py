"""The head's code for CUDA, executed on CPU (see emulated_cuda.py): each plan, dtype and implementation against fp64.
Hidden states of ignored tokens are NaN throughout."""

import pytest
import torch

pytest.importorskip("triton")
from emulated_cuda import HALF, on_cuda
from head_oracle import (
    PLANS,
    ROUNDING,
    TRANSFORMS,
    N,
    Oracle,
    P,
    Problem,
    V,
    check,
    dpo,
    far_ahead,
    leaves_of,
    make,
    preference,
    score,
)

from dpo_fast import Objective
from dpo_fast.logps import PairLogps
from dpo_fast.ops import plan as plans


@pytest.mark.parametrize("impl, transform", [("triton", "plain"), ("triton", "soft-cap"), ("torch", "soft-cap")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_level_3(plan, dtype, impl, transform, monkeypatch):
    monkeypatch.setattr(plans, "pending_pays", lambda *_: plan == "pending")
    p, needs, knobs = make(dtype), PLANS[plan], TRANSFORMS[transform]
    oracle, leaves = Oracle(p, dpo(p), **knobs), leaves_of(p, needs)
    rows = 8 if plan in ("pending", "recompute") else 12  # the longest pair has 11 tokens
    with on_cuda(seed=len(plan), tile_rows=rows) as counts:
        out = preference(p, leaves, impl=impl, **knobs)
        if needs:
            out.loss.backward()
    assert out.plan.name == plan and N > out.plan.chunk_rows
    if impl == "triton" and dtype in HALF:
        assert counts["16-bit product"] and counts["launches"] and not counts["unaligned"]
    assert (out.stats.logps.double() - oracle.logps).abs().max() <= 4 * oracle.logit_error
    assert abs(out.loss.item() - oracle.loss.item()) <= N * oracle.logit_error
    check(leaves, oracle, needs, dtype)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_an_adapter_in_fp32_on_a_head_in_16_bits(plan, dtype, impl, monkeypatch):
    """Log-probs as for fp32 factors. In a gradient D is in 16 bits, and then so is the factor that it is multiplied by:
    one rounding more."""
    monkeypatch.setattr(plans, "pending_pays", lambda *_: plan == "pending")
    p, needs = make(dtype), PLANS[plan]
    p.tensors |= {k: v for k, v in make(torch.float32, seed=1).tensors.items() if k in ("down", "up")}
    oracle, leaves = Oracle(p, dpo(p)), leaves_of(p, needs)
    with on_cuda(seed=len(plan), tile_rows=8 if plan in ("pending", "recompute") else 12):
        out = preference(p, leaves, impl=impl)
        if needs:
            out.loss.backward()
    assert out.plan.name == plan
    assert (out.stats.logps.double() - oracle.logps).abs().max() <= 4 * oracle.logit_error
    for name in needs:
        assert leaves[name].grad.dtype == leaves[name].dtype
        error = (leaves[name].grad.double() - oracle.gradients[name]).abs()
        assert (error <= (2 if name in ("down", "up") else 1) * oracle.bound(name, dtype)).all(), name


@pytest.mark.parametrize("adds", [True, False], ids=["addmm", "no addmm"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_torch_that_cannot_add_products(dtype, adds):
    """2.8 and 2.9 multiply 16-bit matrices into an fp32 one, and do not add them to it."""
    p, needs = make(dtype), PLANS["pairwise"]
    oracle, leaves = Oracle(p, dpo(p)), leaves_of(p, needs)
    with on_cuda(adds=adds, tile_rows=12) as counts:
        out = preference(p, leaves, impl="triton")
        out.loss.backward()
    assert out.plan.name == "pairwise" and bool(counts["16-bit product, added"]) == adds
    check(leaves, oracle, needs, dtype)


def test_a_device_that_multiplies_16_bits_into_16_bits_alone_gets_fp32(monkeypatch):
    p, needs = make(torch.bfloat16), PLANS["pairwise"]
    oracle, leaves = Oracle(p, dpo(p)), leaves_of(p, needs)
    with on_cuda(tile_rows=12) as counts:
        mm = torch.mm

        def refuses(a, b, *, out=None, out_dtype=None):
            if out_dtype is not None:
                raise RuntimeError("not implemented")
            return mm(a, b, out=out)

        monkeypatch.setattr(torch, "mm", refuses)
        preference(p, leaves, impl="triton").loss.backward()
    assert not counts["16-bit product"]
    check(leaves, oracle, needs, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_level_3_under_autocast(dtype):
    """fp32 inputs, 16-bit GEMMs: gradients come back in fp32."""
    p, needs = make(dtype), PLANS["pairwise"]
    oracle = Oracle(p, dpo(p))
    leaves = leaves_of(Problem({k: v.float() for k, v in p.tensors.items()}, p.labels, p.ids, p.reference), needs)
    with on_cuda(tile_rows=12) as counts, torch.autocast("cpu", dtype):
        preference(p, leaves, impl="triton").loss.backward()
    assert counts["16-bit product"]
    check(leaves, oracle, needs, dtype)


@pytest.mark.parametrize("level", [2, 3])
def test_fp16_with_a_gradient_scaler(level):
    """fp16 does not hold such slopes before a scaler multiplies them."""
    p, needs, scale = far_ahead(), PLANS["pairwise"], 2.0**16
    oracle, leaves = Oracle(p, dpo(p)), leaves_of(p, needs)
    with on_cuda(tile_rows=12):
        loss = preference(p, leaves, impl="triton").loss if level == 3 else dpo(p)(score(p, leaves, impl="triton"))
        (loss * scale).backward()
    assert 0 < oracle.coefficient.max() < 2e-6
    check(leaves, oracle, needs, torch.float16, scale)
    rows = torch.ones(V, dtype=torch.bool)
    rows[p.labels.clamp(min=0)] = False
    found, true = leaves["weight"].grad.double()[rows] / scale, oracle.gradients["weight"][rows]
    assert (found - true).norm() / true.norm() < 2 * ROUNDING[torch.float16], "entries that are nobody's label"


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "recompute"])
def test_labels_out_of_range_are_nan_in_their_own_rows(needs):
    p = make(torch.bfloat16, low_rank=False)
    p.labels[5] = V
    with on_cuda():
        leaves = leaves_of(p, needs)
        logps = score(p, leaves, impl="triton")
        logps.nan_to_num().sum().backward()
    assert logps.isnan().nonzero().flatten().tolist() == [5]
    assert leaves["hidden"].grad.isnan().any(1).nonzero().flatten().tolist() == [5]


def test_the_reference_and_the_policy_agree_to_the_bit_where_nothing_trains_the_head():
    p = make(torch.bfloat16)
    with on_cuda(tile_rows=12):
        policy = score(p, leaves_of(p, ("hidden",)), impl="triton")
        with torch.no_grad():
            reference = score(p, leaves_of(p, ()), impl="triton")
    assert torch.equal(policy, reference)


def test_an_objective_that_couples_pairs():
    """aot sorts margins over the batch: recompute, with differentiable log-probs."""
    p, needs = make(torch.bfloat16), PLANS["recompute"]

    def loss(logps):
        sums = torch.zeros(2 * P, dtype=logps.dtype).index_add(0, p.ids, logps)
        halves = *sums.tensor_split(2), *p.reference.to(sums).tensor_split(2)
        return Objective("aot", beta=0.5)(PairLogps(*halves)).mean()

    oracle, leaves = Oracle(p, loss), leaves_of(p, needs)
    with on_cuda():
        out = preference(p, leaves, loss="aot", impl="triton")
        out.loss.backward()
    assert out.plan.name == "recompute"
    check(leaves, oracle, needs, torch.bfloat16)
