"""Weights of few bits: what a recipe says of them, and what training asks of bitsandbytes' layers."""

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .hooks import is_bitsandbytes

logger = logging.getLogger("dpo_fast")

_REPACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit layers: whether the CPU has a kernel of its own
BITS = ("load_in_4bit", "load_in_8bit")


def is_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False))


def keep_trainable(model: nn.Module) -> None:
    """Let 4-bit layers on a CPU go on training after a call in eval mode.

    There bitsandbytes repacks their weights, for good, for a kernel through which no gradient goes: an adapter below
    such a layer would stay as it is. From now on it leaves them; those that it has repacked are put back.
    """
    repacked = []
    for name, module in model.named_modules():
        if getattr(module, _REPACKS, False) and is_bitsandbytes(module):
            setattr(module, _REPACKS, False)
        weight = getattr(module, "weight", None)
        if _is_repacked(weight):
            module.state_dict()  # which is saved as it was, and left so
            repacked.append(name)
            if _is_repacked(weight):
                raise ValueError(f"bitsandbytes has repacked {name}, which cannot train any more: load the model anew")
    if repacked:
        logger.warning(
            "%d 4-bit layers had been run in eval mode on this CPU, for which bitsandbytes has rounded their scales; "
            "they train with these: load the model anew for its own",
            len(repacked),
        )


def _is_repacked(weight: Any) -> bool:
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


# --- in a recipe ---------------------------------------------------------------------------------------------------


def config_of(given: Mapping[str, Any]):
    """The quantization config that a mapping describes, as `{load_in_4bit: true}` in a recipe.

    Raises ValueError for what describes none and for names that it does not take, ImportError for a missing package.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KINDS

    options = dict(given)
    method = options.pop("quant_method", None)
    if method in (None, "bitsandbytes"):
        bits = next((name for name in BITS if options.get(name)), None)
        if bits is None:
            raise ValueError(
                f"quantization_config must have {' or '.join(BITS)}: true, or another quant_method, got {dict(given)}"
            )
        method = f"bitsandbytes_{bits.removeprefix('load_in_')}"
    kind = KINDS.get(method)
    if kind is None:
        raise ValueError(f"quant_method in quantization_config must be one of {', '.join(KINDS)}, got {method!r}")
    known = [name for name in inspect.signature(kind).parameters if name != "kwargs"]
    unknown = [name for name in options if name not in known]
    if unknown and method != "torchao":  # whose kinds have options of their own
        raise ValueError(
            f"quantization_config: {', '.join(unknown)} is not of {kind.__name__}, which takes {', '.join(known)}"
        )
    for name, value in options.items():
        if "dtype" in name and isinstance(value, str):
            options[name] = SHORT.get(value, value)
    try:
        return kind(**options)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"quantization_config: {error}") from error


SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # names of dtypes
