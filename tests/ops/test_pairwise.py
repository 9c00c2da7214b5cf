"""Level 3's sums over chunks: memory that nothing wrote is no gradient, and tokens in order are left in it."""

import pytest
import torch
from emulated_cuda import on_cuda, poisoned

from dpo_fast import linear_preference_loss
from dpo_fast.comparisons import Comparisons
from dpo_fast.ops.pairwise import group_tokens
from dpo_fast.testing import make_generator

LENGTHS = (5, 3, 7, 4)  # of chosen 0, 1 and rejected 2, 3
ORDER = (0, 2, 1, 3)


def make(dtype=torch.float32, sequences=ORDER):
    generator = make_generator()
    N = sum(LENGTHS[s] for s in sequences)
    hidden, weight = torch.randn(N, 16, generator=generator), torch.randn(53, 16, generator=generator)
    ids = torch.tensor(sequences).repeat_interleave(torch.tensor([LENGTHS[s] for s in sequences]))
    labels = torch.randint(53, (N,), generator=generator)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, torch.randn(53, generator=generator))]
    return leaves, labels, ids


def gradients(leaves, labels, ids, pairs=2, **knobs):
    hidden, weight, bias = leaves
    knobs = dict(reference_logps=torch.zeros(4), loss="hinge") | knobs
    out = linear_preference_loss(hidden, weight, labels, ids, pairs, bias=bias, **knobs)
    return out, torch.autograd.grad(out.loss, leaves)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rows", [8, 12, 24], ids=["pending", "two chunks", "one chunk"])
def test_pairs_that_owe_nothing(impl, rows, monkeypatch):
    """A hinge far behind them: gradients are zeros, whatever their memory held; on the host and on a device."""
    monkeypatch.setattr("dpo_fast.ops.plan.pending_pays", lambda *_: True)
    monkeypatch.setattr("dpo_fast.ops.plan._CPU_WHOLE_ROWS", rows)
    leaves, labels, ids = make()
    far = torch.tensor([-1e4, -1e4, 1e4, 1e4])
    with poisoned() if impl == "torch" else on_cuda(tile_rows=rows):
        out, found = gradients(leaves, labels, ids, impl=impl, reference_logps=far)
    assert out.plan.name == ("pending" if (impl, rows) == ("triton", 8) else "pairwise")
    assert out.loss == 0 and all((x == 0).all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sequences_that_nothing_compares_come_first_and_write_nothing(dtype):
    """Their chunks are scored: the first one of a gradient is another."""
    leaves, labels, ids = make(dtype, sequences=(0, 1, 2, 3))
    knobs = dict(comparisons=[(2, 3)], num_sequences=4, impl="triton")
    with on_cuda(tile_rows=11):
        out, found = gradients(leaves, labels, ids, pairs=1, sequence_lengths=LENGTHS, **knobs)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth, true = gradients(exact, labels, ids, pairs=1, **{**knobs, "impl": "reference"})
    assert truth.loss > 0 and abs(out.loss - truth.loss) < 0.05
    assert (found[0][ids < 2] == 0).all()
    for x, y in zip(found, true, strict=True):
        assert (x.double() - y).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-7) * y.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_in_order_are_not_sorted_again(dtype):
    """To the bit what sorting gives; ignored rows may hold anything, a label out of range makes a NaN."""
    leaves, labels, ids = make(dtype)
    labels[[2, 9]] = -100
    with torch.no_grad():
        leaves[0][2], leaves[0][9] = torch.inf, torch.nan
    with on_cuda(tile_rows=12):
        (sorted_, first), (given, second) = (
            gradients(leaves, labels, ids, impl="triton", sequence_lengths=LENGTHS, sequence_order=order)
            for order in (None, ORDER)
        )
        bad = labels.clone()
        bad[0] = 53
        wrong, wrong_gradients = gradients(leaves, bad, ids, impl="triton", sequence_lengths=LENGTHS)
    assert torch.equal(sorted_.losses, given.losses) and given.loss.isfinite()
    assert torch.equal(sorted_.stats.logps, given.stats.logps) and (given.stats.logps[[2, 9]] == 0).all()
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
    assert (second[0][[2, 9]] == 0).all()
    assert wrong.loss.isnan() and wrong_gradients[0][0].isnan().all() and wrong_gradients[1].isnan().all()


def test_the_order_of_sequences_says_whether_tokens_are_sorted(monkeypatch):
    _, labels, ids = make()
    monkeypatch.setattr("dpo_fast.ops.tile.free_to_look", lambda x: False)
    pairs, scored = Comparisons.make("test", 2, None, None, "cpu"), labels >= 0
    assert group_tokens(labels, scored, ids, pairs, None, LENGTHS, ORDER).order is None
    tokens = group_tokens(labels, scored, ids.flip(0), pairs, None, LENGTHS, ORDER[::-1])
    assert ids.flip(0)[tokens.order].tolist() == ids.tolist() and tokens.ranks.tolist() == sorted(tokens.ranks.tolist())
