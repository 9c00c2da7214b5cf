"""A random head for tests of levels 2 and 3."""

import math

import torch
from torch import Tensor


def random_head(
    generator: torch.Generator, N: int, H: int, V: int, dtype: torch.dtype, rank: int, up_std: float
) -> dict[str, Tensor]:
    """hidden (N, H), weight (V, H), bias (V,), down (N, rank), up (V, rank); logits of a few units."""

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    return dict(
        hidden=normal(N, H),
        weight=normal(V, H, std=2 / math.sqrt(H)),
        bias=normal(V),
        down=normal(N, rank),
        up=normal(V, rank, std=up_std),
    )
