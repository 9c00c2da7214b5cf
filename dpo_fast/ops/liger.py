"""Liger's forward for Hopper, where DPO_FAST_FUSED_SCORE=1 asks for it: GEMM and softmax in one, no logits in memory.

For the plan `score` alone. Opt-in, as nothing here has measured it, and as it rounds logits to fp16, by up to 5e-4 of
each, where a tile keeps them in fp32. A policy that trains beside is scored by a tile.

Liger's function checks labels on the host, which waits for the device. Its own switch leaves that out, and must be set:
LIGER_SCALED_CE_SM90_VALIDATE_TARGETS=0. Labels come to it usable.
"""

import importlib.metadata
import importlib.util
import os
import re

import torch
from torch import Tensor

from .call import Call, Head
from .dispatch import compute_capability

SWITCH, VALIDATION = "DPO_FAST_FUSED_SCORE", "LIGER_SCALED_CE_SM90_VALIDATE_TARGETS"
_SINCE = (0, 8, 5)
_WIDTH = 64  # of hidden states, to a multiple of which Liger would pad a copy of the weight


def asked() -> bool:
    return os.environ.get(SWITCH, "0") == "1"


def _version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", importlib.metadata.version("liger-kernel"))[:3])


def reasons_against_machine(device: torch.device) -> list[str]:
    """Why it cannot run here at all."""
    reasons = []
    if importlib.util.find_spec("liger_kernel") is None:
        reasons.append("the package liger-kernel is not installed")
    elif _version() < _SINCE:
        reasons.append(f"liger-kernel {'.'.join(map(str, _version()))} has no such forward, 0.8.5 has")
    if importlib.util.find_spec("cutlass") is None:
        reasons.append("the package nvidia-cutlass-dsl is not installed")
    if compute_capability(device) != (9, 0):
        reasons.append(f"it needs CUDA with compute capability 9.0, the tensors are on {device.type!r}")
    if os.environ.get(VALIDATION, "1") not in ("0", "false", "False"):
        reasons.append(f"{VALIDATION}=0 is not set: Liger would look at the labels, and the host wait")
    return reasons


def reasons_against(call: Call, head: Head) -> list[str]:
    """Why it cannot run for a call; an empty list means that it can."""
    scale, softcap, _ = call.transform
    unmet = {
        f"impl is {call.impl!r}, not 'triton'": call.impl != "triton",
        f"it takes bfloat16, not {str(call.dtype).removeprefix('torch.')}": call.dtype != torch.bfloat16,
        "it has no bias": head.bias is not None,
        "it has no low-rank update": head.down is not None,
        "it has no soft-cap": softcap is not None,
        f"it takes logits with a positive scale, not {scale}": not scale > 0,
        f"it has no {', '.join(call.outputs)} in fp32": bool(call.outputs),
        f"it would pad a width that is no multiple of {_WIDTH}": head.hidden.shape[1] % _WIDTH != 0,
        "it would copy a weight that is not contiguous": not head.weight.is_contiguous(),
    }
    return reasons_against_machine(head.hidden.device) + [reason for reason, holds in unmet.items() if holds]


def score(op: str, call: Call, head: Head, labels: Tensor) -> Tensor:
    """(N,) log-probs, 0 where a label is ignored, NaN where one is out of range. ValueError with every reason where it
    cannot run."""
    if reasons := reasons_against(call, head):
        raise ValueError(f"{op}: {SWITCH}=1 cannot run: " + "; ".join(reasons))
    from liger_kernel.ops.cutedsl.ops import fused_scaled_cross_entropy_forward

    ignored = labels == call.ignore_index
    invalid = ~ignored & ((labels < 0) | (labels >= head.weight.shape[0]))
    usable = labels.long().masked_fill(ignored | invalid, -100)
    scale, _, temperature = call.transform
    hidden, weight = head.hidden.to(call.dtype), head.weight.to(call.dtype)
    nll, *_ = fused_scaled_cross_entropy_forward(hidden, weight, usable, temperature / scale, -100)
    return (0 - nll).masked_fill_(invalid, torch.nan)
