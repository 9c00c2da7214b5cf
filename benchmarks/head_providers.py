"""Who computes the head of `benchmarks.head`, on which problems, and what the bare GEMMs take."""

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_fast import linear_preference_loss, linear_token_logps, sequence_logps

BETA = 0.1
# name -> N tokens, pairs, H, V, dtype, soft-cap
SHAPES = {
    "cpu-bar": (1024, 4, 1024, 32_000, torch.float32, None),
    "cpu-quick": (512, 4, 512, 32_000, torch.float32, None),
    "cpu-tiny": (512, 2, 32, 501, torch.float32, None),
    "qwen3-0.6b-cpu": (256, 2, 1024, 151_936, torch.float32, None),
    "llama3-8b-cpu": (256, 2, 1024, 128_256, torch.float32, None),
    "gemma2-2b-cpu": (256, 2, 576, 256_000, torch.float32, 30.0),
    "llama3-8b": (8192, 16, 4096, 128_256, torch.bfloat16, None),
    "bar": (8192, 16, 4096, 131_072, torch.bfloat16, None),
    "qwen3-0.6b": (8192, 16, 1024, 151_936, torch.bfloat16, None),
    "gemma2-2b": (8192, 16, 2304, 256_000, torch.bfloat16, 30.0),
    # a step's tokens: 8 pairs of 200 + 200, a pair much shorter than a tile
    "llama3-1b-few": (2048, 8, 2048, 128_256, torch.bfloat16, None),
    "llama3-1b-chat": (3200, 8, 2048, 128_256, torch.bfloat16, None),
    "qwen3-0.6b-chat": (3200, 8, 1024, 151_936, torch.bfloat16, None),
    "gemma2-2b-chat": (3200, 8, 2304, 256_000, torch.bfloat16, 30.0),
}


@dataclass
class Problem:
    """One batch of pairs, tokens pair by pair, chosen before rejected, all sequences of one length."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ids: Tensor
    pairs: int
    softcap: float | None

    @classmethod
    def make(cls, N, pairs, H, V, dtype, softcap, device) -> "Problem":
        torch.manual_seed(0)
        length = N // (2 * pairs)
        hidden = torch.randn(2 * pairs * length, H, device=device).to(dtype)
        weight = (torch.randn(V, H, device=device) * (2 / math.sqrt(H))).to(dtype)
        ids = torch.arange(2 * pairs, device=device).view(2, pairs).T.reshape(-1).repeat_interleave(length)
        labels = torch.randint(V, (len(ids),), device=device)
        return cls(hidden, weight, labels, ids, pairs, softcap)

    @property
    def reference(self) -> Tensor:
        return torch.zeros(2 * self.pairs, device=self.hidden.device)

    def loss(self, logps: Tensor) -> Tensor:
        """DPO from token log-probs; the reference is 0."""
        chosen, rejected = sequence_logps(logps, self.ids, 2 * self.pairs).tensor_split(2)
        return F.softplus(-BETA * (chosen - rejected)).mean()

    def rows(self) -> tuple[Tensor, Tensor]:
        """Hidden (2P, T, H) and labels (2P, T), chosen first: what fused DPO losses take."""
        order = self.ids.argsort(stable=True)
        shape = (2 * self.pairs, -1)
        return self.hidden[order].view(*shape, self.hidden.shape[1]), self.labels[order].view(shape)


class Likelihood(Problem):
    """The same with the sum of negative log-probs as its loss: what heads for training on text alone compute."""

    def loss(self, logps: Tensor) -> Tensor:
        return -logps.sum()


# --- providers: (problem, hidden, weight) -> token log-probs (N,), or a loss () ------------------------------------


def eager(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    logits = (hidden @ weight.T).float()
    if p.softcap:
        logits = p.softcap * torch.tanh(logits / p.softcap)
    return logits.log_softmax(-1).gather(1, p.labels[:, None])[:, 0]


def ours(p: Problem, hidden: Tensor, weight: Tensor, **tile) -> Tensor:
    """score and frozen; with a trained head, recompute."""
    return linear_token_logps(hidden, weight, p.labels, logit_softcap=p.softcap, **tile)


def ours_fused(p: Problem, hidden: Tensor, weight: Tensor, **tile) -> Tensor:
    """pairwise or pending where the head trains."""
    knobs = dict(reference_logps=p.reference, beta=BETA, logit_softcap=p.softcap, **tile)
    return linear_preference_loss(hidden, weight, p.labels, p.ids, p.pairs, **knobs).loss


def torch_linear_cross_entropy(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, p.labels, reduction="none", options=options)


def trl(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, p.labels, 1.0, 32_768, p.softcap, 1.0, ("log_probs",))[0]


def cut_cross_entropy(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce_exact" if hidden.is_cuda else "torch_compile"
    return -linear_cross_entropy(hidden, weight, p.labels, softcap=p.softcap, reduction="none", impl=impl)


def liger_flsce(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, p.labels)


def quack(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(hidden, weight, p.labels, reduction="sum")


def liger_dpo(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    rows, labels = p.rows()
    if hidden.requires_grad:  # rows() gathers the problem's own hidden states
        order = p.ids.argsort(stable=True)
        rows = hidden[order].view(rows.shape)
    reference = torch.zeros_like(rows)  # a uniform reference: its log-ratios cancel
    head = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=True)
    return head(weight, rows, labels, None, reference, weight.detach())[0]


@functools.cache
def _compiled_eager() -> Callable:
    return torch.compile(eager)


def compiled_eager(p: Problem, hidden: Tensor, weight: Tensor) -> Tensor:
    return _compiled_eager()(p, hidden, weight)


NOT_BY_DEFAULT = ("compiled-eager",)  # compiles once a mode, for longer than all others take


class Facts(NamedTuple):
    """What a provider does, by its source; tests count the products of those that run on a CPU."""

    gemms: tuple[int, int, int]  # in score, frozen, trained
    carries: str  # what its gradient can be of


TOKENS, PAIRS, ONE = "a number per token", "a loss of pairs", "one number for all tokens: no DPO"
FACTS = {
    "ours": Facts((1, 2, 4), TOKENS),
    "ours-fused": Facts((1, 2, 3), PAIRS),
    "eager": Facts((1, 2, 3), TOKENS),
    "compiled-eager": Facts((1, 2, 3), TOKENS),
    "torch-linear-ce": Facts((1, 3, 4), TOKENS),
    "trl-1.16": Facts((1, 3, 4), TOKENS),
    "cut-cross-entropy": Facts((1, 3, 4), TOKENS),
    "liger-flsce": Facts((1, 4, 4), TOKENS),
    "liger-dpo": Facts((2, 3, 4), PAIRS),  # a reference's logits are among them
    "quack": Facts((1, 2, 3), ONE),
}


def facts_of(name: str) -> Facts:
    """Of a provider; of "ours-256-mib" those of "ours"."""
    known = [known for known in FACTS if name == known or name.startswith(f"{known}-")]
    return FACTS[max(known, key=len)]


# name -> provider, and what of another package it needs
OTHERS = {
    "torch-linear-ce": (torch_linear_cross_entropy, lambda: F.linear_cross_entropy),
    "trl-1.16": (trl, lambda: importlib.import_module("trl.kernels")),
    "cut-cross-entropy": (cut_cross_entropy, lambda: importlib.import_module("cut_cross_entropy")),
    "liger-flsce": (liger_flsce, lambda: importlib.import_module("liger_kernel.ops")),
    "quack": (quack, lambda: importlib.import_module("quack.linear_cross_entropy")),
    "liger-dpo": (liger_dpo, lambda: importlib.import_module("liger_kernel.chunked_loss")),
}


WITHOUT_SOFTCAP = ("torch-linear-ce", "liger-flsce", "quack", "liger-dpo")


def providers(p: Problem, only: Iterable[str] | None = None, tiles_mib: Iterable[int] = ()) -> dict[str, Callable]:
    """Those that can run here, by name; a missing one is printed with its reason.

    tiles_mib: ours once more with each of these tiles. only: no others than these."""
    found: dict[str, Callable] = {"ours": ours, "ours-fused": ours_fused}
    for mib in tiles_mib:
        found[f"ours-{mib}-mib"] = functools.partial(ours, tile_mib=mib)
        found[f"ours-fused-{mib}-mib"] = functools.partial(ours_fused, tile_mib=mib)
    found |= {"eager": eager, "compiled-eager": compiled_eager}

    def wanted(name: str) -> bool:
        return name not in NOT_BY_DEFAULT if only is None else name in only

    for name, (function, probe) in OTHERS.items():
        if p.softcap and name in WITHOUT_SOFTCAP:
            reason = "it has no soft-cap"
        else:
            try:
                probe()
                found[name] = function
                continue
            except (ImportError, AttributeError) as error:
                reason = error
        if wanted(name):
            print(f"{name}: left out, {reason}")
    return {name: provider for name, provider in found.items() if wanted(name)}


# --- what is timed -------------------------------------------------------------------------------------------------


def floors(p: Problem) -> dict[str, Callable[[], object]]:
    """The bare GEMMs of the plans, in the largest tiles that gain anything (1,024 rows on CPU, 4,096 elsewhere), which
    exist before the clock starts."""
    N, V = p.hidden.shape[0], p.weight.shape[0]
    rows = min(N, 1024 if p.hidden.device.type == "cpu" else 4096)
    tile = torch.empty(rows, V, dtype=p.hidden.dtype, device=p.hidden.device)
    d_hidden, d_weight = torch.empty_like(p.hidden), torch.zeros_like(p.weight)

    def run(gemms: int) -> None:
        for start in range(0, N, rows):
            h = p.hidden[start : start + rows]
            z = torch.mm(h, p.weight.T, out=tile[: len(h)])
            if gemms > 1:
                torch.mm(z, p.weight, out=d_hidden[start : start + rows])
            if gemms > 2:
                torch.mm(z.T, h, out=d_weight) if start == 0 else torch.addmm(d_weight, z.T, h, out=d_weight)

    return {f"floor-{k}-gemm": (lambda k=k: run(k)) for k in (1, 2, 3)}


MODES = {"score": 1, "frozen": 2, "trained": 3}  # the least GEMMs
OURS = {"score": "ours", "frozen": "ours", "trained": "ours-fused"}  # who runs the mode's plan


def case(p: Problem, provider: Callable, mode: str) -> Callable[[], tuple]:
    """mode: score (no gradient), frozen (hidden alone), trained (hidden and weight). -> output, d_hidden, d_weight"""

    def run():
        hidden, weight = p.hidden.detach(), p.weight.detach()
        if mode == "score":
            with torch.no_grad():
                return provider(p, hidden, weight), None, None
        hidden = hidden.requires_grad_()
        weight = weight.requires_grad_(mode == "trained")
        out = provider(p, hidden, weight)
        (out if out.ndim == 0 else p.loss(out)).backward()
        return out.detach(), hidden.grad, weight.grad

    return run
