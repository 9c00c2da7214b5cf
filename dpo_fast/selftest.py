"""`dpo-fast selftest`: kernels and ops against the fp64 oracle on this machine, in under a minute."""

import argparse
import os
import time
from collections.abc import Callable, Iterator

import torch

from .env import device
from .ops.dispatch import reasons_against
from .testing import assert_within_budget, make_logits


def _gradients(function: Callable, *leaves: torch.Tensor):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return out.detach(), torch.autograd.grad(out.sum(), leaves)


def check_logits(impl: str, dtype: torch.dtype, where: torch.device) -> None:
    """Level 1: token log-probs and d_logits."""
    from . import logits_token_logps

    logits, labels = make_logits(5, 1003, dtype=dtype, device=where)

    def eager(x):
        z = (x if x.dtype == torch.float64 else x.float()).div(5).tanh().mul(5).log_softmax(-1)
        ignored = labels == -100
        return z.gather(-1, labels.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0)

    ours = _gradients(lambda x: logits_token_logps(x, labels, logit_softcap=5.0, impl=impl), logits)
    _compare(ours, _gradients(eager, logits), _gradients(eager, logits.double()))


def check_head(impl: str, dtype: torch.dtype, where: torch.device) -> None:
    """Level 3: the loss of pairs, d_hidden, d_weight."""
    from . import linear_preference_loss

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 32, generator=generator).to(where, dtype)
    weight = (torch.randn(503, 32, generator=generator) / 3).to(where, dtype)
    labels = torch.randint(503, (24,), generator=generator).to(where)
    ids = (torch.arange(24) % 6).to(where)
    reference = torch.zeros(6, device=where)

    def eager(h, w):
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        logps = (h @ w.T).to(wide).log_softmax(-1).gather(1, labels[:, None])[:, 0]
        chosen, rejected = torch.zeros(6, dtype=wide, device=where).index_add(0, ids, logps).tensor_split(2)
        return torch.nn.functional.softplus(-0.1 * (chosen - rejected)).mean()

    def fused(h, w):
        return linear_preference_loss(h, w, labels, ids, 3, reference_logps=reference, impl=impl).loss

    ours = _gradients(fused, hidden, weight)
    _compare(ours, _gradients(eager, hidden, weight), _gradients(eager, hidden.double(), weight.double()))


def check_sequences(impl: str, dtype: torch.dtype, where: torch.device) -> None:
    """Sums of token log-probs by sequence."""
    from . import sequence_logps

    values = -torch.rand(3001, generator=torch.Generator().manual_seed(0)).to(where)
    ids = (torch.arange(3001) % 4).to(where)
    sums = sequence_logps(values, ids, 4, impl=impl)
    exact = sequence_logps(values.double(), ids, 4, impl="reference")
    assert_within_budget(sums, sums, exact, factor=0.0, what="sums")


def _compare(ours, eager, truth) -> None:
    assert_within_budget(ours[0], eager[0], truth[0], factor=2.0, what="values")
    for mine, theirs, exact in zip(ours[1], eager[1], truth[1], strict=True):
        assert_within_budget(mine, theirs, exact, factor=2.0, what="gradients")


CHECKS = (check_logits, check_head, check_sequences)


def run(where: torch.device) -> Iterator[tuple[str, str, str, float]]:
    """(check, implementation and dtype, "pass", "skip: why" or "FAIL: why", seconds) for each check."""
    for impl in ("torch", "triton"):
        reasons = reasons_against(impl, where)
        if reasons:
            yield "all", impl, f"skip: {'; '.join(reasons)}", 0.0
            continue
        for dtype in (torch.float32, torch.bfloat16):
            for check in CHECKS:
                start = time.perf_counter()
                try:
                    check(impl, dtype, where)
                    verdict = "pass"
                except AssertionError as error:
                    verdict = f"FAIL: {error}"
                yield check.__doc__.split(".")[0], f"{impl}, {str(dtype)[6:]}", verdict, time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    """Exit status 0 when nothing failed."""
    parser = argparse.ArgumentParser(prog="dpo-fast selftest", description=__doc__.split(":", 1)[1].strip())
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
