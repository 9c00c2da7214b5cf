"""The head's code for CUDA, executed on CPU (see emulated_cuda.py): each plan, dtype and implementation against fp64,
to bounds that follow from the number of roundings. Hidden states of ignored tokens are NaN throughout."""

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
from emulated_cuda import HALF, on_cuda

from dpo_fast import Objective, linear_preference_loss, linear_token_logps
from dpo_fast.logps import PairLogps
from dpo_fast.ops import plan as plans

LENGTHS = ((6, 3), (9, 10), (2, 3), (1, 2))  # tokens of each pair's chosen and rejected
P, N, H, V, RANK = len(LENGTHS), sum(map(sum, LENGTHS)), 16, 130, 8
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # unit roundoffs
PLANS = {
    "score": (),
    "frozen": ("hidden", "down"),
    "pairwise": ("hidden", "weight", "bias", "down", "up"),
    "pending": ("hidden", "weight", "bias", "down", "up"),
    "recompute": ("hidden", "weight", "bias", "down", "up"),
}
TRANSFORMS = {
    "plain": {},
    "soft-cap": dict(logit_softcap=4.0, logit_scale=0.0625, temperature=0.7),
}


@dataclass
class Problem:
    tensors: dict[str, Tensor]
    labels: Tensor
    ids: Tensor
    reference: Tensor  # (2P,)


def make(dtype, *, low_rank=True, seed=0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    tensors = {"hidden": normal(N, H), "weight": normal(V, H, std=2 / math.sqrt(H)), "bias": normal(V, std=0.5)}
    if low_rank:
        tensors |= {"down": normal(N, RANK), "up": normal(V, RANK, std=0.3)}
    ids = torch.tensor(
        [s for i, pair in enumerate(LENGTHS) for s, n in zip((i, P + i), pair, strict=True) for _ in range(n)]
    )
    order = torch.randperm(N, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.2] = -100
    reference = -3.0 * torch.tensor([float(n) for side in zip(*LENGTHS, strict=True) for n in side])
    return Problem(tensors, labels, ids[order], reference)


class Oracle:
    """fp64 on the same rounded inputs: loss, gradients, and what bounds their errors."""

    def __init__(self, p: Problem, loss, logit_softcap=None, logit_scale=1.0, temperature=1.0):
        self.p, self.scored = p, p.labels != -100
        x = {k: v.detach().double().requires_grad_() for k, v in p.tensors.items()}
        raw = x["hidden"] @ x["weight"].T + x["bias"]
        terms = x["hidden"].abs() @ x["weight"].abs().T + x["bias"].abs()
        if "down" in x:
            raw, terms = raw + x["down"] @ x["up"].T, terms + x["down"].abs() @ x["up"].abs().T
        raw.retain_grad()
        z = raw * logit_scale
        z = (z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)) / temperature
        log_p = z.log_softmax(-1)
        y = p.labels.clamp(min=0)[:, None]
        self.logps = torch.where(self.scored, log_p.gather(1, y)[:, 0], 0)
        self.logps.retain_grad()
        self.loss = loss(self.logps)
        self.loss.backward()
        self.gradients = {k: v.grad for k, v in x.items()}
        slope = abs(logit_scale / temperature)
        # A logit in fp32 is off by a rounding a term of its dot product, once more for each step of the transform
        self.logit_error = 2.0**-24 * (H + RANK + 8) * terms.max().item() * max(slope, 1.0)
        self.coefficient = self.logps.grad.abs()[:, None] * self.scored[:, None]
        self.D = raw.grad.abs()
        self.certain = self.coefficient * slope * (log_p.exp() + F.one_hot(y[:, 0], V))  # what cancels in 1 - p

    def bound(self, name: str, dtype: torch.dtype) -> Tensor:
        """Of the error of a gradient: D is rounded once, in fp16 its operand as well, and the result."""
        u = ROUNDING[dtype]
        roundings = 2 if dtype == torch.float16 else 1
        d = (roundings * u + 2.0**-16) * self.D + 4 * self.logit_error * self.certain
        if dtype == torch.float16:
            d = d + 2.0**-24 * (self.coefficient + self.coefficient.max())  # below fp16's range
        x = {k: v.double().abs() for k, v in self.p.tensors.items()}
        total = {
            "hidden": lambda: d @ x["weight"],
            "weight": lambda: d.T @ x["hidden"],
            "bias": lambda: d.sum(0),
            "down": lambda: d @ x["up"],
            "up": lambda: d.T @ x["down"],
        }[name]()
        return total + u * self.gradients[name].abs() + (2.0**-24 if dtype == torch.float16 else 2.0**-40)


def dpo(p: Problem, beta=0.5):
    def loss(logps):
        sums = torch.zeros(2 * P, dtype=logps.dtype).index_add(0, p.ids, logps)
        chosen, rejected = (sums - p.reference.to(sums)).tensor_split(2)
        return F.softplus(-beta * (chosen - rejected)).mean()

    return loss


def leaves_of(p: Problem, needs) -> dict[str, Tensor]:
    """What the library gets: NaN where a token is ignored."""
    leaves = {k: v.clone() for k, v in p.tensors.items()}
    for name in {"hidden", "down"} & set(leaves):
        leaves[name][p.labels == -100] = torch.nan
    return {k: v.requires_grad_(k in needs) for k, v in leaves.items()}


def call(op, leaves, *arguments, **knobs):
    low_rank = (leaves["down"], leaves["up"]) if "down" in leaves else None
    return op(leaves["hidden"], leaves["weight"], *arguments, bias=leaves["bias"], low_rank=low_rank, **knobs)


def check(leaves, oracle: Oracle, needs, dtype, scale=1.0) -> None:
    for name in needs:
        found = leaves[name].grad
        assert found.dtype == leaves[name].dtype
        found = found.double() / scale
        if name in ("hidden", "down"):
            assert (found[oracle.p.labels == -100] == 0).all(), f"d_{name} of ignored tokens"
        used = (
            ((found - oracle.gradients[name]).abs() / oracle.bound(name, dtype)).nan_to_num(nan=torch.inf).max().item()
        )
        assert used <= 1, f"d_{name}: {used:.2f} of its bound"


@pytest.mark.parametrize("impl, transform", [("triton", "plain"), ("triton", "soft-cap"), ("torch", "soft-cap")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_level_3(plan, dtype, impl, transform, monkeypatch):
    monkeypatch.setattr(plans, "FLOPS_PER_BYTE", 0 if plan == "pending" else 10**9)
    p, needs, knobs = make(dtype), PLANS[plan], TRANSFORMS[transform]
    oracle = Oracle(p, dpo(p), **knobs)
    leaves = leaves_of(p, needs)
    rows = 16 if plan in ("pending", "recompute") else 24  # the longest pair has 19 tokens
    with on_cuda(seed=len(plan), tile_rows=rows) as counts:
        out = call(
            linear_preference_loss,
            leaves,
            p.labels,
            p.ids,
            P,
            reference_logps=p.reference,
            beta=0.5,
            impl=impl,
            **knobs,
        )
        if needs:
            out.loss.backward()
    assert out.plan.name == plan and N > out.plan.chunk_rows
    if impl == "triton" and dtype in HALF:
        assert counts["16-bit product"] and counts["launches"] and not counts["unaligned"]
    assert (out.stats.logps.double() - oracle.logps).abs().max() <= 4 * oracle.logit_error
    assert abs(out.loss.item() - oracle.loss.item()) <= N * oracle.logit_error
    check(leaves, oracle, needs, dtype)


@pytest.mark.parametrize("adds", [True, False], ids=["addmm", "no addmm"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_torch_that_cannot_add_products(dtype, adds):
    """2.8 and 2.9 multiply 16-bit matrices into an fp32 one, and do not add them to it."""
    p, needs = make(dtype), PLANS["pairwise"]
    oracle, leaves = Oracle(p, dpo(p)), leaves_of(p, needs)
    with on_cuda(adds=adds, tile_rows=24) as counts:
        out = call(
            linear_preference_loss, leaves, p.labels, p.ids, P, reference_logps=p.reference, beta=0.5, impl="triton"
        )
        out.loss.backward()
    assert out.plan.name == "pairwise" and bool(counts["16-bit product, added"]) == adds
    check(leaves, oracle, needs, dtype)


def test_a_device_that_multiplies_16_bits_into_16_bits_alone_gets_fp32(monkeypatch):
    p, needs = make(torch.bfloat16), PLANS["pairwise"]
    oracle, leaves = Oracle(p, dpo(p)), leaves_of(p, needs)
    with on_cuda(tile_rows=24) as counts:
        mm = torch.mm

        def refuses(a, b, *, out=None, out_dtype=None):
            if out_dtype is not None:
                raise RuntimeError("not implemented")
            return mm(a, b, out=out)

        monkeypatch.setattr(torch, "mm", refuses)
        out = call(
            linear_preference_loss, leaves, p.labels, p.ids, P, reference_logps=p.reference, beta=0.5, impl="triton"
        )
        out.loss.backward()
    assert not counts["16-bit product"]
    check(leaves, oracle, needs, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_level_3_under_autocast(dtype):
    """fp32 inputs, 16-bit GEMMs: gradients come back in fp32."""
    p, needs = make(dtype), PLANS["pairwise"]
    oracle = Oracle(p, dpo(p))
    wide = Problem({k: v.float() for k, v in p.tensors.items()}, p.labels, p.ids, p.reference)
    leaves = leaves_of(wide, needs)
    with on_cuda(tile_rows=24) as counts, torch.autocast("cpu", dtype):
        out = call(
            linear_preference_loss, leaves, p.labels, p.ids, P, reference_logps=p.reference, beta=0.5, impl="triton"
        )
        out.loss.backward()
    assert counts["16-bit product"]
    check(leaves, oracle, needs, dtype)


@pytest.mark.parametrize("level", [2, 3])
def test_fp16_with_a_gradient_scaler(level):
    """Pairs far ahead already: slopes of some 1e-6, which fp16 does not hold before a scaler multiplies them."""
    p, needs, scale = make(torch.float16), PLANS["pairwise"], 2.0**16
    ahead = torch.zeros(2 * P).index_add(0, p.ids, Oracle(p, torch.sum).logps.detach().float())
    ahead[:P] -= 24.0
    p = Problem(p.tensors, p.labels, p.ids, ahead)
    oracle, leaves = Oracle(p, dpo(p)), leaves_of(p, needs)
    with on_cuda(tile_rows=24):
        if level == 3:
            loss = call(
                linear_preference_loss, leaves, p.labels, p.ids, P, reference_logps=ahead, beta=0.5, impl="triton"
            ).loss
        else:
            loss = dpo(p)(call(linear_token_logps, leaves, p.labels, impl="triton"))
        (loss * scale).backward()
    assert 0 < oracle.coefficient.max() < 1e-6
    check(leaves, oracle, needs, torch.float16, scale)
    rows = torch.ones(V, dtype=torch.bool)
    rows[p.labels.clamp(min=0)] = False
    found, true = leaves["weight"].grad.double()[rows] / scale, oracle.gradients["weight"][rows]
    assert (found - true).norm() / true.norm() < 2 * ROUNDING[torch.float16], "entries that are nobody's label"


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "recompute"])
def test_labels_out_of_range_are_nan_in_their_own_rows(needs):
    p = make(torch.bfloat16, low_rank=False)
    labels = p.labels.clone()
    labels[5] = V
    leaves = leaves_of(Problem(p.tensors, labels, p.ids, p.reference), needs)
    with on_cuda():
        logps = call(linear_token_logps, leaves, labels, impl="triton")
        logps.nan_to_num().sum().backward()
    assert logps.isnan().nonzero().flatten().tolist() == [5]


def test_the_reference_and_the_policy_agree_to_the_bit_where_nothing_trains_the_head():
    p = make(torch.bfloat16)
    with on_cuda(tile_rows=24):
        policy = call(linear_token_logps, leaves_of(p, ("hidden",)), p.labels, impl="triton")
        with torch.no_grad():
            reference = call(linear_token_logps, leaves_of(p, ()), p.labels, impl="triton")
    assert torch.equal(policy, reference)


def test_a_coupled_objective_over_pairs():
    """aot sorts margins over the batch: recompute, with differentiable log-probs."""
    p, needs = make(torch.bfloat16), PLANS["recompute"]

    def loss(logps):
        sums = torch.zeros(2 * P, dtype=logps.dtype).index_add(0, p.ids, logps)
        chosen, rejected = sums.tensor_split(2)
        reference = p.reference.to(sums)
        return Objective("aot", beta=0.5)(PairLogps(chosen, rejected, reference[:P], reference[P:])).mean()

    oracle, leaves = Oracle(p, loss), leaves_of(p, needs)
    with on_cuda():
        out = call(
            linear_preference_loss,
            leaves,
            p.labels,
            p.ids,
            P,
            reference_logps=p.reference,
            loss="aot",
            beta=0.5,
            impl="triton",
        )
        out.loss.backward()
    assert out.plan.name == "recompute"
    check(leaves, oracle, needs, torch.bfloat16)
