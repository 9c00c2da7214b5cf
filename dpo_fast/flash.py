"""Variable-length flash attention: where it is found, what speaks against it, and the call.

    flash_attn_3    the package flash_attn_3: kernels written for Hopper
    varlen          torch's own, from 2.10: the kernels of FlashAttention 2
    flash_attn_2    the package flash_attn, from 2.6: the same kernels, with soft-caps

That is the order of choice, too: first what was written for the GPU, then what came with torch and was built for it.
All align causality with the last key (flash_attn since 2.1), which is what own tokens behind shared ones need.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import SharedPrefixLayout
from .scores import HALF, Scores

NAMES = ("flash_attn_3", "varlen", "flash_attn_2")
_WHERE = {
    "flash_attn_3": ("flash_attn_interface", "flash_attn_varlen_func"),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn"),
    "flash_attn_2": ("flash_attn.flash_attn_interface", "flash_attn_varlen_func"),
}


_FUNCTIONS: dict[str, Callable] = {}  # name -> function, of those that have been looked for and were found


@functools.cache
def _find(name: str) -> str:
    """Why there is no such function; empty where it is among _FUNCTIONS now."""
    module, function = _WHERE[name]
    try:
        _FUNCTIONS[name] = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError:
        return "this torch has no variable-length attention" if name == "varlen" else f"{name} is not installed"
    except (ImportError, OSError) as error:  # built for another torch
        return f"{name} cannot be imported ({error})"
    if name != "varlen" and not takes(name, "softcap"):
        return f"{name} is older than the versions that are known here: it has no softcap"
    return ""


@functools.cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@functools.cache
def _left_out_of_3() -> frozenset[str]:
    try:
        flags = importlib.import_module("flash_attn_config").CONFIG["build_flags"]
    except ModuleNotFoundError:  # the first builds
        return frozenset()
    return frozenset(name.rpartition("_DISABLE_")[2] for name, off in flags.items() if "_DISABLE_" in name and off)


# Constants for Dynamo, which would trace what is cached, imports and signatures included


@torch.compiler.assume_constant_result
def missing(name: str) -> str:
    """Why an implementation's function cannot be had; empty where it can."""
    return _find(name)


@torch.compiler.assume_constant_result
def takes(name: str, option: str) -> bool:
    """Whether an implementation's function has a parameter of that name, which depends on the version."""
    return option in _parameters(_FUNCTIONS[name])


@torch.compiler.assume_constant_result
def built_without(part: str) -> bool:
    """Whether the installed FlashAttention 3 says that it was built without a part."""
    return part in _left_out_of_3()


def reasons_against(name: str, query: Tensor, value: Tensor, scores: Scores, gpu: tuple[int, int] | None) -> list[str]:
    """Every reason why it cannot run. gpu: the compute capability, None where the tensors are not on a GPU."""
    reasons, lacking, width = [], missing(name), query.shape[-1]
    if scores.sinks is not None:
        reasons.append("flash attention takes no sinks, and its log-sum-exp, which could make them, has no gradient")
    if lacking:
        return [*reasons, lacking]
    if name == "varlen":
        if scores.softcap is not None:
            reasons.append("torch's variable-length attention takes no soft-cap")
        if not takes(name, "window_size") and scores.window is not None:
            reasons.append("this torch's variable-length attention has no windows")
        scaling = width**-0.5 if scores.scaling is None else scores.scaling
        if not takes(name, "scale") and not math.isclose(scaling, width**-0.5):
            reasons.append(f"this torch's variable-length attention scales by 1/sqrt({width}), not by {scaling:g}")
    if gpu is None:
        return [*reasons, f"flash attention needs a CUDA device, the tensors are on {query.device.type!r}"]
    # From here what the kernels check, and raise a RuntimeError for
    if torch.version.hip is not None:
        reasons.append("flash attention on ROCm is not known to align causality with the last key")
    if gpu < (8, 0):
        reasons.append(f"flash attention needs compute capability 8.0, this GPU has {gpu[0]}.{gpu[1]}")
    if query.dtype not in HALF:
        reasons.append(f"flash attention takes bfloat16 and float16, not {str(query.dtype)[6:]}")
    if value.shape[-1] != width:
        reasons.append(f"flash attention wants values as wide as queries, got {value.shape[-1]} and {width}")
    if width % 8 or width > 256:
        reasons.append(f"flash attention wants heads of a multiple of 8 and at most 256, got {width}")
    if name == "flash_attn_3":
        return reasons + _reasons_against_3(query, scores, gpu)
    if 192 < width <= 224 and gpu not in ((8, 0), (9, 0)):
        reasons.append(f"flash attention's backward has no heads of {width} on this GPU")
    return reasons


def _reasons_against_3(query: Tensor, scores: Scores, gpu: tuple[int, int]) -> list[str]:
    reasons, width = [], query.shape[-1]
    if gpu != (9, 0):
        reasons.append(f"FlashAttention 3 is for compute capability 9.0, this GPU has {gpu[0]}.{gpu[1]}")
    if torch.are_deterministic_algorithms_enabled() and width > 192:
        reasons.append(f"FlashAttention 3's backward in a fixed order has heads of at most 192, not {width}")
    needed = {
        "BACKWARD": True,
        "VARLEN": True,
        "LOCAL": scores.window is not None,
        "SOFTCAP": scores.softcap is not None,
        "FP16": query.dtype == torch.float16,
    }
    without = "this build of FlashAttention 3 is without"
    reasons += [f"{without} {part}" for part, asked in needed.items() if asked and built_without(part)]
    if all(built_without(f"HDIM{most}") for most in (64, 96, 128, 192, 256) if most >= width):
        reasons.append(f"{without} heads of {width}")
    return reasons


def attend(name: str, query: Tensor, key: Tensor, value: Tensor, layout: SharedPrefixLayout, scores: Scores) -> Tensor:
    """(1, heads, S, D), (1, kv heads, S, D) twice -> (1, S, heads, D): one call, in which each sequence's own tokens
    are queries, and all its tokens keys. Keys of what is shared are copied for each sequence."""
    rows, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # (S, heads, D)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()  # the kernel reads whole heads; keys and values are copied anyway
    keys, values = (x.index_select(0, layout.index) for x in (keys, values))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and name == "varlen" and not takes(name, "enable_gqa"):
        # Before torch 2.12 nothing promises grouped heads. Its kernel has them, so this copy, `groups` times the keys
        # and values of a layer, is what a test on such a GPU could save
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    ends = (layout.query_ends, layout.key_ends)
    options = _options_of_torch(scores, groups) if name == "varlen" else _options_of_packages(scores)
    out: Any = _FUNCTIONS[name](rows, keys, values, *ends, *layout.longest, **options)
    return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)  # early builds of flash_attn_3 add the log-sum-exp


def _window(scores: Scores) -> tuple[int, int]:
    return (-1 if scores.window is None else scores.window - 1, 0)


def _options_of_torch(scores: Scores, groups: int) -> dict[str, Any]:
    # torch 2.10 has neither windows nor a scale
    windows = takes("varlen", "window_size")
    options: dict[str, Any] = {"window_size": _window(scores)} if windows else {"is_causal": True}
    if takes("varlen", "scale"):
        options["scale"] = scores.scaling
    if takes("varlen", "enable_gqa"):
        options["enable_gqa"] = groups > 1
    return options


def _options_of_packages(scores: Scores) -> dict[str, Any]:
    return dict(
        softmax_scale=scores.scaling,
        causal=True,
        window_size=_window(scores),
        softcap=scores.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
