"""Attention over a packed row against one sequence at a time, in fp64, values and gradients."""

import importlib.util
import inspect
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex
from trees import TREES, pairs_as_trees, sees

from dpo_fast import attention, flash
from dpo_fast.attention import shared_prefix_attention
from dpo_fast.block_mask import block_mask
from dpo_fast.layout import SharedPrefixLayout, make_layout

PAIRS = [(5, 3, 4), (0, 2, 3), (7, 0, 2), (1, 1, 1)]
ROWS = {"pairs": pairs_as_trees(PAIRS), "trees": TREES["all in one row"]}
KINDS = {
    "plain": {},
    "window": dict(window=3),
    "soft-cap": dict(softcap=2.0),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "all": dict(window=4, softcap=2.0, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


def make(kv_heads=2, dtype=torch.float64, requires_grad=True, row="pairs"):
    generator = torch.Generator().manual_seed(0)
    layout = SharedPrefixLayout.make(*ROWS[row])
    shapes = [(1, heads, layout.length, 8) for heads in (4, kv_heads, kv_heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return layout, [x.requires_grad_(requires_grad) for x in tensors]


def oracle(query, key, value, layout, scaling, window=None, softcap=None, sinks=None):
    """Each query by itself: which keys it sees follows from the sequences."""
    seen = sees(layout, window)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    out = torch.empty_like(query)
    for q in range(layout.length):
        keys = seen[q].nonzero().squeeze(1)
        scores = (query[:, :, q : q + 1] * key[:, :, keys]).sum(-1) * scaling  # (1, heads, keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        extra = [] if sinks is None else [sinks.to(scores).view(1, -1, 1)]
        weights = torch.cat([scores, *extra], -1).softmax(-1)[..., : len(keys)]
        out[:, :, q] = (weights.unsqueeze(-1) * value[:, :, keys]).sum(2)
    return out.transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_eager(row, kind, kv_heads):
    layout, inputs = make(kv_heads, row=row)
    out = shared_prefix_attention(*inputs, layout, scaling=0.3, **KINDS[kind])
    expected = oracle(*inputs, layout, 0.3, **KINDS[kind])
    tolerance = dict(rtol=1e-6, atol=1e-7) if "softcap" in KINDS[kind] or "sinks" in KINDS[kind] else {}
    torch.testing.assert_close(out, expected, **tolerance)  # where softmax is in fp32, as models have it
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    found, true = (torch.autograd.grad((x * cotangent).sum(), inputs) for x in (out, expected))
    for a, b in zip(found, true, strict=True):
        torch.testing.assert_close(a, b, **(tolerance and dict(rtol=1e-5, atol=1e-6)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_flex_forward(row, kind):
    """It has no backward on CPU; that is left to a GPU."""
    layout, inputs = make(dtype=torch.float32, requires_grad=False, row=row)
    out = shared_prefix_attention(*inputs, layout, scaling=0.3, implementation="flex", **KINDS[kind])
    torch.testing.assert_close(out, oracle(*inputs, layout, 0.3, **KINDS[kind]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_sinks_in_flex(row, kind, monkeypatch):
    """torch's mathematics of FlexAttention and of the gradient of its log-sum-exp, which on CPU it does not offer."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    layout, inputs = make(row=row)
    inputs.append(torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True))
    results = []
    for implementation in ("flex", "eager"):
        knobs = {**KINDS[kind], "sinks": inputs[3], "implementation": implementation}
        out = shared_prefix_attention(*inputs[:3], layout, scaling=0.3, **knobs)
        cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        results.append((out, *torch.autograd.grad((out * cotangent).sum(), inputs)))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm()  # eager's softmax is in fp32, as models have it


@pytest.mark.parametrize("kind", ["plain", "window"])
@pytest.mark.parametrize("row", ROWS)
def test_varlen_arguments(row, kind, monkeypatch):
    """What torch's kernel is handed, computed by the book: bottom-right causal runs of queries and keys."""

    def by_the_book(query, key, value, query_ends, key_ends, max_q, max_k, *, scale, window_size, enable_gqa):
        runs = []
        groups = query.shape[1] // key.shape[1]
        assert enable_gqa == (groups > 1)
        for (q0, q1), (k0, k1) in zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True):
            n, m = q1 - q0, k1 - k0
            assert n <= max_q and m <= max_k
            k, v = (x[k0:k1].repeat_interleave(groups, 1).transpose(0, 1) for x in (key, value))
            back = torch.arange(n)[:, None] + (m - n) - torch.arange(m)
            left, right = window_size
            hidden = (back < -right) | ((back > left) if left >= 0 else False)
            scores = (query[q0:q1].transpose(0, 1) @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
            runs.append((scores.softmax(-1) @ v).transpose(0, 1))
        return torch.cat(runs)

    monkeypatch.setattr(attention, "_on_gpu", lambda query: True)
    monkeypatch.setattr(flash, "HALF", (torch.float64,))
    monkeypatch.setattr(flash, "missing", lambda name: "")
    monkeypatch.setitem(flash._FUNCTIONS, "varlen", by_the_book)
    layout, inputs = make(row=row)
    out = shared_prefix_attention(*inputs, layout, scaling=0.3, implementation="varlen", **KINDS[kind])
    expected = oracle(*inputs, layout, 0.3, **KINDS[kind])
    torch.testing.assert_close(out, expected)
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    found, true = (torch.autograd.grad((x * cotangent).sum(), inputs) for x in (out, expected))
    torch.testing.assert_close(found, true)


def test_torchs_varlen_attention_is_called_as_it_is_declared():
    """Whichever torch this is: seven arguments by position, then causality by a window or by name, or there is none."""
    missing = flash.missing("varlen")
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        assert missing == "this torch has no variable-length attention"
        return
    signature = inspect.signature(flash._FUNCTIONS["varlen"])
    signature.bind(*range(7), **flash._options_of_torch(attention.Scores(1.0, 3), 2))
    assert list(signature.parameters)[3:7] == ["cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert "enable_gqa" not in signature.parameters or "window_size" in signature.parameters


def cuda_inputs(layout, heads=8, kv_heads=2, width=64, value_width=None, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width or width))
    inputs = [torch.randn((1, h, layout.length, w), generator=generator, device="cuda") for h, w in shapes]
    return [x.to(dtype).requires_grad_() for x in inputs]


def errors(inputs, layout, implementation, scaling=0.125, **knobs):
    """Relative error of the output and of each gradient against eager in fp64."""
    results = []
    for name, tensors in ((implementation, inputs), ("eager", [x.detach().double().requires_grad_() for x in inputs])):
        out = shared_prefix_attention(*tensors, layout, scaling=scaling, implementation=name, **knobs)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), tensors)))
    return [((ours.double() - true).norm() / true.norm()).item() for ours, true in zip(*results, strict=True)]


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [*flash.NAMES, "flex"])
@pytest.mark.parametrize("kind", ["plain", "window", "soft-cap", "sinks"])
def test_cuda(implementation, kind):
    layout = make_layout([(300, 200, 100), (0, 50, 70), (513, 1, 0)]).to("cuda")
    inputs = cuda_inputs(layout)
    knobs = {**KINDS[kind], **({"window": 64} if kind == "window" else {})}
    if kind == "sinks":
        knobs["sinks"] = torch.linspace(-2, 3, 8, device="cuda")
    reasons = attention.reasons_against_implementation(
        implementation, inputs[0], attention.Scores(scaling=0.125, **knobs), *inputs[1:]
    )
    if reasons:
        pytest.skip("; ".join(reasons))
    assert max(errors(inputs, layout, implementation, **knobs)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_cuda_grouped_heads(kv_heads):
    """By the rule's choice: flash attention where torch has it, with or without enable_gqa in its signature."""
    layout = make_layout([(300, 200, 100), (5, 1, 1), (40, 0, 70)]).to("cuda")
    inputs = cuda_inputs(layout, kv_heads=kv_heads)
    chosen = attention.choose_implementation(inputs[0], attention.Scores(scaling=0.125), *inputs[1:])
    if not flash.missing("varlen") and not torch.version.hip and torch.cuda.get_device_capability() >= (8, 0):
        assert chosen in flash.NAMES
    assert max(errors(inputs, layout, None)) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "width, value_width, dtype, softcap",  # few that compile FlexAttention: half a minute each
    [
        (8, 8, torch.bfloat16, None),
        (12, 12, torch.bfloat16, None),
        (24, 8, torch.bfloat16, None),
        (192, 128, torch.bfloat16, None),
        (256, 256, torch.bfloat16, 5.0),
        (512, 512, torch.bfloat16, None),
        (512, 512, torch.bfloat16, 5.0),
        (64, 64, torch.float16, None),
        (64, 64, torch.float32, None),
        (8, 8, torch.float32, None),
        (256, 256, torch.float32, None),
    ],
)
def test_cuda_head_widths(width, value_width, dtype, softcap):
    """What the rule chooses runs, forward and backward, with a window and without."""
    torch.compiler.reset()  # past eight graphs Dynamo compiles no more
    layout = make_layout([(200, 60, 90), (0, 50, 70), (130, 1, 0)]).to("cuda")
    inputs = cuda_inputs(layout, width=width, value_width=value_width, dtype=dtype)
    for window in (None, 33):
        found = errors(inputs, layout, None, scaling=width**-0.5, window=window, softcap=softcap)
        assert max(found) < {torch.bfloat16: 2e-2, torch.float16: 2.5e-3, torch.float32: 1e-5}[dtype]


@pytest.mark.gpu
def test_cuda_autocast():
    layout = make_layout([(300, 200, 100), (0, 50, 70)]).to("cuda")
    inputs = cuda_inputs(layout, dtype=torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        mixed = [inputs[0], inputs[1], inputs[2].bfloat16()]
        out = shared_prefix_attention(*mixed, layout, scaling=0.125)
    assert out.dtype == torch.bfloat16
    true = shared_prefix_attention(*(x.double() for x in inputs), layout, scaling=0.125, implementation="eager")
    assert (out - true).norm() / true.norm() < 1e-2


@pytest.mark.gpu
def test_cuda_waits_for_nothing():
    """A layer's attention reads nothing back, its masks and their blocks included."""
    layout = make_layout([(300, 200, 100), (0, 50, 70)]).to("cuda")
    inputs = [x.detach() for x in cuda_inputs(layout)]
    for knobs in ({}, dict(window=64), dict(softcap=5.0)):
        shared_prefix_attention(*inputs, layout, scaling=0.125, **knobs)  # compiles
        layout.copies.clear()
        layout.kept.masks.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            shared_prefix_attention(*inputs, layout, scaling=0.125, **knobs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_nothing_is_read_back(monkeypatch):
    """A tensor on the meta device has no values: to read one raises."""
    layout = make_layout([(300, 200, 100), (0, 50, 70)]).to("meta")
    inputs = [torch.empty((1, heads, layout.length, 16), device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    monkeypatch.setattr(attention, "_on_gpu", lambda query: True)
    monkeypatch.setattr(flash, "missing", lambda name: "")
    monkeypatch.setattr(flash, "takes", lambda name, option: True)
    for name in flash.NAMES:
        monkeypatch.setitem(flash._FUNCTIONS, name, lambda query, key, value, *rest, **more: query)
    for knobs in ({}, dict(window=3), dict(window=700)):
        for implementation in ("eager", *flash.NAMES):
            out = shared_prefix_attention(*inputs, layout, scaling=1.0, implementation=implementation, **knobs)
            assert out.shape == (1, layout.length, 4, 16)
        block_mask(layout, knobs.get("window"))


def test_empty_row():
    layout = make_layout([(0, 0, 0)])
    query, key, value = (torch.empty(1, heads, 0, width) for heads, width in ((4, 8), (2, 8), (2, 6)))
    assert shared_prefix_attention(query, key, value, layout, scaling=1.0).shape == (1, 0, 4, 6)


def test_stand_in_mask_can_only_poison():
    """A model's forward takes it as prepared; what read it would compute NaN."""
    inputs = attention.model_inputs(make_layout(PAIRS), torch.device("cpu"))
    assert inputs["attention_mask"].shape == (1, 1, 1, 1) and inputs["attention_mask"].isnan().all()


def test_choice_and_errors(monkeypatch):
    layout, inputs = make(requires_grad=False)
    assert attention.choose_implementation(inputs[0]) == "eager"
    with pytest.raises(ValueError, match="the layout is of one row of"):
        shared_prefix_attention(inputs[0][:, :, 1:], *inputs[1:], layout, scaling=1.0)
    with pytest.raises(ValueError, match="takes no soft-cap"):
        shared_prefix_attention(*inputs, layout, scaling=1.0, softcap=1.0, implementation="varlen")
    with pytest.raises(ValueError, match="implementation must be one of flash_attn_3, .*, eager, got 'fast'"):
        shared_prefix_attention(*inputs, layout, scaling=1.0, implementation="fast")
    monkeypatch.setenv("DPO_FAST_ATTENTION", "fast")
    with pytest.raises(ValueError, match="DPO_FAST_ATTENTION must be one of flash_attn_3, .*, eager, got 'fast'"):
        attention.choose_implementation(inputs[0])
