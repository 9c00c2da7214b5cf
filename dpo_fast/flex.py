"""FlexAttention over a packed row: what speaks against it, and the call. Its masks: block_mask.py."""

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from .layout import SharedPrefixLayout
from .scores import HALF, Scores

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def reasons_against(query: Tensor, value: Tensor, scores: Scores, gpu: tuple[int, int] | None) -> list[str]:
    """Every reason why it cannot run. gpu: the compute capability, None where the tensors are not on a GPU."""
    reasons: list[str] = []
    if gpu is None:
        return reasons  # torch's own path on a CPU takes any widths
    if not _TRITON_INSTALLED:
        reasons.append("the package triton is not installed")
    if gpu < (8, 0):
        reasons.append(f"Triton needs compute capability 8.0, this GPU has {gpu[0]}.{gpu[1]}")
    if query.dtype not in (*HALF, torch.float32):
        reasons.append(f"FlexAttention takes bfloat16, float16 and float32, not {str(query.dtype)[6:]}")
    widths = sorted((query.shape[-1], value.shape[-1]))
    if widths[0] < 16:
        reasons.append(f"FlexAttention wants heads of at least 16, got {widths[0]}")
    # Its default tiles must fit into shared memory: half the width in fp32, and on GPUs with 100 KiB of it
    widest = (256 if query.dtype in HALF else 128) // (1 if gpu in ((8, 0), (9, 0), (10, 0), (10, 3)) else 2)
    if widths[1] > widest:
        reasons.append(f"FlexAttention's tiles of heads wider than {widest} do not fit this GPU, got {widths[1]}")
    return reasons


def attend(query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, scores: Scores, block_mask) -> Tensor:
    """(1, heads, S, D), (1, kv heads, S, D), (1, kv heads, S, Dv) -> (1, S, heads, Dv). block_mask: of the window."""
    from torch.nn.attention import flex_attention as torch_flex

    sinks = {} if scores.sinks is None else {"sinks": scores.sinks}
    function: Any = _with_sinks if sinks else torch_flex.flex_attention
    out = (_compiled(function) if query.device.type == "cuda" else function)(
        query,
        key,
        value,
        **sinks,
        score_mod=None if scores.softcap is None else _cap(layout, scores.softcap, query),
        block_mask=block_mask,
        scale=scores.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)


def _with_sinks(query: Tensor, key: Tensor, value: Tensor, *, sinks: Tensor, **options) -> Tensor:
    """A sink is one more term of the softmax's sum: exp(lse) / (exp(lse) + exp(sink)) of the output stays."""
    from torch.nn.attention import flex_attention as torch_flex

    if hasattr(torch_flex, "AuxRequest"):  # torch 2.9
        out, more = torch_flex.flex_attention(query, key, value, return_aux=torch_flex.AuxRequest(lse=True), **options)
        lse = more.lse
    else:
        out, lse = torch_flex.flex_attention(query, key, value, return_lse=True, **options)
    return (out * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None]).to(out.dtype)


def _cap(layout: SharedPrefixLayout, largest: float, query: Tensor):
    """The score_mod of a soft-cap, one for all layers.

    It captures a tensor: a number would be an input of the compiled graph, which the kernel cannot read.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    caps = layout.kept.caps
    if torch.compiler.is_compiling():
        return _new_cap(largest, dtype, query.device)
    if (largest, dtype) not in caps:
        caps[largest, dtype] = _new_cap(largest, dtype, query.device)
    return caps[largest, dtype]


def _new_cap(largest: float, dtype: torch.dtype, device: torch.device):
    limit = torch.full((), largest, dtype=dtype, device=device)

    def cap(score, *_):
        return limit * torch.tanh(score / limit)

    return cap
