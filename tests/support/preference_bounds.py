"""How far losses, and level 3, may be from the fp64 oracle: to first order in the roundings of log-probs."""

from dataclasses import replace

import torch
from torch import Tensor

from dpo_fast.testing import EPS, assert_within_bound, gamma, head_bounds

LOSS_ROUNDINGS = 64  # elementary functions and constants in a loss and its derivative, an ample count


def loss_bounds(pairs, objective, d_tokens: "Tensor | float" = 0.0, relative: "Tensor | float" = 0.0):
    """-> bounds on sequence log-probs (2P,) and losses (P,), c = |d mean loss / d log-prob| (2P,) and the bound on c.

    pairs: the oracle's. d_tokens: (2P,), of the sums of token log-probs; relative: (P,), of the weights of pairs. An
    error of a log-prob reaches the losses through their derivatives, and c through the second ones.
    """
    P = pairs.num_pairs
    sums = torch.cat([pairs.chosen, pairs.rejected]).detach().double()
    size = sums.abs()
    if pairs.ref_chosen is not None:
        size = size + torch.cat([pairs.ref_chosen, pairs.ref_rejected]).abs()
    d_sums = d_tokens + gamma(4) * size

    def losses(x):
        return objective(replace(pairs, chosen=x[:P], rejected=x[P:]))

    def parts(x):  # the means of each loss by itself: in their sum, slopes may cancel, but not their roundings
        terms = [value for _, value in objective._terms(replace(pairs, chosen=x[:P], rejected=x[P:]))]
        return torch.stack(terms if pairs.weights is None else [value * pairs.weights for value in terms]).mean(1)

    first = torch.autograd.functional.jacobian(losses, sums).abs()
    second = torch.autograd.functional.hessian(lambda x: losses(x).mean(), sums).abs()
    coefficient = torch.autograd.functional.jacobian(lambda x: losses(x).mean(), sums).abs()
    largest = torch.autograd.functional.jacobian(parts, sums).abs().sum(0).max()
    d_coefficient = second @ d_sums + LOSS_ROUNDINGS * EPS * largest
    d_coefficient += coefficient * torch.cat([torch.as_tensor(relative).expand(P)] * 2)
    d_losses = first @ d_sums + (LOSS_ROUNDINGS * EPS + relative) * (1 + losses(sums).abs())
    return d_sums, d_losses, coefficient, d_coefficient


def bounds_of(tensors, labels, ids, truth, objective, **transform):
    """Bounds on log-probs of sequences (2P,), losses (P,) and gradients.

    tensors: hidden, weight, and bias, down and up where there are any; truth: the oracle's PreferenceOutput."""
    hidden, weight, bias, down, up = (tensors.get(name) for name in ("hidden", "weight", "bias", "down", "up"))
    head = dict(bias=bias, low_rank=None if down is None else (down, up), **transform)
    tokens = head_bounds(hidden, weight, labels, **head)
    pairs, P = truth.pairs, truth.pairs.num_pairs

    def summed(x):
        return torch.zeros(2 * P, dtype=torch.float64).index_add_(0, ids, x)

    relative = 0.0  # of WPO's weights
    if objective.use_weighting:
        counts = torch.cat([pairs.chosen_lengths, pairs.rejected_lengths]).clamp(min=1)
        both = summed(tokens["logps"] + tokens["log_sum_sq_probs"])
        relative = torch.stack((both / counts).tensor_split(2)).sum(0)
    d_sums, d_losses, c, d_c = loss_bounds(pairs, objective, summed(tokens["logps"]), relative)
    bounds = head_bounds(hidden, weight, labels, coefficient=c[ids], d_coefficient=d_c[ids], **head)
    return {**bounds, "sums": d_sums, "losses": d_losses}


def check_within_bounds(out, gradients, truth, true, bounds):
    assert out.loss.dtype == torch.float32
    assert_within_bound(out.losses, truth.losses, bounds["losses"], what="losses")
    assert_within_bound(out.loss.detach(), truth.loss.detach(), bounds["losses"].mean() * (1 + EPS), what="loss")
    for name, bound in zip(("chosen_logps", "rejected_logps"), bounds["sums"].tensor_split(2), strict=True):
        assert_within_bound(getattr(out, name), getattr(truth, name), bound, what=name)
    for name, gradient in gradients.items():
        assert_within_bound(gradient, true[name], bounds[name], what=name)
