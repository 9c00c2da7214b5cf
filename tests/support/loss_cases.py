"""Pairs and objectives that the tests of losses and metrics share."""

import torch

from dpo_fast.logps import pair_logps
from dpo_fast.objective import Objective

SMOOTHING = {"exo_pair": 1e-3, "robust": 0.1}  # where the default does not do


def objective(name, **params):
    return Objective(name, **{"label_smoothing": SMOOTHING.get(name, 0.0), **params})


def make_pairs(P=5, dtype=torch.float32, seed=0, std=3.0):
    generator = torch.Generator().manual_seed(seed)
    logps = -20 + std * torch.randn(2 * P, generator=generator, dtype=torch.float64)
    reference = logps + torch.randn(2 * P, generator=generator, dtype=torch.float64)
    lengths = torch.randint(3, 12, (2 * P,), generator=generator)
    return pair_logps(logps.to(dtype), reference.to(dtype), lengths)
