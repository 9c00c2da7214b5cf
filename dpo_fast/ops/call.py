"""What is fixed for one call of level 1, 2 or 3: the head's tensors, the knobs.

Registered ops take tensors, numbers and text, no objects: `Call.flat` and `unflat` turn the knobs into these and back.
Numbers stay numbers, which a compiled graph may leave open.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    FLOATS,
    INTEGERS,
    check_count,
    check_finite,
    check_ignore_index,
    check_labels,
    check_tensor,
    checking,
)
from .dispatch import choose_impl, free_to_look, plan_device
from .plan import HeadPlan, plan_head
from .roofline import describe_device
from .softmax import Transform
from .stats import check_outputs


class Head(NamedTuple):
    """The tensors that logits are made of: hidden weight^T + down up^T + bias.

    Methods, no properties: those of a named tuple Dynamo does not trace in torch 2.8."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    down: Tensor | None  # (N, r)
    up: Tensor | None  # (V, r)

    @classmethod
    def make(cls, op: str, hidden, weight, bias, low_rank, labels) -> "Head":
        """Checked, with `labels`: TypeError for dtypes, ValueError for shapes and devices."""
        check_tensor(op, "hidden", hidden, ("N", "H"), FLOATS)
        N, H = hidden.shape
        check_tensor(op, "weight", weight, ("V", H), FLOATS, hidden.device)
        V = weight.shape[0]
        if V < 1 or H < 1:
            raise ValueError(f"{op}: weight must have shape (V, H) with V, H >= 1, got {tuple(weight.shape)}")
        check_tensor(op, "labels", labels, (N,), INTEGERS, hidden.device)
        if bias is not None:
            check_tensor(op, "bias", bias, (V,), FLOATS, hidden.device)
        if low_rank is None:
            low_rank = None, None
        elif not isinstance(low_rank, (tuple, list)) or len(low_rank) != 2:
            given = f"{len(low_rank)} elements" if isinstance(low_rank, (tuple, list)) else type(low_rank).__name__
            raise ValueError(f"{op}: low_rank must be a pair (down, up), got {given}")
        else:
            check_tensor(op, "low_rank[0]", low_rank[0], (N, "r"), FLOATS, hidden.device)
            check_tensor(op, "low_rank[1]", low_rank[1], (V, low_rank[0].shape[1]), FLOATS, hidden.device)
        if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(f"{op}: hidden is {hidden.dtype}, weight is {weight.dtype}; cast one, or enable autocast")
        return cls(hidden, weight, bias, *low_rank)

    def check_values(self, op: str, labels: Tensor, ignore_index: int) -> None:
        """ValueError for labels out of range where looking is free; where checking is on, for what is not finite."""
        if free_to_look(labels) or checking():
            check_labels(op, labels, self.weight.shape[0], ignore_index)
        if checking():
            check_finite(op, **dict(zip(("hidden", "weight", "bias", "low_rank[0]", "low_rank[1]"), self, strict=True)))

    def sizes(self) -> tuple[int, int, int]:
        """(N, H, V)"""
        return *self.hidden.shape, self.weight.shape[0]

    def gradients(self) -> tuple[bool, bool]:
        """Whether gradients are asked for: of hidden or down; of weight, bias or up."""
        asked = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in self]
        return asked[0] or asked[3], asked[1] or asked[2] or asked[4]

    def gemm_dtype(self) -> torch.dtype:
        """What the GEMMs take: autocast's dtype inside autocast, which leaves fp64 alone, else the dtype of hidden."""
        device, dtype = self.hidden.device.type, self.hidden.dtype
        cast = torch.is_autocast_enabled(device) and dtype != torch.float64
        return torch.get_autocast_dtype(device) if cast else dtype


@dataclass(frozen=True)
class Call:
    """The knobs of one call, checked. What depends on the number of tokens is asked of `sizes`, not kept."""

    transform: Transform
    ignore_index: int
    outputs: tuple[str, ...]  # statistics that are computed, in the order of STATS
    impl: str  # that runs, never "auto"
    plan: str = "-"  # its name; "-" where logits are given, which need none
    tile_mib: int | None = None
    dtype: torch.dtype = torch.float32  # of the GEMMs; logits that are given need none

    @classmethod
    def of_logits(cls, op: str, logits: Tensor, outputs: Iterable[str], transform: Transform, ignore_index, impl):
        outputs, ignore_index = check_outputs(op, outputs), check_ignore_index(op, ignore_index)
        return cls(transform, ignore_index, outputs, choose_impl(op, impl, logits.device, logits.dtype))

    @classmethod
    def of_head(cls, op: str, head: Head, outputs: Iterable[str], transform: Transform, ignore_index, tile_mib, impl):
        """The plan is what the head runs for itself: the loss, which knows more, may replace it."""
        outputs, ignore_index = check_outputs(op, outputs), check_ignore_index(op, ignore_index)
        tile_mib, hidden = check_tile_mib(op, tile_mib), head.hidden
        hidden_grad, head_grad = head.gradients()
        plan = "recompute" if head_grad else "frozen" if hidden_grad else "score"
        impl = choose_impl(op, impl, hidden.device, hidden.dtype)
        return cls(transform, ignore_index, outputs, impl, plan, tile_mib, head.gemm_dtype())

    def flat(self) -> tuple[list[float], list[int], str]:
        """(floats, ints, text): what a registered op takes."""
        scale, softcap, temperature = self.transform
        floats = [scale, 0.0 if softcap is None else softcap, temperature]
        text = " ".join((self.impl, self.plan, str(self.dtype).removeprefix("torch."), *self.outputs))
        return floats, [self.ignore_index, 0 if self.tile_mib is None else self.tile_mib], text

    @classmethod
    def unflat(cls, floats: list[float], ints: list[int], text: str) -> "Call":
        scale, softcap, temperature = floats
        ignore_index, tile_mib = ints
        impl, plan, dtype, *outputs = text.split()
        transform = Transform(scale, softcap or None, temperature)
        return cls(transform, ignore_index, tuple(outputs), impl, plan, tile_mib or None, getattr(torch, dtype))

    def sizes(self, weight: Tensor, N: int, hidden_grad: bool) -> HeadPlan:
        """The plan of N tokens, for the tiles' sizes. hidden_grad: whether this pass makes one."""
        V, H = weight.shape
        needs = dict(hidden_grad=hidden_grad, head_grad=self.plan == "recompute", separable=False)
        return self.plan_of((N, H, V), weight.device, **needs)

    def plan_of(self, sizes: tuple[int, int, int], device: torch.device, **needs) -> HeadPlan:
        """`plan_head` of (N, H, V) on a device, with this call's knobs."""
        return plan_head(
            *sizes,
            self.dtype,
            **needs,
            tile_mib=self.tile_mib,
            device_type=plan_device(self.impl, device),
            # A compiled graph is not to depend on the device that it was made on
            device=None if torch.compiler.is_compiling() else describe_device(device),
        )


def check_tile_mib(op: str, tile_mib: int | None) -> int | None:
    """The budget for a tile in MiB; DPO_FAST_TILE_MIB stands in for None where it is set."""
    source = "tile_mib"
    value: Any = tile_mib
    if value is None and os.environ.get("DPO_FAST_TILE_MIB"):
        source, value = "DPO_FAST_TILE_MIB", os.environ["DPO_FAST_TILE_MIB"]
        value = int(value) if value.isdecimal() else value
    if value is None:
        return None
    return check_count(op, source, value, 1, "an int of at least 1 or None")
