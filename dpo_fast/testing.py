"""Shared by tests, `dpo-fast selftest` and benchmarks: the error budget and input factories."""

import torch
from torch import Tensor

UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def max_error(result: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference to an fp64 oracle; equal infinities count as equal, NaN as infinitely wrong."""
    result, oracle = result.detach().double().cpu(), oracle.detach().double().cpu()
    difference = torch.where(result == oracle, 0.0, (result - oracle).abs())
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0


def assert_within_budget(result: Tensor, eager: Tensor, oracle: Tensor, *, factor: float = 1.0, what: str = "") -> None:
    """`error(result) <= factor * error(eager) + 1 ulp`, both against the same fp64 oracle.

    `eager` is the plain PyTorch computation in the same input dtype. One ulp is that of the result's dtype at the
    largest finite magnitude of the oracle: the budget follows the scale of the data, nobody picks a tolerance.
    """
    assert result.shape == oracle.shape, f"{what}: shape {tuple(result.shape)}, oracle {tuple(oracle.shape)}"
    finite = oracle.detach().double()[torch.isfinite(oracle)]
    magnitude = finite.abs().max().item() if finite.numel() else 0.0
    ulp = UNIT[result.dtype] * 2.0 ** torch.tensor(max(magnitude, 1e-30)).log2().floor().item()
    ours, theirs = max_error(result, oracle), max_error(eager, oracle)
    budget = factor * theirs + ulp
    assert ours <= budget, f"{what}: error {ours:.3e} over the budget {budget:.3e} (eager {theirs:.3e}, ulp {ulp:.3e})"


def make_logits(
    rows: int, vocab: int, *, dtype=torch.float32, std: float = 4.0, ignored: float = 0.2, seed: int = 0, device="cpu"
) -> tuple[Tensor, Tensor]:
    """Random logits (rows, vocab) of realistic spread and int64 labels (rows,), a share of them ignored (-100)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * std).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return logits.to(device), labels.to(device)
