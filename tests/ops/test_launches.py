"""Kernels that a call of the head launches on a device, counted on fake tensors; and that the host waits for none.

A chunk's own are its GEMMs and the passes over its tile. Everything else is small, and a GPU waits 2 us and more for
each: 14 a chunk once masked labels and copied results.
"""

from collections import Counter
from dataclasses import replace
from unittest import mock

import pytest
import torch
from fake_cuda import fake_cuda
from no_sync import Sync

from dpo_fast import linear_preference_loss, linear_token_stats, logits_token_stats
from dpo_fast.ops.plan import plan_head
from dpo_fast.ops.stats import STATS

SHAPES = {"bar": (8192, 4096, 131_072, 16), "small": (2048, 2048, 128_256, 8)}  # N, H, V, pairs
LARGE = {"mm", "addmm", "triton"}


def launches(shape: str, plan: str, *, chunks: int = 4, more: bool = False, **knobs) -> tuple[Counter, Counter]:
    """(forward, backward) of a call in 16 bits that takes so many chunks, and slices in recompute's backward. more: a
    bias and all statistics, too."""
    N, H, V, P = SHAPES[shape]
    P = 1 if plan == "pending" else P

    def planned(*sizes, **knobs):
        found = plan_head(*sizes, **knobs)
        return replace(found, name=plan, chunk_rows=N // chunks, slice_columns=-(-V // chunks))

    with fake_cuda() as stream, mock.patch("dpo_fast.ops.call.plan_head", planned):
        trains = plan not in ("score", "frozen")
        hidden = torch.empty((N, H), dtype=torch.bfloat16, requires_grad=plan != "score")
        weight = torch.empty((V, H), dtype=torch.bfloat16, requires_grad=trains)
        knobs["impl"] = "triton"
        if more:
            knobs |= dict(outputs=STATS, bias=torch.empty(V, dtype=torch.bfloat16, requires_grad=trains))
        labels, order = torch.empty(N, dtype=torch.int64), [s for pair in range(P) for s in (pair, P + pair)]
        ids = torch.tensor(order).repeat_interleave(N // (2 * P))
        stream.kernels.clear()
        if plan in ("pairwise", "pending"):
            host = dict(sequence_lengths=[N // (2 * P)] * (2 * P), sequence_order=order)
            plain = dict(loss="simpo")
            loss = linear_preference_loss(hidden, weight, labels, ids, P, **plain | host | knobs).loss
        else:
            loss = linear_token_stats(hidden, weight, labels, **dict(outputs=()) | knobs).logps
        forward = Counter(stream.kernels)
        if plan != "score":
            stream.kernels.clear()
            loss.sum().backward()
        return forward, Counter(stream.kernels) if plan != "score" else Counter()


def small(kernels: Counter) -> int:
    return sum(n for name, n in kernels.items() if name not in LARGE)


# At most: of a call with one chunk, (forward, backward); more for each further chunk, or slice of recompute's backward.
# The loss of a chunk's pairs is 21 of pairwise's, on vectors of a few numbers.
SMALL = {"score": (2, 0), "frozen": (5, 3), "pairwise": (57, 4), "pending": (59, 4), "recompute": (2, 20)}
PER_CHUNK = {"score": (0, 0), "frozen": (0, 0), "pairwise": (2 + 21, 0), "pending": (1, 0), "recompute": (0, 1)}
GEMMS = {"score": (1, 0), "frozen": (2, 0), "pairwise": (3, 0), "pending": (3, 0), "recompute": (1, 3)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("plan", SMALL)
def test_launches(shape, plan):
    few, many = (launches(shape, plan, chunks=chunks) for chunks in (4, 8))
    for way in (0, 1):
        assert small(many[way]) - small(few[way]) == 4 * PER_CHUNK[plan][way]
        assert small(few[way]) <= SMALL[plan][way] + 3 * PER_CHUNK[plan][way]
        gemms = [x[way]["mm"] + x[way]["addmm"] for x in (few, many)]
        assert gemms[1] - gemms[0] == 4 * GEMMS[plan][way]
    assert few[0]["mm"] == few[0]["triton"] == 4 if plan == "score" else True


@pytest.mark.parametrize("plan", ["pairwise", "pending", "recompute"])
def test_the_first_product_of_a_gradient_of_the_weight_is_written(plan):
    """No fill with zeros, no read of them, no pass that scales or casts for itself: 16 bytes an entry less."""
    forward, backward = launches("bar", plan, chunks=4)
    sums = {"pairwise": 1, "pending": 2, "recompute": 1}[plan]  # that chunks are added to
    assert (forward + backward)["addmm"] == 4 - sums
    assert backward["mul"] == (0 if plan == "recompute" else 2) and not backward["_to_copy"] and not backward["mul_"]


@pytest.mark.parametrize("plan", SMALL)
def test_nothing_waits(plan):
    launches("small", plan, more=True)


def test_counting_tokens_waits_and_lengths_do_not():
    with pytest.raises(Sync, match="bincount"):
        launches("small", "pairwise", sequence_lengths=None)
    launches("small", "pairwise", sequence_order=None)  # sorted there


def test_nothing_waits_at_level_1():
    with fake_cuda() as stream:
        logits = torch.empty((64, 128_256), dtype=torch.bfloat16, requires_grad=True)
        stats = logits_token_stats(logits, torch.empty(64, dtype=torch.int64), impl="triton")
        stats.logps.sum().backward()
    assert stream.kernels["triton"] == 2
