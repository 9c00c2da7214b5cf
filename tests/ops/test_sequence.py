"""Sequence sums: exact, in a fixed order, with the gradient of a gather."""

import pytest
import torch

from dpo_fast import sequence_logps
from dpo_fast.ops.impl_torch import _sum_on_device
from dpo_fast.ops.oracle import oracle_sequence_logps
from dpo_fast.testing import assert_within_bound, make_generator

IMPLS = ["torch", "triton", "reference"]


def make(n, sequences, seed=0):
    generator = make_generator(seed)
    values = -torch.rand(n, generator=generator) * 4
    return values, torch.randint(sequences, (n,), generator=generator), torch.rand(n, generator=generator)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n, sequences", [(0, 2), (1, 1), (5, 3), (3001, 4)])
def test_values_and_gradients(impl, weighted, n, sequences):
    values, ids, weights = make(n, sequences)
    weights = weights if weighted else None
    values.requires_grad_()
    sums = sequence_logps(values, ids, sequences, weights=weights, impl=impl)
    oracle = oracle_sequence_logps(values, ids, sequences, weights)
    assert sums.dtype == torch.float32
    assert_within_bound(sums, oracle, 0.0, what="sums")  # rounded once
    coefficient = torch.arange(1.0, sequences + 1)
    (gradient,) = torch.autograd.grad((sums * coefficient).sum(), values)
    expected = coefficient[ids] if weights is None else coefficient[ids] * weights
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_long_sums_are_rounded_once(impl):
    """A running bf16 sum of 1,024 tokens of -2 stalls at -1024, a running fp32 sum loses digits."""
    values = torch.full((200_000,), -1 / 3)
    ids = torch.zeros(200_000, dtype=torch.int64)
    exact = (values.double().sum()).float()
    assert sequence_logps(values, ids, 1, impl=impl).item() == exact.item()
    assert sequence_logps(torch.full((1024,), -2.0, dtype=torch.bfloat16), ids[:1024], 1, impl=impl).item() == -2048


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_bitwise_reproducible(impl):
    values, ids, weights = make(5000, 6)
    first, second = (sequence_logps(values, ids, 6, weights=weights, impl=impl) for _ in range(2))
    assert torch.equal(first, second)


def test_the_path_for_other_devices_agrees():
    values, ids, weights = make(3001, 5)
    sums = _sum_on_device(values, ids, weights, 6)
    assert_within_bound(sums, oracle_sequence_logps(values, ids, 6, weights), 0.0)
    assert sums[5] == 0
    values[ids == 2] = -torch.inf
    finite = _sum_on_device(values, ids, weights, 6).isfinite()
    assert finite.tolist() == [True, True, False, True, True, True]


def test_opcheck_and_compile():
    values, ids, weights = make(50, 3)
    torch.library.opcheck(
        torch.ops.dpo_fast.sequence_logps_fwd.default, (values.requires_grad_(), ids, weights, 3, "torch")
    )
    compiled = torch.compile(lambda v: sequence_logps(v, ids, 3, weights=weights), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), sequence_logps(values, ids, 3, weights=weights))


@pytest.mark.parametrize("impl", IMPLS)
def test_bad_input_is_named(impl):
    values, ids, _ = make(4, 2)
    with pytest.raises(ValueError, match=r"sequence_ids must be in \[0, 2\), got values from"):
        sequence_logps(values, ids + 1, 2, impl=impl)
    with pytest.raises(ValueError, match="sequence_ids must have shape"):
        sequence_logps(values, ids[:2], 2, impl=impl)
    with pytest.raises(TypeError, match="token_logps must have one of the dtypes"):
        sequence_logps(ids, ids, 2, impl=impl)
    with pytest.raises(ValueError, match="weights must have shape"):
        sequence_logps(values, ids, 2, weights=values[:1], impl=impl)
