"""`torch.compile` over a whole model on packed rows: few graphs, whatever the lengths and the numbers of pairs."""

import random
import sys
import types

import pytest
import torch
from test_attention import KINDS, ROWS, make
from tiny import tiny_model

from dpo_fast import attention, flash
from dpo_fast.attention import shared_prefix_attention
from dpo_fast.batch import TokenPair
from dpo_fast.forward import attach
from dpo_fast.layout import SharedPrefixLayout, shared_prefix_batch
from dpo_fast.objective import Objective

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def batches(count):
    """Of 2 to 5 pairs each (1 has graphs of its own), a prompt or none, completions of any length."""
    rng = random.Random(0)

    def tokens(low, high):
        return [rng.randrange(3, 300) for _ in range(rng.randrange(low, high))]

    def pair():
        prompt = tokens(0, 30)
        return TokenPair(prompt, tokens(1, 20), prompt, tokens(1, 20))

    return [shared_prefix_batch([pair() for _ in range(rng.randrange(2, 6))]) for _ in range(count)]


def counting(graphs):
    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend


@pytest.fixture
def dynamo():
    """Dynamo afresh, its limit one at which an error tells of each graph too many."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind, checkpoints", [("llama", False), ("gemma2", False), ("llama", True)])
def test_few_graphs_for_any_batches(dynamo, kind, checkpoints):
    """12 steps: one graph for the first batch, then those with open sizes. Losses and gradients are the plain ones."""
    model, graphs = attach(tiny_model(kind)).train(), []
    if checkpoints and TORCH < (2, 13):
        pytest.skip("before torch 2.13 a checkpoint holds its graph to the layout's tuples; FastDPOConfig says so")
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(batches(1)[0])  # the probe
    compiled = torch.compile(model, backend=counting(graphs), fullgraph=True)
    for batch in batches(12):
        found = []
        for called in (compiled, model):
            reference = torch.zeros(len(batch.lengths))
            loss = called(batch, objective=Objective("sigmoid"), reference_logps=reference).loss
            found.append((loss, *torch.autograd.grad(loss, list(model.parameters()))))
        for ours, plain in zip(*found, strict=True):
            assert (ours - plain).norm() <= 1e-5 * plain.norm() + 1e-8
    assert len(graphs) <= 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_eager_as_an_operator(row, kind):
    """Values and gradients, those of sinks included; the backward makes its masks anew."""
    layout, inputs = make(row=row)
    knobs = dict(KINDS[kind])
    if "sinks" in knobs:
        inputs.append(knobs["sinks"].double().requires_grad_())
        knobs["sinks"] = inputs[-1]
    plain = shared_prefix_attention(*inputs[:3], layout, scaling=0.3, **knobs)
    scores = attention.Scores(0.3, **knobs)
    found = attention._eager_op(*inputs[:3], layout.host, *scores)
    assert torch.equal(found, plain)
    cotangent = torch.randn(plain.shape, dtype=plain.dtype, generator=torch.Generator().manual_seed(1))
    attention._made.cache_clear()
    for _ in range(2):
        gradients = [torch.autograd.grad(x, inputs, cotangent, retain_graph=True) for x in (found, plain)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(attention._eager_op, (*inputs[:3], layout.host, *scores), test_utils=checks)


@torch.library.custom_op("dpo_fast_tests::flash", mutates_args=())
def flash_op(query: torch.Tensor, ends: torch.Tensor, max_q: int, max_k: int, left: int) -> torch.Tensor:
    assert max_q == ends.diff().max() and max_k >= max_q
    return query.clone()


@flash_op.register_fake
def _(query, ends, max_q, max_k, left):
    return torch.empty_like(query)


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False,
):  # fmt: skip
    return flash_op(query, cu_seq_q, max_q, max_k, window_size[0])


@pytest.mark.parametrize("implementation, kind", [("varlen", "llama"), ("varlen", "mistral"), ("flex", "gemma2")])
def test_few_graphs_on_a_gpu(dynamo, monkeypatch, implementation, kind):
    """As its code goes there: flash attention is an operator of its own, FlexAttention one that the compiler knows."""
    windows = {} if kind == "llama" else {"sliding_window": 8}
    model, graphs = attach(tiny_model(kind, head_dim=16, **windows).bfloat16()), []
    model(batches(1)[0])  # the probe
    monkeypatch.setattr(attention, "_on_gpu", lambda query: True)
    monkeypatch.setattr(attention, "_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen_attn))
    flash._find.cache_clear()
    with torch.no_grad():
        expected = [model(batch).logps for batch in batches(12)]
        compiled = torch.compile(model, backend=counting(graphs), fullgraph=True)
        found = [compiled(batch).logps for batch in batches(12)]
    flash._find.cache_clear()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert len(graphs) <= 3


def test_what_compiled_code_reads_of_a_layout_follows_it():
    layout = SharedPrefixLayout.make(*ROWS["trees"])
    for moved in (layout, layout.to("meta")):
        assert moved.host.device.type == "cpu" and moved.host.tolist() == [list(layout.lengths), list(layout.shared)]
        assert moved.longest == (max(layout.own), max(layout.lengths))
