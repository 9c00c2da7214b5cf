"""Token log-probs from logits: ours, plain PyTorch, torch's cross-entropy, TRL's and Liger's functions."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.groups import CUDA, optional, take_turns
from benchmarks.level1 import providers
from benchmarks.measure import random_logits
from dpo_fast.testing import assert_within_bound, token_bounds

N, V, DTYPE, ROUNDS = (8192, 131_072, torch.bfloat16, 20) if CUDA else (256, 32_000, torch.float32, 15)
CHECKED = 64  # rows; bounds of rounding take many times the memory of the logits
MEMBERS = ("ours", "eager", "torch", "trl", "liger")


def torch_cross_entropy(logits, labels):
    return -F.cross_entropy(logits, labels, reduction="none")


def load_trl():
    from trl.trainer.utils import selective_log_softmax

    return lambda logits, labels: selective_log_softmax(logits[None], labels[None])[0]


def load_liger():
    from liger_kernel.transformers.functional import liger_cross_entropy

    if not CUDA:
        raise ImportError("its kernels need an accelerator")
    return lambda logits, labels: -liger_cross_entropy(logits, labels, reduction="none")


def measure(backward: bool) -> dict:
    logits, labels = random_logits(N, V, DTYPE, "cuda" if CUDA else "cpu")
    functions = {**providers(), "torch": torch_cross_entropy}
    functions |= optional([("trl", load_trl), ("liger", load_liger)])
    exact, some = logits[:CHECKED].double(), labels[:CHECKED]
    bounds = token_bounds(exact, some)
    truth = exact.log_softmax(-1).gather(1, some[:, None])[:, 0]
    slopes = F.one_hot(some, V) - exact.softmax(-1)

    def member(function):
        def run():
            if not backward:
                with torch.no_grad():
                    return function(logits, labels), None
            leaf = logits.clone().requires_grad_()  # Liger's function writes the gradient over the logits
            logps = function(leaf, labels)
            return logps.detach(), torch.autograd.grad(logps.sum(), leaf)[0]

        return run

    def check(name, result):
        logps, gradient = result
        assert_within_bound(logps[:CHECKED], truth, bounds["logps"], what=f"{name}, log-probs")
        if gradient is not None:
            assert_within_bound(gradient[:CHECKED], slopes, bounds["direction"], what=f"{name}, gradient")

    members = {k: f if isinstance(f, ImportError) else member(f) for k, f in functions.items()}
    return take_turns(members, check, ROUNDS)


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_token_logps(measured, speed, backward, member):
    group = f"token log-probs of logits ({N}, {V}) {str(DTYPE)[6:]}, {'forward + backward' if backward else 'forward'}"
    speed(group, member, measured(group, measure, backward))
