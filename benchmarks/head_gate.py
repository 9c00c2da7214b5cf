"""Whether a provider of `benchmarks.head` computes the right numbers: in fp64, by the error budget of the tests.

Ours must come as near to fp64 as logits in fp32 do, and its gradients as near as eager's. What other people's code
may lose is bounded by what rounding can do, see `_others_budget`: they are here to be timed, not to be graded.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from dpo_fast.testing import assert_within_budget, fp32_linear

from .head_providers import Problem

TOKENS = 64  # at a time
ROWS = 320  # tokens whose d_hidden is compared
ENTRIES = 640  # of the vocabulary, whose d_weight is compared: half of them labels


class Numbers(NamedTuple):
    logps: Tensor  # (N,)
    d_hidden: Tensor  # (rows, H) of the loss, at the gate's rows
    d_weight: Tensor  # (columns, H), at its columns


def _as_is(x: Tensor) -> Tensor:
    return x


class Precision(NamedTuple):
    operands: Callable[[Tensor], Tensor]  # of the product that gives the logits
    linear: Callable[[Tensor, Tensor], Tensor]  # that product
    gradients: Callable[[Tensor], Tensor]  # the gradient of logits, and what it is multiplied by


TRUTH = Precision(Tensor.double, linear, Tensor.double)
EAGER = Precision(_as_is, linear, _as_is)
# Nothing is rounded to 16 bits after the inputs. The logits are the device's own product: tensor cores that sum 16-bit
# products in fp32 truncate what they add, so over 4,096 terms they are several times further from fp64 than fp32 units,
# and whoever computes logits on them starts from there.
WIDE = Precision(_as_is, fp32_linear, Tensor.float)


def truth_of(p: Problem) -> Tensor:
    """Token log-probs (N,) in fp64."""
    return _scores(p, TRUTH, None)[0]


def _logits(p: Problem, product: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor):
    """Logits in fp32, or fp64 of fp64, and their derivative by what comes out of the GEMM."""
    z = product(hidden, weight)
    z = z if z.dtype == torch.float64 else z.float()
    if p.softcap is None:
        return z, torch.ones((), dtype=z.dtype, device=z.device)
    bent = torch.tanh(z / p.softcap)
    return p.softcap * bent, 1 - bent.square()


def _scores(p: Problem, precision: Precision, columns: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probs, and d log-prob / d logit at `columns` of the vocabulary, (N, columns)."""
    weight, logps, slopes = precision.operands(p.weight), [], []
    for rows in torch.arange(len(p.labels), device=p.labels.device).split(TOKENS):
        z, bend = _logits(p, precision.linear, precision.operands(p.hidden[rows]), weight)
        log_sum = z.logsumexp(-1, keepdim=True)
        logps.append((z.gather(1, p.labels[rows, None]) - log_sum)[:, 0])
        if columns is not None:
            chosen = (p.labels[rows, None] == columns).to(z.dtype)
            slopes.append((chosen - (z[:, columns] - log_sum).exp()) * bend.expand_as(z)[:, columns])
    return torch.cat(logps), torch.cat(slopes) if slopes else None


def numbers(p: Problem, rows: Tensor, columns: Tensor, precision: Precision) -> Numbers:
    """All by hand."""
    logps, at_columns = _scores(p, precision, columns)
    leaf = logps.clone().requires_grad_()
    (slopes,) = torch.autograd.grad(p.loss(leaf), leaf)
    z, bend = _logits(p, precision.linear, precision.operands(p.hidden[rows]), precision.operands(p.weight))
    chosen = torch.zeros_like(z).scatter_(1, p.labels[rows, None], 1.0)
    d_logits = slopes[rows, None] * (chosen - z.softmax(-1)) * bend
    hidden, weight = precision.gradients(p.hidden), precision.gradients(p.weight)
    d_weight = (slopes[:, None] * at_columns).to(hidden.dtype).T @ hidden
    return Numbers(logps, d_logits.to(weight.dtype) @ weight, d_weight)


def rms_error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).square().mean().sqrt().item()


class Gate:
    def __init__(self, p: Problem):
        N, V = len(p.labels), len(p.weight)
        spread = torch.linspace(0, N - 1, min(ROWS, N), device=p.labels.device).long()
        entries = torch.linspace(0, V - 1, min(ENTRIES // 2, V), device=p.labels.device).long()
        self.p, self.rows = p, spread
        self.columns = torch.cat([p.labels[spread[: ENTRIES // 2]], entries]).unique()
        self.truth, self.eager = self._numbers(TRUTH), self._numbers(EAGER)
        self.wide = self.eager if p.hidden.dtype == torch.float32 else self._numbers(WIDE)

    def _numbers(self, precision: Precision) -> Numbers:
        return numbers(self.p, self.rows, self.columns, precision)

    def errors(self, name: str, out: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None) -> dict[str, float]:
        """Largest errors; those of gradients relative to the largest entry. AssertionError above the budget."""
        ours, found = name.startswith("ours"), {}
        given = {"logps": out} if out.ndim else {}
        given |= {} if d_hidden is None else {"d_hidden": d_hidden[self.rows]}
        given |= {} if d_weight is None else {"d_weight": d_weight[self.columns]}
        if out.ndim == 0:
            found["error"] = self._loss_error(out, (self.wide if ours else self.eager).logps)
        for what, result in given.items():
            truth = getattr(self.truth, what)
            largest = (result.double() - truth).abs().max()
            if what == "logps":
                found["error"] = largest.item()
            else:
                found["gradient_error"] = max(found.get("gradient_error", 0.0), (largest / truth.abs().max()).item())
            if ours:
                best = self.wide if what == "logps" else self.eager
                assert_within_budget(result, getattr(best, what), truth, what=what)
            elif not (error := rms_error(result, truth)) <= (budget := self._others_budget(what)):
                raise AssertionError(f"{what}: rms error {error:.3g} over the budget {budget:.3g}")
        return found

    def _others_budget(self, what: str) -> float:
        """Root mean square. Where eager rounds to the model's dtype once, others may do so twice; and n summands in
        fp32, taken in another order, may be off by sqrt(n) more: from errors that add up at random to all alike."""
        summands = {"logps": self.p.hidden.shape[1], "d_hidden": len(self.p.weight), "d_weight": len(self.p.labels)}
        eager, wide = (rms_error(getattr(n, what), getattr(self.truth, what)) for n in (self.eager, self.wide))
        return 2 * eager + math.sqrt(summands[what]) * wide

    def _loss_error(self, loss: Tensor, logps: Tensor) -> float:
        """A loss is one number: it may be off by what the errors of `logps` add up to, all in one direction."""
        leaf = self.truth.logps.clone().requires_grad_()
        truth = self.p.loss(leaf)
        (slopes,) = torch.autograd.grad(truth, leaf)
        bound = (slopes.abs() * (logps.double() - leaf.detach()).abs()).sum().item() + 2.0**-23 * truth.item()
        error = (loss.double() - truth.detach()).abs().item()
        if not error <= bound:
            raise AssertionError(f"loss: error {error:.3g} over the budget {bound:.3g}")
        return error
