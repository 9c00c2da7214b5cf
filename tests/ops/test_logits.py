"""Level 1 against the fp64 oracle: values, every statistic, every gradient, each implementation."""

import pytest
import torch

from dpo_fast import logits_token_logps, logits_token_stats
from dpo_fast.ops.call import Call
from dpo_fast.ops.impl_torch import row_blocks
from dpo_fast.ops.impl_triton import row_strides
from dpo_fast.ops.oracle import oracle_token_stats
from dpo_fast.ops.softmax import Transform
from dpo_fast.ops.stats import STATS
from dpo_fast.testing import assert_within_bound, assert_within_budget, make_generator, make_logits, token_bounds

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = [{}, {"logit_softcap": 5.0}, {"temperature": 0.7}, {"logit_softcap": 30.0, "temperature": 1.3}]


def eager(logits, labels, ignore_index=-100, logit_softcap=None, temperature=1.0):
    """What a user would write, in fp32 as TRL does for full logits."""
    z = logits.float()
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    ignored = labels == ignore_index
    logps = log_p.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1)
    p = log_p.exp()
    stats = {
        "entropy": -(p * log_p).sum(-1),
        "mean_logits": (z / temperature).mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
    }
    return logps.masked_fill(ignored, 0), {k: v.masked_fill(ignored, 0) for k, v in stats.items()}


def gradients(function, logits, coefficient):
    leaf = logits.clone().requires_grad_()
    logps = function(leaf)
    return logps.detach(), torch.autograd.grad((logps * coefficient.to(logps.dtype)).sum(), leaf)[0]


def check_values_and_gradients(impl, transform, logits, labels, budget):
    coefficient = torch.randn(len(labels), generator=make_generator(1))

    def oracle(x):
        return oracle_token_stats(x, labels, **transform).logps

    logps, d_logits = gradients(lambda x: logits_token_logps(x, labels, impl=impl, **transform), logits, coefficient)
    true_logps, true_d = gradients(oracle, logits.double(), coefficient)
    assert logps.dtype == torch.float32 and d_logits.dtype == logits.dtype
    bounds = token_bounds(logits, labels, **transform)
    assert_within_bound(logps, true_logps, bounds["logps"], what="logps")
    assert_within_bound(d_logits, true_d, coefficient.abs()[:, None] * bounds["direction"], what="d_logits")
    assert (logps[labels == -100] == 0).all() and (d_logits[labels == -100] == 0).all()
    if budget:
        eager_logps, eager_d = gradients(lambda x: eager(x, labels, **transform)[0], logits, coefficient)
        assert_within_budget(logps, eager_logps, true_logps, what="logps")
        assert_within_budget(d_logits, eager_d, true_d, what="d_logits")


def check_statistics(impl, transform, logits, labels, budget):
    stats = logits_token_stats(logits, labels, impl=impl, **transform)
    oracle = oracle_token_stats(logits, labels, **transform)
    bounds = token_bounds(logits, labels, **transform)
    _, peer = eager(logits, labels, **transform)
    for name in ("entropy", "mean_logits", "log_sum_sq_probs"):
        value, truth = getattr(stats, name), getattr(oracle, name)
        assert_within_bound(value, truth, bounds[name], what=name)
        if budget:
            assert_within_budget(value, peer[name], truth, what=name)
        assert not value.requires_grad
    assert torch.isfinite(stats.entropy).all()
    assert torch.equal(stats.is_top1, oracle.is_top1) and stats.is_top1.dtype == torch.bool


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 5003), (4, 1024)], ids=str)
def test_values_and_gradients_are_within_their_bounds(impl, transform, dtype, shape):
    check_values_and_gradients(impl, transform, *make_logits(*shape, dtype=dtype), budget=False)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_within_the_budget(transform, dtype):
    check_values_and_gradients("torch", transform, *make_logits(1000, 127, dtype=dtype), budget=True)


def test_the_kernels_are_within_the_budget():
    """Once: a row is a program, and the interpreter takes milliseconds for one."""
    logits, labels = make_logits(300, 127, ignored=0.05)
    check_values_and_gradients("triton", TRANSFORMS[3], logits, labels, budget=True)
    check_statistics("triton", TRANSFORMS[3], logits, labels, budget=True)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_statistics_are_within_their_bounds(impl, transform):
    logits, labels = make_logits(6, 5003)
    logits[1, 100:200] = -torch.inf  # 0 log 0
    logits[2, labels[2].clamp(min=0)] = 50.0  # a hit
    check_statistics(impl, transform, logits, labels, budget=False)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_statistics_are_within_the_budget(transform):
    check_statistics("torch", transform, *make_logits(1000, 127), budget=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_each_statistic_alone_equals_all_together(impl):
    logits, labels = make_logits(3, 300)
    together = logits_token_stats(logits, labels, impl=impl)
    for name in STATS:
        alone = logits_token_stats(logits, labels, outputs=(name,), impl=impl)
        assert torch.equal(getattr(alone, name), getattr(together, name))
        assert [other for other in STATS if getattr(alone, other) is not None] == [name]


@pytest.mark.parametrize("impl", IMPLS)
def test_top1_of_a_tie_is_the_first(impl):
    logits = torch.zeros(3, 40)
    logits[:, [7, 21]] = 3.0
    stats = logits_token_stats(logits, torch.tensor([7, 21, 3]), outputs=("is_top1",), impl=impl)
    assert stats.is_top1.tolist() == [True, False, False]


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_keep_their_digits(impl):
    """logp = (z - max) - log sum: adding max and log sum first would round to 6e-5 at 1000."""
    logits, labels = make_logits(4, 300, ignored=0.0)
    exact = logits_token_logps(logits, labels, impl=impl)
    shifted = logits_token_logps((logits * 64).round() / 64 + 1024, labels, impl=impl)
    oracle = logits_token_logps((logits * 64).round() / 64, labels, impl=impl)
    assert torch.equal(shifted, oracle)
    assert (exact - oracle).abs().max() < 0.1


@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_logits(impl):
    logits = torch.zeros(3, 9)
    logits[0] = -torch.inf
    logits[1, 4] = -torch.inf
    logits.requires_grad_()
    logps = logits_token_logps(logits, torch.tensor([2, 4, 4]), impl=impl)
    assert logps[:2].tolist() == [-torch.inf, -torch.inf]
    torch.testing.assert_close(logps[2].item(), -torch.log(torch.tensor(9.0)).item())
    logps[2].backward()
    assert torch.isfinite(logits.grad[1:]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_soft_cap_does_not_let_padding_columns_into_the_sum(impl):
    """127 columns in blocks of 128 or more: a capped -inf would be -1 and count."""
    logits = torch.zeros(1, 127)
    logp = logits_token_logps(logits, torch.tensor([0]), logit_softcap=1.0, impl=impl)
    torch.testing.assert_close(logp, -torch.log(torch.tensor([127.0])))


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    base, labels = make_logits(24, 33)
    leaf = base.clone().requires_grad_()
    expected = logits_token_logps(leaf, labels, impl=impl)
    expected.sum().backward()
    expected, gradient = expected.detach(), leaf.grad
    wide = torch.full((2, 13, 33), torch.nan)
    wide[:, :12] = base.view(2, 12, 33)
    cases = {
        "sliced time": (wide[:, :12], labels.view(2, 12)),
        "transposed vocabulary": (base.T.contiguous().T, labels),
        "every second row": (torch.stack([base, base * torch.nan], 1).flatten(0, 1)[::2], labels),
        "three dimensions": (base.view(2, 3, 4, 33), labels.view(2, 3, 4)),
        "transposed rows": (base.view(4, 6, 33).transpose(0, 1), labels.view(4, 6).T),
    }
    for name, (logits, y) in cases.items():
        for inplace in (False, True):
            leaf = logits.detach().clone() if inplace else logits.detach()
            leaf.requires_grad_()
            view = leaf * 1.0 if inplace else leaf  # keeps the strides
            logps = logits_token_logps(view, y, inplace_backward=inplace, impl=impl)
            logps.sum().backward()
            transposed = name == "transposed rows"
            aligned, d = (logps.T, leaf.grad.transpose(0, 1)) if transposed else (logps, leaf.grad)
            assert torch.equal(aligned.reshape(-1), expected), name
            assert torch.equal(d.reshape(gradient.shape), gradient), name


def test_rows_that_need_a_copy_are_refused():
    x = torch.zeros(4, 5, 6, 7).permute(2, 0, 1, 3)[:, ::2]
    with pytest.raises(ValueError, match="contiguous"):
        row_strides(x[..., ::2, :])
    assert row_strides(torch.zeros(4, 6, 7)[:, :5]) == (4, 5, 42, 7)
    assert row_strides(torch.zeros(7)) == (1, 1, 0, 0)


def test_row_blocks_cover_each_row_once():
    x = torch.arange(3 * 5 * 2.0).view(3, 5, 2)[:, 1:]
    seen = torch.full((12,), -1.0)
    for block, where in row_blocks(x, 3):
        assert block.data_ptr() >= x.data_ptr() and block._is_view()
        seen[where] = block[:, 0]
    assert torch.equal(seen, x[..., 0].reshape(-1))


@pytest.mark.parametrize("impl", IMPLS)
def test_inplace_backward_overwrites_the_logits_once(impl):
    logits, labels = make_logits(4, 50)
    expected = logits.clone().requires_grad_()
    logits_token_logps(expected, labels, impl=impl).sum().backward()
    source = logits.clone().requires_grad_()
    hidden = source * 1.0
    logps = logits_token_logps(hidden, labels, inplace_backward=True, impl=impl)
    logps.sum().backward(retain_graph=True)
    assert torch.equal(source.grad, expected.grad)
    assert torch.equal(hidden.detach(), expected.grad), "the gradient lies where the logits were"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_accumulates_the_same_gradient(impl):
    logits, labels = make_logits(4, 50)
    logits.requires_grad_()
    logps = logits_token_logps(logits, labels, impl=impl)
    logps.sum().backward(retain_graph=True)
    first = logits.grad.clone()
    logps.sum().backward()
    assert torch.equal(logits.grad, 2 * first)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_empty_and_all_ignored(impl):
    empty = logits_token_logps(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), impl=impl)
    assert empty.shape == (0,)
    logits = torch.full((2, 7), torch.nan, requires_grad=True)  # ignored rows may hold anything
    logps = logits_token_logps(logits, torch.full((2,), -100), impl=impl)
    assert logps.tolist() == [0, 0]
    if impl != "reference":
        logps.sum().backward()
        assert (logits.grad == 0).all()


def test_gradcheck():
    logits = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, -100, 6])
    assert torch.autograd.gradcheck(
        lambda x: logits_token_logps(x, labels, logit_softcap=2.0, temperature=0.5, impl="torch"), (logits,)
    )


def test_many_rows():
    """More rows than a grid's y and z dimensions hold."""
    logits, labels = make_logits(70_001, 3)
    oracle = oracle_token_stats(logits, labels).logps
    found = logits_token_logps(logits, labels, impl="torch")
    assert_within_budget(found, eager(logits, labels)[0], oracle)
    assert_within_bound(found, oracle, token_bounds(logits, labels)["logps"])


def test_the_eager_path_makes_no_copy_of_the_logits():
    """Peak memory beyond the inputs stays near one block, for 16 times as much logits."""
    from torch.profiler import ProfilerActivity, profile

    logits, labels = make_logits(512, 32_000, dtype=torch.bfloat16)
    logits.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        logits_token_logps(logits, labels, impl="torch")
    largest = max(abs(event.cpu_memory_usage) for event in trace.events())
    assert largest <= 8 << 20, f"a {largest >> 20} MiB allocation; the fp32 logits are {logits.numel() * 4 >> 20} MiB"


@pytest.mark.parametrize("impl", IMPLS)
def test_compile_has_no_graph_break(impl):
    logits, labels = make_logits(4, 50)

    def loss(x):
        return logits_token_logps(x, labels, inplace_backward=True, impl=impl).mul(2).sum()

    expected = logits.clone().requires_grad_()
    loss(expected).backward()
    compiled = logits.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    assert torch.equal(compiled.grad, expected.grad)


def test_opcheck():
    logits, labels = make_logits(4, 50)
    op, logits = torch.ops.dpo_fast.logits_token_logps_fwd.default, logits.requires_grad_()
    transform = Transform(softcap=5.0, temperature=0.7)
    torch.library.opcheck(op, (logits, labels, *Call(transform, -100, (), "torch").flat(), False))
    without_backward = ("test_schema", "test_faketensor")  # statistics have none
    with_statistics = (logits, labels, *Call(transform, -100, ("entropy", "is_top1"), "torch").flat(), False)
    torch.library.opcheck(op, with_statistics, test_utils=without_backward)


STATISTICS = ("entropy", "mean_logits", "log_sum_sq_probs")


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_are_no_constants_in_a_backward(name):
    """One by way of them raises; in a compiled graph, which cannot, it leaves NaN; the oracle differentiates them."""
    logits, labels = make_logits(4, 50)
    logits.requires_grad_()
    stats = logits_token_stats(logits, labels, impl="torch")
    with pytest.raises(RuntimeError, match="logits_token_stats: a gradient by way of a statistic .*Detach it"):
        (stats.logps.sum() - 0.1 * getattr(stats, name).sum()).backward()
    (stats.logps.sum() - 0.1 * getattr(stats, name).detach().sum()).backward()
    assert logits.grad.isfinite().all()

    compiled = torch.compile(lambda: logits_token_stats(logits, labels, impl="torch"), backend="aot_eager")
    for terms, wrong in (([], []), ([1], [1])):
        logits.grad, stats = None, compiled()
        (stats.logps.sum() - sum(getattr(stats, name)[i] for i in terms)).backward()
        assert logits.grad.isnan().any(1).nonzero().flatten().tolist() == wrong

    d = torch.autograd.grad(getattr(logits_token_stats(logits, labels, impl="reference"), name).sum(), logits)[0]
    assert d.abs().max() > 0


BAD = {
    "integer logits": (lambda x, y: dict(logits=x.long(), labels=y), TypeError, "logits must have one of the dtypes"),
    "float labels": (lambda x, y: dict(logits=x, labels=y.float()), TypeError, "labels must have one of the dtypes"),
    "a list": (lambda x, y: dict(logits=x, labels=[1]), TypeError, "labels must be a tensor, got list"),
    "shape": (lambda x, y: dict(logits=x, labels=y[:2]), ValueError, r"labels must have shape \(3\), got \(2,\)"),
    "device": (lambda x, y: dict(logits=x, labels=y.to("meta")), ValueError, "labels is on meta"),
    "scalar": (lambda x, y: dict(logits=x.sum(), labels=y.sum()), ValueError, "logits must have shape"),
    "label too large": (lambda x, y: dict(logits=x, labels=y + 9), ValueError, "outside"),
    "negative label": (lambda x, y: dict(logits=x, labels=y - 7), ValueError, "outside"),
    "temperature": (lambda x, y: dict(logits=x, labels=y, temperature=0.0), ValueError, "temperature"),
    "softcap": (lambda x, y: dict(logits=x, labels=y, logit_softcap=-1.0), ValueError, "logit_softcap"),
    "expanded": (lambda x, y: dict(logits=x[:1].expand(3, 9), labels=y, inplace_backward=True), ValueError, "expanded"),
    "impl": (lambda x, y: dict(logits=x, labels=y, impl="cuda"), ValueError, "'auto', 'triton', 'torch', 'reference'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_bad_input_is_named(case, impl):
    make, error, message = BAD[case]
    arguments = {"impl": impl, **make(torch.zeros(3, 9), torch.tensor([0, 1, 2]))}
    with pytest.raises(error, match=message):
        logits_token_logps(**arguments)


OWN_MEMORY = {
    "rows that overlap": (lambda base: base.as_strided((4, 7), (1, 1)), False),
    "rows that overlap by one": (lambda base: base.as_strided((3, 7), (6, 1)), False),
    "one row": (lambda base: base.as_strided((1, 7), (0, 1)), True),
    "transposed": (lambda base: base[:28].view(7, 4).T, True),
    "every other": (lambda base: base[:56].view(4, 14)[:, ::2], True),
    "every other row": (lambda base: base[:56].view(8, 7)[::2], True),
    "a slice": (lambda base: base[:60].view(4, 15)[:, 3:10], True),
    "no rows": (lambda base: base.as_strided((0, 7), (0, 1)), True),
    "no rows of one place": (lambda base: base.as_strided((0, 7), (0, 0)), True),
}


@pytest.mark.parametrize("case", OWN_MEMORY)
def test_a_gradient_is_written_over_memory_of_one_s_own(case):
    view, fits = OWN_MEMORY[case]
    base = torch.randn(64, generator=make_generator(), requires_grad=True)
    labels = torch.arange(view(base).shape[0]) % 7
    (expected,) = torch.autograd.grad(logits_token_logps(view(base * 1), labels).sum(), base)
    if not fits:
        with pytest.raises(ValueError, match="inplace_backward needs logits with memory of their own, got shape"):
            logits_token_logps(view(base * 1), labels, inplace_backward=True)
        return
    (found,) = torch.autograd.grad(logits_token_logps(view(base * 1), labels, inplace_backward=True).sum(), base)
    torch.testing.assert_close(found, expected)


def test_unknown_output_is_named():
    with pytest.raises(ValueError, match="outputs must be a sequence of names from entropy"):
        logits_token_stats(torch.zeros(1, 2), torch.tensor([0]), outputs=("entropie",))


def test_fp64_in_triton_is_refused():
    with pytest.raises(ValueError, match="not float64"):
        logits_token_logps(torch.zeros(1, 2).double(), torch.tensor([0]), impl="triton")


def test_non_finite_logits_are_refused_when_checking_is_on(monkeypatch):
    logits = torch.zeros(2, 3)
    logits[1, 1] = torch.nan
    labels = torch.tensor([0, 1])
    assert logits_token_logps(logits, labels).isnan().tolist() == [False, True]
    monkeypatch.setenv("DPO_FAST_CHECK", "1")
    with pytest.raises(ValueError, match="logits holds 1 non-finite of 6 values"):
        logits_token_logps(logits, labels)


def test_kernels_never_read_at_a_label_out_of_range():
    """The launchers, without the check that CPU tensors get: NaN rows, and the neighbours are unharmed."""
    from dpo_fast.kernels.numerics import Knobs
    from dpo_fast.kernels.token_logps import token_logps_bwd, token_logps_fwd

    logits, _ = make_logits(4, 20)
    labels = torch.tensor([3, 20, -1, 2**40])
    out = {name: torch.empty(4) for name in ("logps", "row_max", "log_sum", "is_top1")}
    token_logps_fwd(logits, row_strides(logits), labels, out, Knobs())
    assert out["logps"].isnan().tolist() == [False, True, True, True]
    d_logits = torch.empty_like(logits)
    rows = row_strides(logits)
    token_logps_bwd(logits, d_logits, rows, rows, labels, out["row_max"], out["log_sum"], torch.ones(4), Knobs())
    assert d_logits.isnan().all(-1).tolist() == [False, True, True, True]
