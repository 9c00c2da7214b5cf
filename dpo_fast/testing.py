"""Shared by tests, `dpo-fast selftest` and benchmarks: when an error is small enough, and input factories.

A verdict must not depend on the machine: how sums are grouped differs between instruction sets, libraries and numbers
of threads, so the largest of a few errors is a draw. Two comparisons are none:

    assert_within_budget    many rows: root mean square errors, ours against plain PyTorch's
    assert_within_bound     any shape: each element against a bound that rounding cannot pass, however sums are grouped

The bounds are those of Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4. They grow with the
number of terms of a sum and are some ten to hundred times what is seen: they find what is broken (one wrong row, logits
rounded to 16 bits), the budget finds what is careless. Both are checked wherever there are rows enough.
"""

import os
from typing import cast

import torch
from torch import Tensor

EPS = 2.0**-23  # fp32. Twice the unit roundoff: accumulators that truncate, as those of tensor cores, are covered
TINY = 2.0**-126  # what is smaller may be flushed to 0
MIN_ROWS = 256


def ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64, the distance between neighbouring numbers of `dtype` at each |x|, where fp32 flushes subnormal numbers."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(x.detach().double().abs().clamp(max=info.max))
    spacing = torch.ldexp(torch.full_like(exponent, info.eps, dtype=torch.float64), exponent - 1)
    return spacing.masked_fill(x.detach() == 0, 0).clamp(min=max(info.tiny * info.eps, TINY))


def errors(result: Tensor, oracle: Tensor) -> Tensor:
    """fp64 |result - oracle|; 0 where both are the same infinity, infinite for a NaN in one of them."""
    result, oracle = result.detach().double(), oracle.detach().double().to(result.device)
    assert result.shape == oracle.shape, f"shape {tuple(result.shape)}, oracle {tuple(oracle.shape)}"
    return torch.where(result == oracle, 0.0, (result - oracle).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_within_budget(result: Tensor, eager: Tensor, oracle: Tensor, *, what: str = "") -> None:
    """`rms(result - oracle) <= (1 + 5 / sqrt(256)) rms(eager - oracle) + rms(ulp)`, over all elements but exact zeros.

    eager: plain PyTorch in the precision that `result` claims: that of its GEMMs' results, which is fp32 for 16-bit
      inputs whose products are summed in fp32. oracle: the same in fp64.

    Each term has a reason. The errors are sums of roundings, at best as many as PyTorch's: factor 1. Two root mean
    squares of n independent errors differ by a share of deviation 1 / sqrt(n) where the errors are equally large: five
    of these, for n the fewest rows that are admitted, as rows of a gradient share the errors of tokens and pairs. An
    ulp of the result's dtype is its last rounding and one of a step that PyTorch fuses.

    Raises ValueError for fewer than 256 rows (entries of the first dimension that are not all zero): the larger of two
    errors is a draw there, and `assert_within_bound` is the comparison.
    """
    ours, theirs = errors(result, oracle), errors(eager, oracle)
    oracle = oracle.detach().double().to(ours.device)
    counted = (oracle != 0) & oracle.isfinite() | (ours != 0)
    rows = int(counted.reshape(len(oracle), -1).any(1).sum()) if oracle.ndim else 0
    if rows < MIN_ROWS:
        raise ValueError(f"{what}: {rows} rows are too few to compare two errors; use assert_within_bound")
    found, peer, last = rms(ours[counted]), rms(theirs[counted]), rms(ulp(oracle, result.dtype)[counted])
    budget = (1 + 5 / MIN_ROWS**0.5) * peer + last
    said = f"{what}: rms error {found:.3e} over {rows} rows, budget {budget:.3e} (PyTorch {peer:.3e}, ulp {last:.3e})"
    assert found <= budget < float("inf"), said


def assert_within_bound(result: Tensor, oracle: Tensor, bound: "Tensor | float", *, what: str = "") -> None:
    """`|result - oracle| <= bound + 1 ulp` element by element, in ulp of the result's dtype."""
    found = errors(result, oracle)
    oracle = oracle.detach().double().to(found.device)
    bound = torch.as_tensor(bound, dtype=torch.float64, device=found.device).expand(found.shape)
    allowed = bound + ulp(oracle.nan_to_num(posinf=0.0, neginf=0.0).abs() + bound, result.dtype)
    over = (found > 0) & ~((found <= allowed) & allowed.isfinite())
    if over.any():
        worst = int((found / allowed).nan_to_num(nan=torch.inf).argmax()) if found.numel() > 1 else 0
        value, true = result.detach().reshape(-1)[worst].item(), oracle.reshape(-1)[worst].item()
        limit = allowed.reshape(-1)[worst].item()
        raise AssertionError(
            f"{what}: {int(over.sum())} of {over.numel()} elements out of bounds, "
            f"the worst, number {worst}, is {value:.9g} and should be within {limit:.2e} of {true:.9g}"
        )


def gamma(n: int) -> float:
    """The relative error of n roundings in fp32 on top of each other; of a sum of n terms, relative to sum |term|."""
    return n * EPS / (1 - n * EPS)


def token_bounds(
    logits: Tensor,
    labels: Tensor,
    d_logits: "Tensor | float" = 0.0,
    *,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """Bounds on the errors of everything that fp32 makes of rows of logits.

    logits: (N, V), exact; labels: (N,); d_logits: bound on the error that the logits themselves come with, (N, V).

    Returns fp64 "logps", "entropy", "mean_logits", "log_sum_sq_probs" (N,), "direction" (N, V) for the gradient of the
    log-prob by the logit, and "magnitude" (N, V) for the sum of the absolute values of that gradient's two parts.

    Counted in roundings of `EPS`: an operation is one; exp, log and tanh are two each (2 ulp), and what rounds the
    argument of an exp counts as often as it is large. A term of a sum over V columns meets at most V + 16, also in an
    online softmax that rescales after every 8 columns or more.
    """
    x = logits.double()
    labels = labels.long()
    slope, roundings = torch.full_like(x, abs(logit_scale) / temperature), 0
    z = x * logit_scale
    if logit_scale != 1.0:
        roundings += 2  # the constant is rounded, too
    if logit_softcap is not None:
        z, roundings = logit_softcap * torch.tanh(z / logit_softcap), roundings + 5
    if temperature != 1.0:
        z, roundings = z / temperature, roundings + 2
    dz = (slope * d_logits + roundings * EPS * z.abs()).masked_fill(z.isinf(), 0)

    many = gamma(x.shape[1] + 16)
    best = z.max(1, keepdim=True)
    row_max = best.values.nan_to_num(neginf=0.0)
    p, log_sum = z.softmax(1).nan_to_num(nan=0.0), (z - row_max).logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)
    below = (row_max - z).masked_fill(p == 0, 0)

    def of_log_sum(weight: Tensor, power: int) -> Tensor:
        """log sum exp(power z): perturbed logits, arguments of exp, terms and sum."""
        perturbed = (weight * (power * dz).exp()).sum(1, keepdim=True).clamp(min=1e-300).log().abs()
        return perturbed + power * (2 * EPS * (weight * below).sum(1, keepdim=True) + many)

    d_log_sum = of_log_sum(p, 1) + 2 * EPS * log_sum.abs()
    valid = (labels >= 0) & (labels < x.shape[1])
    target = labels.where(valid, torch.zeros_like(labels)).unsqueeze(1)
    gap = (row_max - z.gather(1, target)).masked_fill(z.gather(1, target).isinf(), 0)
    d_logps = dz.gather(1, target) + d_log_sum + EPS * (2 * gap + log_sum.abs())

    relative = torch.expm1(dz + d_log_sum + EPS * (4 * below + 2 * log_sum.abs() + 8))  # of p
    d_below = dz + dz.gather(1, best.indices) + 2 * EPS * below
    mean_below = (p * below).sum(1, keepdim=True)
    d_entropy = (p * (relative * below + (1 + relative) * d_below)).sum(1, keepdim=True) + many * mean_below
    q = (2 * z).softmax(1).nan_to_num(nan=0.0)
    log_sum_sq = (2 * (z - row_max)).logsumexp(1, keepdim=True).nan_to_num(neginf=0.0)
    d_log_sum_sq = of_log_sum(q, 2) + 2 * d_log_sum + EPS * (3 * log_sum_sq.abs() + 4 * log_sum.abs())
    d_mean = dz.mean(1, keepdim=True) + many * z.abs().mean(1, keepdim=True)

    one = torch.zeros_like(p).scatter_(1, target, 1.0)
    magnitude = slope * (one + p)
    values = {
        "logps": d_logps,
        "entropy": d_entropy + d_log_sum + 2 * EPS * (log_sum.abs() + mean_below),
        "mean_logits": d_mean,
        "log_sum_sq_probs": d_log_sum_sq,
        "direction": slope * (p * relative + TINY)
        + 16 * EPS * magnitude,  # 1 - tanh^2: absolute, its tanh has 5 roundings
        "magnitude": magnitude,
    }
    ignored = (labels == ignore_index).unsqueeze(1)
    found = {name: value.masked_fill(ignored, 0) for name, value in values.items()}
    return {k: v if k in ("direction", "magnitude") else v.squeeze(1) for k, v in found.items()}


def head_bounds(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    coefficient: "Tensor | float" = 0.0,
    d_coefficient: "Tensor | float" = 0.0,
    operands: torch.dtype = torch.float32,
    **transform,
) -> dict[str, Tensor]:
    """As `token_bounds` for logits hidden weight^T + bias + down up^T, whose products are summed in fp32; and bounds on
    the gradients of sum_i coefficient_i logp_i: "hidden", "weight", "bias", "down", "up".

    coefficient: (N,); d_coefficient: (N,), the error that it comes with; operands: the dtype in which the gradient by
    the logits meets the GEMMs. `transform` goes to `token_bounds`.
    """
    factors = [(hidden.double(), weight.double())]
    if low_rank is not None:
        factors.append((low_rank[0].double(), low_rank[1].double()))
    logits = cast(Tensor, sum(left @ right.T for left, right in factors))
    terms = cast(Tensor, sum(left.abs() @ right.abs().T for left, right in factors))
    if bias is not None:
        logits, terms = logits + bias.double(), terms + bias.double().abs().nan_to_num(posinf=0.0)
    roundings = sum(left.shape[1] for left, _ in factors) + 2
    bounds = token_bounds(logits, labels, gamma(roundings) * terms, **transform)

    (N, V), magnitude = logits.shape, bounds["magnitude"]
    c, d_c = (
        torch.as_tensor(x, dtype=torch.float64, device=logits.device).abs().expand(N).unsqueeze(1)
        for x in (coefficient, d_coefficient)
    )
    error = c * bounds["direction"] + d_c * (magnitude + bounds["direction"])
    if operands in (torch.float16, torch.bfloat16):
        error = error + 2 * ulp(c * magnitude, operands)  # of its own and of the coefficient's product with the factor
    by_row, by_column = error + gamma(V + 16) * c * magnitude, error + gamma(N + 16) * c * magnitude
    bounds["bias"] = by_column.sum(0)
    for (left, right), names in zip(factors, (("hidden", "weight"), ("down", "up")), strict=False):
        bounds[names[0]], bounds[names[1]] = by_row @ right.abs(), by_column.T @ left.abs()
    return bounds


def make_generator(seed: int = 0) -> torch.Generator:
    """Seeds are shifted by DPO_FAST_TEST_SEED: the same checks on other numbers."""
    return torch.Generator().manual_seed(seed + 1000 * int(os.environ.get("DPO_FAST_TEST_SEED", "0")))


def fp32_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Plain PyTorch: x weight^T + bias in fp32 (fp64 for fp64); 16-bit inputs are multiplied as the device does it."""
    if x.dtype in (torch.float16, torch.bfloat16):
        out = torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().T
    else:
        out = x @ weight.T
    return out if bias is None else out + bias


def make_logits(
    rows: int, vocab: int, *, dtype=torch.float32, std: float = 4.0, ignored: float = 0.2, seed: int = 0, device="cpu"
) -> tuple[Tensor, Tensor]:
    """Random logits (rows, vocab) of realistic spread and int64 labels (rows,), a share of them ignored (-100)."""
    generator = make_generator(seed)
    logits = (torch.randn(rows, vocab, generator=generator) * std).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return logits.to(device), labels.to(device)
