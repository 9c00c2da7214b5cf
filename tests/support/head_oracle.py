"""The head against fp64, to bounds that follow from the number of roundings: shared by the tests that execute its code
for CUDA on CPU and by those that run it on a GPU."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast import linear_preference_loss, linear_token_logps

LENGTHS = ((4, 2), (5, 6), (1, 2))  # tokens of each pair's chosen and rejected
BETA = 0.5
P, N, H, V, RANK = len(LENGTHS), sum(map(sum, LENGTHS)), 16, 130, 8
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}  # unit roundoffs
PLANS = {
    "score": (),
    "frozen": ("hidden", "down"),
    "pairwise": ("hidden", "weight", "bias", "down", "up"),
    "pending": ("hidden", "weight", "bias", "down", "up"),
    "recompute": ("hidden", "weight", "bias", "down", "up"),
}
TRANSFORMS = {
    "plain": {},
    "soft-cap": dict(logit_softcap=4.0, logit_scale=0.0625, temperature=0.7),
}


@dataclass
class Problem:
    tensors: dict[str, Tensor]
    labels: Tensor
    ids: Tensor
    reference: Tensor  # (2P,)


def make(dtype, *, low_rank=True, seed=0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    tensors = {"hidden": normal(N, H), "weight": normal(V, H, std=2 / math.sqrt(H)), "bias": normal(V, std=0.5)}
    if low_rank:
        tensors |= {"down": normal(N, RANK), "up": normal(V, RANK, std=0.3)}
    ids = torch.tensor(
        [s for i, pair in enumerate(LENGTHS) for s, n in zip((i, P + i), pair, strict=True) for _ in range(n)]
    )
    order = torch.randperm(N, generator=generator)
    labels = torch.randint(V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.2] = -100
    reference = -3.0 * torch.tensor([float(n) for side in zip(*LENGTHS, strict=True) for n in side])
    return Problem(tensors, labels, ids[order], reference)


class Oracle:
    """fp64 on the same rounded inputs: loss, gradients, and what bounds their errors."""

    def __init__(self, p: Problem, loss, logit_softcap=None, logit_scale=1.0, temperature=1.0):
        self.p, self.scored = p, p.labels != -100
        x = {k: v.detach().double().requires_grad_() for k, v in p.tensors.items()}
        raw = x["hidden"] @ x["weight"].T + x["bias"]
        terms = x["hidden"].abs() @ x["weight"].abs().T + x["bias"].abs()
        if "down" in x:
            raw, terms = raw + x["down"] @ x["up"].T, terms + x["down"].abs() @ x["up"].abs().T
        raw.retain_grad()
        z = raw * logit_scale
        z = (z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)) / temperature
        log_p = z.log_softmax(-1)
        y = p.labels.clamp(min=0)[:, None]
        self.logps = torch.where(self.scored, log_p.gather(1, y)[:, 0], 0)
        self.logps.retain_grad()
        self.loss = loss(self.logps)
        self.loss.backward()
        self.gradients = {k: v.grad for k, v in x.items()}
        slope = abs(logit_scale / temperature)
        # A logit in fp32 is off by a rounding a term of its dot product, once more for each step of the transform
        self.logit_error = 2.0**-24 * (H + RANK + 8) * terms.max().item() * max(slope, 1.0)
        self.coefficient = self.logps.grad.abs()[:, None] * self.scored[:, None]
        self.D = raw.grad.abs()
        self.certain = self.coefficient * slope * (log_p.exp() + F.one_hot(y[:, 0], V))  # what cancels in 1 - p

    def bound(self, name: str, dtype: torch.dtype) -> Tensor:
        """Of the error of a gradient: D is rounded once, in fp16 its operand as well, and the result."""
        u = ROUNDING[dtype]
        roundings = 2 if dtype == torch.float16 else 1
        d = (roundings * u + 2.0**-16) * self.D + 4 * self.logit_error * self.certain
        if dtype == torch.float16:
            d = d + 2.0**-24 * (self.coefficient + self.coefficient.max())  # below fp16's range
        x = {k: v.double().abs() for k, v in self.p.tensors.items()}
        total = {
            "hidden": lambda: d @ x["weight"],
            "weight": lambda: d.T @ x["hidden"],
            "bias": lambda: d.sum(0),
            "down": lambda: d @ x["up"],
            "up": lambda: d.T @ x["down"],
        }[name]()
        return total + u * self.gradients[name].abs() + (2.0**-24 if dtype == torch.float16 else 2.0**-40)


def dpo(p: Problem):
    def loss(logps):
        sums = torch.zeros(2 * P, dtype=logps.dtype).index_add(0, p.ids, logps)
        chosen, rejected = (sums - p.reference.to(sums)).tensor_split(2)
        return F.softplus(-BETA * (chosen - rejected)).mean()

    return loss


def leaves_of(p: Problem, needs, device="cpu") -> dict[str, Tensor]:
    """What the library gets: NaN where a token is ignored."""
    leaves = {k: v.clone() for k, v in p.tensors.items()}
    for name in {"hidden", "down"} & set(leaves):
        leaves[name][p.labels == -100] = torch.nan
    return {k: v.to(device).requires_grad_(k in needs) for k, v in leaves.items()}


def _head(leaves) -> dict:
    low_rank = (leaves["down"], leaves["up"]) if "down" in leaves else None
    return dict(hidden=leaves["hidden"], weight=leaves["weight"], bias=leaves["bias"], low_rank=low_rank)


def score(p: Problem, leaves, **knobs) -> Tensor:
    return linear_token_logps(**_head(leaves), labels=p.labels.to(leaves["hidden"].device), **knobs)


def preference(p: Problem, leaves, **knobs):
    """`linear_preference_loss` with the knobs of `dpo`."""
    tensors = dict(labels=p.labels, sequence_ids=p.ids, reference_logps=p.reference)
    tensors = {k: v.to(leaves["hidden"].device) for k, v in tensors.items()}
    return linear_preference_loss(**_head(leaves), **tensors, num_pairs=P, beta=BETA, **knobs)


def check(leaves, oracle: Oracle, needs, dtype, scale=1.0) -> None:
    for name in needs:
        found = leaves[name].grad
        assert found.dtype == leaves[name].dtype
        found = found.double().cpu() / scale
        if name in ("hidden", "down"):
            assert (found[oracle.p.labels == -100] == 0).all(), f"d_{name} of ignored tokens"
        used = (
            ((found - oracle.gradients[name]).abs() / oracle.bound(name, dtype)).nan_to_num(nan=torch.inf).max().item()
        )
        assert used <= 1, f"d_{name}: {used:.2f} of its bound"


def far_ahead(dtype=torch.float16) -> Problem:
    """Pairs that the policy has learned already: slopes of 1e-6."""
    p = make(dtype)
    reference = torch.zeros(2 * P).index_add(0, p.ids, Oracle(p, torch.sum).logps.detach().float())
    reference[:P] -= 24.0
    return Problem(p.tensors, p.labels, p.ids, reference)
