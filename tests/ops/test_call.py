"""One call's knobs: flat and back, copied, and left open in compiled graphs."""

import copy
import itertools
import pickle

import pytest
import torch

from dpo_fast import linear_preference_loss, linear_token_logps, logits_token_logps
from dpo_fast.ops.call import Call, Head
from dpo_fast.ops.softmax import Transform
from dpo_fast.ops.stats import STATS

CALLS = [
    Call(Transform(scale, softcap, temperature), ignore_index, outputs, impl, plan, tile_mib, dtype)
    for (scale, softcap, temperature), ignore_index, outputs, (impl, plan, tile_mib, dtype) in itertools.product(
        [(1.0, None, 1.0), (-0.1, 30.0, 1 / 3), (0.0, 1e-300, 1e300)],
        [-100, 0, 2**63 - 1, -(2**63)],
        [(), ("entropy",), STATS],
        [
            ("torch", "-", None, torch.float32),
            ("triton", "recompute", 1, torch.bfloat16),
            ("reference", "frozen", 256, torch.float64),
        ],
    )
]


def test_flat_and_back_is_the_same():
    for call in CALLS:
        floats, ints, text = call.flat()
        assert Call.unflat(floats, ints, text) == call
        assert all(type(x) is float for x in floats) and all(type(x) is int for x in ints) and type(text) is str


def test_pickled_and_copied():
    for call in CALLS:
        assert pickle.loads(pickle.dumps(call)) == call == copy.deepcopy(call)


@pytest.mark.parametrize("train", [(), ("hidden",), ("down",), ("weight",), ("bias",), ("up",), ("hidden", "up")])
def test_the_plan_follows_what_trains(train):
    tensors = dict(hidden=torch.randn(5, 4), weight=torch.randn(9, 4), bias=torch.randn(9), down=torch.randn(5, 2))
    tensors["up"] = torch.randn(9, 2)
    head = Head(**{name: x.requires_grad_(name in train) for name, x in tensors.items()})
    call = Call.of_head("op", head, (), Transform(), -100, None, "torch")
    head_trains = {"weight", "bias", "up"} & set(train)
    assert call.plan == ("recompute" if head_trains else "frozen" if train else "score")
    assert call.dtype == torch.float32
    with torch.no_grad():
        assert Call.of_head("op", head, (), Transform(), -100, None, "torch").plan == "score"


def counting(graphs: list):
    def backend(graph, _):
        graphs.append(graph)
        return graph

    return backend


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "recompute"])
def test_one_graph_for_all_lengths(trained):
    """One more when the length first changes, and none after that."""
    torch._dynamo.reset()
    weight = torch.randn(50, 8, requires_grad=trained)
    graphs: list = []

    @torch.compile(backend=counting(graphs), fullgraph=True)
    def compiled(hidden, labels):
        return linear_token_logps(hidden, weight, labels, temperature=1.5).sum()

    for N in (6, 9, 30, 200):
        hidden, labels = torch.randn(N, 8, requires_grad=True), torch.randint(50, (N,))
        assert torch.equal(compiled(hidden, labels), linear_token_logps(hidden, weight, labels, temperature=1.5).sum())
    assert len(graphs) <= 2


def test_numbers_may_change_in_a_compiled_function():
    torch._dynamo.reset()
    hidden, weight, labels = torch.randn(6, 8), torch.randn(50, 8), torch.tensor([3, 7, 11, 5, 5, 49])

    @torch.compile(backend=counting([]), fullgraph=True)
    def compiled(temperature, ignore_index):
        of_head = linear_token_logps(hidden, weight, labels, temperature=temperature, ignore_index=ignore_index)
        logits = hidden @ weight.T
        return of_head, logits_token_logps(logits, labels, temperature=temperature, ignore_index=ignore_index)

    for temperature, ignore_index in ((1.5, -100), (2.5, 3), (0.5, 7), (4.0, 11)):
        knobs = dict(temperature=temperature, ignore_index=ignore_index)
        of_head, of_logits = compiled(temperature, ignore_index)
        assert torch.equal(of_head, linear_token_logps(hidden, weight, labels, **knobs))
        assert torch.equal(of_logits, logits_token_logps(hidden @ weight.T, labels, **knobs))


def test_a_loss_takes_the_calls_knobs_too():
    """The plan of the loss replaces the head's; everything else is the same call."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(12, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels, ids = torch.randint(50, (12,)), torch.arange(12) % 6
    knobs = dict(logit_softcap=3.0, temperature=1.3, logit_scale=0.7, tile_mib=1)
    out = linear_preference_loss(hidden, weight, labels, ids, 3, loss="simpo", outputs=("entropy",), **knobs)
    assert out.plan.name == "pairwise"
    torch.testing.assert_close(out.stats.logps, linear_token_logps(hidden, weight, labels, **knobs))
