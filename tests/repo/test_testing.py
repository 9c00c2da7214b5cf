"""What judges the others: small errors pass, larger ones do not, and nobody can compare two draws."""

import pytest
import torch

from dpo_fast.ops.oracle import oracle_token_stats
from dpo_fast.testing import (
    EPS,
    MIN_ROWS,
    assert_within_bound,
    assert_within_budget,
    head_bounds,
    make_generator,
    make_logits,
    token_bounds,
    ulp,
)


def errors_of(rows=1000, columns=3, size=4 * EPS, dtype=torch.float32):
    """oracle, two results with independent errors of rms `size`."""
    generator = make_generator()
    oracle = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64) * size
    return oracle, *((oracle + n).to(dtype) for n in noise)


@pytest.mark.parametrize("size", [0, EPS, 100 * EPS])
@pytest.mark.parametrize("rows", [MIN_ROWS, 5000])
def test_errors_like_pytorchs_pass_the_budget_and_three_times_those_do_not(rows, size):
    oracle, ours, eager = errors_of(rows, size=size)
    assert_within_budget(ours, eager, oracle)
    worse = (oracle + 3 * (ours.double() - oracle)).float()
    if size:
        with pytest.raises(AssertionError, match="rms error"):
            assert_within_budget(worse, eager, oracle)
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(ours.half().float(), eager, oracle)


def test_few_rows_are_refused_whatever_their_width():
    oracle, ours, eager = errors_of(MIN_ROWS - 1, 100)
    with pytest.raises(ValueError, match="255 rows are too few.*assert_within_bound"):
        assert_within_budget(ours, eager, oracle)
    oracle, ours, eager = errors_of()
    for x in (oracle, ours, eager):
        x[100:] = 0  # as ignored tokens are
    with pytest.raises(ValueError, match="100 rows"):
        assert_within_budget(ours, eager, oracle)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_passes_only_where_the_oracle_says_so(value):
    oracle, ours, eager = errors_of()
    ours[7, 1] = value
    with pytest.raises(AssertionError):
        assert_within_budget(ours, eager, oracle)
    with pytest.raises(AssertionError, match="1 of 3000 elements out of bounds, the worst, number 22"):
        assert_within_bound(ours, oracle, 1.0)
    with pytest.raises(AssertionError, match="1 of 3000"):
        assert_within_bound(ours, oracle, torch.full(ours.shape, torch.inf).where(ours != ours.nan_to_num(), 1.0))
    eager[7, 1] = value
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(ours, eager, oracle)
    oracle[7, 1] = eager[7, 1] = torch.inf
    if value == torch.inf:
        assert_within_budget(ours, eager, oracle)
        assert_within_bound(ours, oracle, 1.0)


def test_ulp():
    x = torch.tensor([1.0, 1.5, 2.0, -3.0, 0.0])
    assert ulp(x, torch.float32).tolist() == [EPS, EPS, 2 * EPS, 2 * EPS, 2.0**-126]
    assert ulp(x, torch.bfloat16)[:2].tolist() == [2.0**-7] * 2 and ulp(x, torch.float16)[4] == 2.0**-24


def test_bounds_are_passed_by_rounded_logits():
    """Each wrong in a way that 16 bits are; and one wrong row among many."""
    logits, labels = make_logits(50, 1003, ignored=0.0)
    truth, bounds = oracle_token_stats(logits, labels), token_bounds(logits, labels)
    for dtype in (torch.float16, torch.bfloat16):
        rough = oracle_token_stats(logits.to(dtype), labels)
        for name in ("logps", "entropy", "log_sum_sq_probs"):
            with pytest.raises(AssertionError, match="out of bounds"):
                assert_within_bound(getattr(rough, name), getattr(truth, name), bounds[name])
    wrong = truth.logps.float()
    wrong[17] += 1e-2
    with pytest.raises(AssertionError, match="1 of 50 .* number 17"):
        assert_within_bound(wrong, truth.logps, bounds["logps"])


@pytest.mark.parametrize("transform", [{}, dict(logit_softcap=5.0, logit_scale=0.7, temperature=1.3)], ids=str)
def test_bounds_hold_for_what_they_bound(transform):
    """In fp32 with fp32's own noise in each input: what a bound must allow, whoever computes it."""
    generator = make_generator()
    hidden, weight = torch.randn(40, 24, generator=generator), torch.randn(301, 24, generator=generator)
    labels = torch.randint(301, (40,), generator=generator)
    bounds = head_bounds(hidden, weight, labels, **transform)
    exact = oracle_token_stats(hidden.double() @ weight.double().T, labels, **transform)
    logits = hidden.double() @ weight.double().T
    moved = logits * (1 + 24 * EPS * torch.randn(logits.shape, generator=generator, dtype=torch.float64).sign())
    noisy = oracle_token_stats(moved, labels, **transform)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert_within_bound(getattr(noisy, name), getattr(exact, name), bounds[name], what=name)
