"""What every implementation of attention over a packed row is asked for (attention.py)."""

from typing import NamedTuple

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


class Scores(NamedTuple):
    """What `shared_prefix_attention` does to scores."""

    scaling: float | None = None  # 1/sqrt(width) where None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
