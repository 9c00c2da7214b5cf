"""Level 2 against the fp64 oracle: values, statistics, and gradients for each subset of inputs that can require one."""

import itertools

import pytest
import torch
from random_head import random_head
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast.ops import tile
from dpo_fast.ops.call import Call
from dpo_fast.ops.linear import linear_token_logps, linear_token_stats
from dpo_fast.ops.plan import plan_head
from dpo_fast.ops.softmax import Transform
from dpo_fast.testing import (
    assert_within_bound,
    assert_within_budget,
    fp32_linear,
    gamma,
    head_bounds,
    make_generator,
)

NAMES = ("hidden", "weight", "bias", "down", "up")
TRANSFORM = dict(logit_softcap=5.0, logit_scale=0.7, temperature=1.3)


@pytest.fixture(params=["torch", "torch-in-slices", "triton"])
def impl(request, monkeypatch):
    """Eager also with an online softmax over slices, which real vocabularies need and those of tests do not."""
    if request.param == "torch-in-slices":
        monkeypatch.setattr("dpo_fast.ops.plan._CPU_ROWS", 7)
        monkeypatch.setattr("dpo_fast.ops.plan.CPU_COLUMNS", 30)
    return request.param.split("-")[0]


def make(N=23, H=32, V=1001, dtype=torch.float32, rank=4, seed=0):
    generator = make_generator(seed)
    tensors = random_head(generator, N, H, V, dtype, rank, up_std=0.5)
    labels = torch.randint(V, (N,), generator=generator)
    labels[1::7] = -100
    return tensors, labels


def eager(hidden, weight, bias, down, up, labels, logit_softcap=None, logit_scale=1.0, temperature=1.0):
    """Full logits in fp32, gradients by autograd and rounded once."""
    z = (fp32_linear(hidden, weight, bias.float()) + fp32_linear(down, up)) * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    log_p = torch.log_softmax(z / temperature, -1)
    ignored = labels == -100
    return log_p.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0)


def ours(impl, tile_mib=1, **knobs):
    def run(hidden, weight, bias, down, up, labels):
        return linear_token_logps(
            hidden, weight, labels, bias=bias, low_rank=(down, up), impl=impl, tile_mib=tile_mib, **knobs
        )

    return run


def run(function, tensors, labels, needs, coefficient):
    leaves = {k: v.clone().requires_grad_(k in needs) for k, v in tensors.items()}
    logps = function(**leaves, labels=labels)
    loss = (logps * coefficient.to(logps.dtype)).sum()
    gradients = torch.autograd.grad(loss, [leaves[k] for k in needs]) if needs else ()
    return logps.detach(), dict(zip(needs, gradients, strict=True))


def bounds_of(tensors, labels, coefficient=0.0, **transform):
    hidden, weight, bias, down, up = (tensors[name] for name in NAMES)
    return head_bounds(hidden, weight, labels, bias=bias, low_rank=(down, up), coefficient=coefficient, **transform)


def check_values_and_gradients(impl, tensors, labels, needs, budget=False, **knobs):
    coefficient = torch.randn(len(labels), generator=make_generator(1))
    logps, gradients = run(ours(impl, **knobs), tensors, labels, needs, coefficient)
    wide = {k: v.double() for k, v in tensors.items()}
    true_logps, true = run(ours("reference", **knobs), wide, labels, needs, coefficient)
    bounds = bounds_of(tensors, labels, coefficient, **knobs)
    assert logps.dtype == torch.float32 and (logps[labels == -100] == 0).all()
    assert_within_bound(logps, true_logps, bounds["logps"], what="logps")
    for name in needs:
        assert gradients[name].dtype == tensors[name].dtype
        assert_within_bound(gradients[name], true[name], bounds[name], what=name)
    if budget:
        eager_logps, peer = run(lambda **x: eager(**x, **knobs), tensors, labels, needs, coefficient)
        assert_within_budget(logps, eager_logps, true_logps, what="logps")
        for name in needs:
            assert_within_budget(gradients[name], peer[name], true[name], what=name)


@pytest.mark.parametrize("knobs", [{}, TRANSFORM], ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [NAMES, ("hidden", "down"), ()], ids=["recompute", "frozen", "score"])
def test_values_and_gradients_are_within_their_bounds(impl, knobs, dtype, needs):
    check_values_and_gradients(impl, *make(dtype=dtype), needs, **knobs)


@pytest.mark.parametrize("columns", [30, 2048], ids=["torch-in-slices", "torch"])
@pytest.mark.parametrize("knobs", [{}, TRANSFORM], ids=["plain", "transformed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [NAMES, ("hidden", "down"), ()], ids=["recompute", "frozen", "score"])
def test_values_and_gradients_are_within_the_budget(columns, knobs, dtype, needs, monkeypatch):
    monkeypatch.setattr("dpo_fast.ops.plan.CPU_COLUMNS", columns)
    check_values_and_gradients("torch", *make(N=600, V=401, dtype=dtype), needs, budget=True, **knobs)


@pytest.mark.parametrize("needs", [c for n in range(1, 6) for c in itertools.combinations(NAMES, n)], ids=" ".join)
def test_each_subset_of_inputs_that_require_a_gradient(impl, needs):
    check_values_and_gradients(impl, *make(N=9, H=8, V=77), needs)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 127), (5, 16, 5003)], ids=str)
def test_ragged_sizes_and_many_tiles(impl, shape):
    N, H, V = shape
    tensors, labels = make(N=N, H=H, V=V)
    labels[labels == -100] = 0
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    logps = linear_token_logps(hidden, weight, labels, impl=impl, tile_mib=1)
    found = torch.autograd.grad(logps.sum(), (hidden, weight))
    z = torch.log_softmax(hidden.double() @ weight.double().T, -1)
    expected = z.gather(1, labels[:, None])[:, 0]
    true = torch.autograd.grad(expected.sum(), (hidden, weight))
    bounds = head_bounds(hidden.detach(), weight.detach(), labels, coefficient=1.0)
    assert_within_bound(logps, expected, bounds["logps"], what="logps")
    for name, ours, exact in zip(("hidden", "weight"), found, true, strict=True):
        assert_within_bound(ours, exact.double(), bounds[name], what=name)


def test_statistics(impl):
    tensors, labels = make()
    arguments = (tensors["hidden"], tensors["weight"], labels)
    stats = linear_token_stats(*arguments, impl=impl, tile_mib=1, **TRANSFORM)
    oracle = linear_token_stats(*(x.double() for x in arguments[:2]), labels, impl="reference", **TRANSFORM)
    bounds = head_bounds(*arguments, **TRANSFORM)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert_within_bound(getattr(stats, name), getattr(oracle, name), bounds[name], what=name)
    assert torch.equal(stats.is_top1, oracle.is_top1)
    few = linear_token_stats(*arguments, outputs=("entropy",), impl=impl)
    assert few.mean_logits is None and few.entropy is not None


def test_columns_of_minus_infinity(impl):
    """A bias may forbid entries: whole slices of them leave numbers as they are, a label among them has -inf."""
    tensors, labels = make(N=9, H=8, V=77)
    labels = labels.clamp(min=0)
    labels[0], labels[1:] = 3, 40 + labels[1:] % 37
    forbidden = torch.arange(77) < 35
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"]
    bias = tensors["bias"].masked_fill(forbidden, -torch.inf)
    stats = linear_token_stats(hidden, weight, labels, bias=bias, impl=impl)
    (found,) = torch.autograd.grad(stats.logps[1:].sum(), hidden)
    z = hidden.double() @ weight.double().T + bias.double()
    expected = z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (true,) = torch.autograd.grad(expected[1:].sum(), hidden)
    torch.testing.assert_close(stats.logps, expected.float())
    torch.testing.assert_close(found[1:], true[1:])
    entropy = torch.distributions.Categorical(logits=z[:, ~forbidden]).entropy()
    torch.testing.assert_close(stats.entropy, entropy.float())
    none = linear_token_logps(hidden, weight, labels, bias=torch.full((77,), -torch.inf), impl=impl)
    assert (none == -torch.inf).all()


def test_sequence_sums_of_2000_bf16_tokens_stay_within_a_millinat(impl):
    N = 2000 if impl == "torch" else 200
    tensors, labels = make(N=N, H=64, V=501, dtype=torch.bfloat16)
    logps = linear_token_logps(tensors["hidden"], tensors["weight"], labels, impl=impl)
    oracle = linear_token_logps(tensors["hidden"].double(), tensors["weight"].double(), labels, impl="reference")
    assert abs(logps.double().sum() - oracle.sum()) < 1e-3


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_no_tokens_and_all_ignored_still_give_zero_gradients(impl):
    for labels in (torch.zeros(0, dtype=torch.int64), torch.full((3,), -100)):
        hidden = torch.randn(len(labels), 4, requires_grad=True)
        weight = torch.randn(7, 4, requires_grad=True)
        linear_token_logps(hidden, weight, labels, impl=impl).sum().backward()
        assert (hidden.grad == 0).all() and (weight.grad == 0).all() and weight.grad.shape == weight.shape


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "recompute"])
def test_ignored_tokens_where_they_are_computed(impl, needs, monkeypatch):
    """As on devices, where no one counts who is ignored: their rows are zero, also where exp of their logits is not."""
    monkeypatch.setattr(tile, "free_to_look", lambda x: False)
    tensors, labels = make(N=9, H=8, V=77)
    tensors = {k: tensors[k].mul_(40) if k == "hidden" else tensors[k] for k in ("hidden", "weight")}
    assert (tensors["hidden"] @ tensors["weight"].T)[labels == -100].max() > 89

    def gradients(impl, dtype):
        leaves = {k: v.to(dtype, copy=True).requires_grad_(k in needs) for k, v in tensors.items()}
        logps = linear_token_logps(**leaves, labels=labels, impl=impl)
        return torch.autograd.grad(logps.sum(), [leaves[k] for k in needs])

    bounds = head_bounds(**tensors, labels=labels, coefficient=1.0)
    found, true = gradients(impl, torch.float32), gradients("reference", torch.float64)
    for name, ours, exact in zip(needs, found, true, strict=True):
        assert_within_bound(ours, exact, bounds[name], what=name)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")], ids=["frozen", "recompute"])
def test_strided_inputs(impl, needs):
    tensors, labels = make(N=9, H=8, V=77)
    labels.clamp_(min=0)  # an ignored one would make the op gather the others
    tensors = {k: tensors[k] for k in ("hidden", "weight")}
    coefficient = torch.linspace(-1, 1, 9)

    def scores(hidden, weight, labels):
        return linear_token_logps(hidden, weight, labels, impl=impl, tile_mib=1)

    def strided(x):
        return torch.stack([x, x + 1], -1)[..., 0]

    def scores_of_strided(hidden, weight, labels):
        return scores(strided(hidden), weight.T.contiguous().T, strided(labels))

    expected = run(scores, tensors, labels, needs, coefficient)
    found = run(scores_of_strided, tensors, labels, needs, coefficient)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")])
def test_double_use_and_second_backward(needs):
    tensors, labels = make(N=5, H=8, V=33)
    leaves = [tensors[k].requires_grad_() for k in needs]
    logps = linear_token_logps(tensors["hidden"], tensors["weight"], labels)
    (logps.sum() + 2 * logps.sum()).backward(retain_graph=True)
    thrice = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    logps.sum().backward()
    for leaf, expected in zip(leaves, thrice, strict=True):
        torch.testing.assert_close(3 * leaf.grad, expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("needs", [(), ("hidden", "down"), NAMES], ids=["score", "frozen", "recompute"])
def test_an_adapter_in_fp32_on_a_head_in_16_bits_stays_in_fp32(needs, half):
    """As PEFT keeps it: log-probs as near as fp32 products are, where 16-bit factors are four digits further off."""
    tensors, labels = make(N=400, H=16, V=300)
    tensors |= {k: tensors[k].to(half) for k in ("hidden", "weight", "bias")}
    coefficient = torch.randn(len(labels), generator=make_generator(1))
    truth, d_true = run(ours("reference"), {k: v.double() for k, v in tensors.items()}, labels, needs, coefficient)
    found, d_found = run(ours("torch"), tensors, labels, needs, coefficient)
    plain, d_plain = run(eager, tensors, labels, needs, coefficient)
    assert_within_budget(found, plain, truth, what="logps")
    for name in needs:
        assert d_found[name].dtype == tensors[name].dtype
        assert_within_budget(d_found[name], d_plain[name], d_true[name], what=name)


@pytest.mark.parametrize("needs", [(), ("hidden", "down"), NAMES], ids=["score", "frozen", "recompute"])
def test_factors_of_any_dtype(impl, needs):
    """One wider than the other, and narrower than the head."""
    dtypes = torch.bfloat16, torch.float16, torch.float32, torch.float64
    tensors, labels = make(N=9, H=8, V=77)
    tensors |= {k: tensors[k].to(torch.bfloat16) for k in ("hidden", "weight", "bias")}
    for down, up in itertools.product(dtypes, dtypes):
        factors = {**tensors, "down": tensors["down"].to(down), "up": tensors["up"].to(up)}
        exact = {k: v.double() for k, v in factors.items()}
        logps, gradients = run(ours(impl), factors, labels, needs, torch.ones(9))
        truth, true = run(ours("reference"), exact, labels, needs, torch.ones(9))
        bounds = bounds_of(exact, labels, 1.0)
        assert_within_bound(logps, truth, bounds["logps"], what=f"{down} {up}")
        for name in needs:
            assert gradients[name].dtype == factors[name].dtype
            assert_within_bound(gradients[name], true[name], bounds[name], what=f"{name} {down} {up}")


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "weight")])
def test_a_gradient_of_the_gradient_raises(needs):
    tensors, labels = make(N=5, H=8, V=33)
    leaves = [tensors[k].requires_grad_() for k in needs]
    logps = linear_token_logps(tensors["hidden"], tensors["weight"], labels)
    (first, *_) = torch.autograd.grad(logps.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient has no derivative"):
        first.square().sum().backward()


def test_no_grad_inference_mode_and_checkpointing():
    tensors, labels = make(N=5, H=8, V=33)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    expected = linear_token_logps(hidden, weight, labels)
    with torch.no_grad():
        scored = linear_token_logps(hidden, weight, labels)
        assert torch.equal(scored, expected) and not scored.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear_token_logps(hidden, weight, labels), expected)
    again = torch.utils.checkpoint.checkpoint(
        lambda h, w: linear_token_logps(h, w, labels), hidden, weight, use_reentrant=False
    )
    first = torch.autograd.grad(expected.sum(), (hidden, weight))
    second = torch.autograd.grad(again.sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_takes_its_dtype_and_returns_gradients_in_the_parameters():
    tensors, labels = make(N=5, H=8, V=33)
    hidden, weight = tensors["hidden"].requires_grad_(), tensors["weight"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = linear_token_logps(hidden, weight, labels)
    rounded = linear_token_logps(hidden.bfloat16(), weight.bfloat16(), labels)
    assert logps.dtype == torch.float32 and torch.equal(logps, rounded)
    logps.sum().backward()
    assert weight.grad.dtype == torch.float32 and hidden.grad.dtype == torch.float32


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=["score", "frozen", "recompute"])
def test_autocast_leaves_fp64_alone(needs):
    tensors, labels = make(N=5, H=8, V=33, dtype=torch.float64)
    leaves = {k: tensors[k].requires_grad_(k in needs) for k in ("hidden", "weight")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = linear_token_logps(**leaves, labels=labels)
    assert torch.equal(logps, linear_token_logps(**leaves, labels=labels))


def test_tied_weights_get_both_gradients():
    _, labels = make(N=5, H=8, V=33)
    table = torch.randn(33, 8, requires_grad=True)
    tokens = torch.arange(5)
    linear_token_logps(table[tokens], table, labels).sum().backward()
    twin = table.detach().double().requires_grad_()
    linear_token_logps(twin[tokens], twin, labels, impl="reference").sum().backward()
    bounds = head_bounds(table[tokens].detach(), table.detach(), labels, coefficient=1.0)
    bound = bounds["weight"].index_add(0, tokens, bounds["hidden"])
    assert_within_bound(table.grad, twin.grad, bound + gamma(1) * twin.grad.abs())


@pytest.mark.parametrize("needs, gemms", [((), 1), (("hidden",), 2), (("hidden", "weight"), 4), (("weight",), 3)])
def test_flops_are_the_plans(needs, gemms, monkeypatch):
    """Counted twice: by the formulas that counters see, and inside the ops, product by product."""
    N, H, V = 300, 64, 2000
    tensors, _ = make(N=N, H=H, V=V)
    labels = torch.arange(N)
    leaves = {k: tensors[k].requires_grad_(k in needs) for k in ("hidden", "weight")}

    def count() -> int:
        with FlopCounterMode(display=False) as counter:
            logps = linear_token_logps(leaves["hidden"], leaves["weight"], labels, tile_mib=1)
            if needs:
                logps.sum().backward()
        return counter.get_total_flops()

    plan = plan_head(N, H, V, hidden_grad="hidden" in needs, head_grad="weight" in needs, separable=False)
    assert plan.gemms == gemms and count() == plan.flops

    products = []
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, counted(getattr(torch, name), products))
    count()
    assert abs(sum(products) / plan.flops - 1) < 0.02


def counted(function, products):
    def call(*arguments, **keywords):
        a, b = arguments[-2:]
        products.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return function(*arguments, **keywords)

    return call


@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=["score", "frozen", "recompute"])
def test_opcheck_and_compile(needs):
    tensors, labels = make(N=6, H=8, V=33)
    tensors = {k: v.requires_grad_(k in needs) for k, v in tensors.items() if k in ("hidden", "weight")}

    def loss(hidden, weight):
        return linear_token_logps(hidden, weight, labels, tile_mib=1).sum() * 2

    plan = ["score", "frozen", "recompute"][len(needs)]
    op = torch.ops.dpo_fast.linear_token_logps_fwd.default
    without_backward = ("test_schema", "test_faketensor")  # statistics have none
    for stats, tests in (((), None), (("entropy",), without_backward)):
        call = Call(Transform(), -100, stats, "torch", plan, 1, torch.float32)
        arguments = (*tensors.values(), None, None, None, labels, *call.flat())
        torch.library.opcheck(op, arguments, **({} if tests is None else {"test_utils": tests}))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, found = loss(**tensors), compiled(**tensors)
    assert torch.equal(expected, found)
    if needs:
        leaves = [tensors[k] for k in needs]
        for a, b in zip(torch.autograd.grad(expected, leaves), torch.autograd.grad(found, leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["entropy", "mean_logits", "log_sum_sq_probs"])
@pytest.mark.parametrize("trains", [("hidden",), ("hidden", "weight")], ids=["frozen", "recompute"])
def test_statistics_are_no_constants_in_a_backward(name, trains):
    """One by way of them raises; in a compiled graph, which cannot, it leaves NaN."""
    tensors, labels = make(N=6, H=8, V=33)
    tensors = {k: v.requires_grad_(k in trains) for k, v in tensors.items() if k in ("hidden", "weight")}

    def stats():
        return linear_token_stats(tensors["hidden"], tensors["weight"], labels, outputs=[name])

    found = stats()
    with pytest.raises(RuntimeError, match="linear_token_stats: a gradient by way of a statistic .*Detach it"):
        (found.logps.sum() - 0.1 * getattr(found, name).sum()).backward()
    scored = int((labels != -100).nonzero()[1])
    for terms, wrong in (([], []), ([scored], [scored])):
        tensors["hidden"].grad, found = None, torch.compile(stats, backend="aot_eager")()
        (found.logps.sum() - sum(getattr(found, name)[i] for i in terms)).backward()
        assert tensors["hidden"].grad.isnan().any(1).nonzero().flatten().tolist() == wrong


BAD = {
    "labels too large": (lambda t, y: dict(labels=y.clamp(min=0) + 77), ValueError, "outside"),
    "float labels": (lambda t, y: dict(labels=y.float()), TypeError, "labels must have one of the dtypes"),
    "weight shape": (lambda t, y: dict(weight=t["weight"][:, 1:]), ValueError, r"weight must have shape \(V, 8\)"),
    "weight dtype": (lambda t, y: dict(weight=t["weight"].bfloat16()), TypeError, "cast one, or enable autocast"),
    "integer hidden": (lambda t, y: dict(hidden=t["hidden"].long()), TypeError, "hidden must have one of"),
    "hidden 3d": (lambda t, y: dict(hidden=t["hidden"][None]), ValueError, r"hidden must have shape \(N, H\)"),
    "bias": (lambda t, y: dict(bias=t["bias"][1:]), ValueError, r"bias must have shape \(77\)"),
    "low rank": (lambda t, y: dict(low_rank=(t["down"], t["up"][:, 1:])), ValueError, r"low_rank\[1\] must have"),
    "tile": (lambda t, y: dict(tile_mib=0), ValueError, "tile_mib must be an int of at least 1"),
    "tile that is text": (lambda t, y: dict(tile_mib="64"), ValueError, "tile_mib must be an int .* got '64'"),
    "scale": (lambda t, y: dict(logit_scale=float("inf")), ValueError, "logit_scale must be finite"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_bad_input_is_named(case, impl):
    tensors, labels = make(N=5, H=8, V=77)
    change, error, message = BAD[case]
    arguments = dict(hidden=tensors["hidden"], weight=tensors["weight"], labels=labels, impl=impl)
    with pytest.raises(error, match=message):
        linear_token_logps(**{**arguments, **change(tensors, labels)})
