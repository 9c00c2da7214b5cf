"""`dpo-fast selftest`: kernels and ops against the fp64 oracle on this machine, in under a minute."""

import argparse
import os
import time
from collections.abc import Callable, Iterator

import torch

from .env import device
from .ops.dispatch import reasons_against
from .testing import EPS, assert_within_bound, head_bounds, make_logits, token_bounds


def _gradients(function: Callable, *leaves: torch.Tensor):
    copies = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*copies)
    return out.detach(), torch.autograd.grad(out.sum(), copies)


DESCRIPTION = "kernels and ops against the fp64 oracle on this machine, in under a minute."


def check_logits(impl: str, dtype: torch.dtype, where: torch.device) -> None:
    """Level 1: token log-probs and d_logits."""
    from . import logits_token_logps

    logits, labels = make_logits(5, 1003, dtype=dtype, device=where)

    def oracle(x):
        z = x.div(5).tanh().mul(5).log_softmax(-1)
        ignored = labels == -100
        return z.gather(-1, labels.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0)

    ours = _gradients(lambda x: logits_token_logps(x, labels, logit_softcap=5.0, impl=impl), logits)
    bounds = token_bounds(logits, labels, logit_softcap=5.0)
    _compare(ours, _gradients(oracle, logits.double()), bounds["logps"], bounds["direction"])


def check_head(impl: str, dtype: torch.dtype, where: torch.device) -> None:
    """Level 3: the loss of pairs, d_hidden, d_weight."""
    from . import linear_preference_loss

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 32, generator=generator).to(where, dtype)
    weight = (torch.randn(503, 32, generator=generator) / 3).to(where, dtype)
    labels = torch.randint(503, (24,), generator=generator).to(where)
    ids = (torch.arange(24) % 6).to(where)
    reference = torch.zeros(6, device=where)

    def oracle(h, w):
        logps = (h @ w.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        chosen, rejected = torch.zeros(6, dtype=torch.float64, device=where).index_add(0, ids, logps).tensor_split(2)
        return torch.nn.functional.softplus(-0.1 * (chosen - rejected)).mean()

    def fused(h, w):
        return linear_preference_loss(h, w, labels, ids, 3, reference_logps=reference, impl=impl).loss

    # The slope of a pair's loss is at most beta, its second derivative at most beta^2 / 4; the mean is over 3 pairs
    tokens = head_bounds(hidden, weight, labels)["logps"]
    d_margin = torch.zeros(3, dtype=torch.float64, device=where).index_add(0, ids % 3, tokens)
    slope, d_slope = 0.1 / 3, 0.1**2 / 4 / 3 * d_margin + 32 * EPS * 0.1 / 3
    bounds = head_bounds(hidden, weight, labels, coefficient=slope, d_coefficient=d_slope[ids % 3], operands=dtype)
    truth = _gradients(oracle, hidden.double(), weight.double())
    _compare(
        _gradients(fused, hidden, weight), truth, slope * d_margin.sum() + 32 * EPS, bounds["hidden"], bounds["weight"]
    )


def check_sequences(impl: str, dtype: torch.dtype, where: torch.device) -> None:
    """Sums of token log-probs by sequence."""
    from . import sequence_logps

    values = -torch.rand(3001, generator=torch.Generator().manual_seed(0)).to(where)
    ids = (torch.arange(3001) % 4).to(where)
    sums = sequence_logps(values, ids, 4, impl=impl)
    exact = sequence_logps(values.double(), ids, 4, impl="reference")
    assert_within_bound(sums, exact, 0.0, what="sums")  # rounded once


def _compare(ours, truth, of_values, *of_gradients) -> None:
    assert_within_bound(ours[0], truth[0], of_values, what="values")
    for mine, exact, bound in zip(ours[1], truth[1], of_gradients, strict=True):
        assert_within_bound(mine, exact, bound, what="gradients")


CHECKS = {
    "Level 1: token log-probs and d_logits": check_logits,
    "Level 3: the loss of pairs, d_hidden, d_weight": check_head,
    "Sums of token log-probs by sequence": check_sequences,
}


def run(where: torch.device) -> Iterator[tuple[str, str, str, float]]:
    """(check, implementation and dtype, "pass", "skip: why" or "FAIL: why", seconds) for each check."""
    for impl in ("torch", "triton"):
        reasons = reasons_against(impl, where)
        if reasons:
            yield "all", impl, f"skip: {'; '.join(reasons)}", 0.0
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for what, check in CHECKS.items():
                start = time.perf_counter()
                try:
                    check(impl, dtype, where)
                    verdict = "pass"
                except AssertionError as error:
                    verdict = f"FAIL: {error}"
                seconds = time.perf_counter() - start
                yield what, f"{impl}, {str(dtype)[6:]}", verdict, seconds


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="dpo-fast selftest", description=DESCRIPTION)
    parser.parse_args(argv)
    where = device()
    if where.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # triton has not been imported yet
    failed = 0
    for check, how, verdict, seconds in run(where):
        print(f"{how:<18} {check:<48} {verdict} ({seconds:.1f} s)", flush=True)
        failed += verdict.startswith("FAIL")
    print(f"{failed} failed" if failed else f"all passed on {where.type}")
    return 1 if failed else 0
