"""Policy and reference: from paths, models and adapters to what the trainer calls."""

import logging
from collections.abc import Mapping

import torch
import transformers
from torch import nn

from dpo_fast import attention
from dpo_fast.copies import compute_with_own_weights

from .config import FastDPOConfig

logger = logging.getLogger("dpo_fast")


def load_model(model, config: FastDPOConfig) -> nn.Module:
    """A model as it is, or loaded from a path, in float32 unless `model_init_kwargs` says otherwise."""
    if not isinstance(model, str):
        return model
    options = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
    return transformers.AutoModelForCausalLM.from_pretrained(model, **{**options, **(config.model_init_kwargs or {})})


def make_policy(model, config: FastDPOConfig, peft_config) -> nn.Module:
    """The model to train: loaded if it is a path, with a new adapter if `peft_config` says so, without dropout."""
    model = load_model(model, config)
    compute_with_own_weights(model.get_base_model() if is_peft_model(model) else model)
    if peft_config is not None:
        model = add_adapter(model, peft_config)
    if is_peft_model(model):
        check_adapter(model)
        if config.gradient_checkpointing:
            model.enable_input_require_grads()  # a reentrant checkpoint without it passes no gradient on
    if config.disable_dropout:
        disable_dropout(model)
    return model


def load_tokenizer(processing_class, model: nn.Module, config: FastDPOConfig):
    """The given tokenizer, or the one that lies with the model."""
    if isinstance(processing_class, transformers.ProcessorMixin):
        raise TypeError(
            f"processing_class must be a tokenizer, got {type(processing_class).__name__}; only text can be trained on"
        )
    if processing_class is not None:
        return processing_class
    path = getattr(model.config, "_name_or_path", "")
    if not path:
        raise ValueError("processing_class is needed: the model was not loaded from a path that may hold a tokenizer")
    return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def is_peft_model(model: nn.Module) -> bool:
    return isinstance(getattr(model, "peft_config", None), Mapping) and hasattr(model, "disable_adapter")


def add_adapter(model: nn.Module, peft_config) -> nn.Module:
    """The model with a new adapter, as `peft_config` says."""
    import peft

    if is_peft_model(model):
        raise ValueError(
            "got a PEFT model and a peft_config: pass the model alone to train its adapter, or merge the adapter first "
            "(merge_and_unload) to train a new one"
        )
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, as LoraConfig, got {type(peft_config).__name__}")
    return peft.get_peft_model(model, peft_config)


def check_adapter(model: nn.Module) -> None:
    """Refuse adapters that the forward cannot score, and say what it leaves out of others."""
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(f"adapter {name!r} is {config.peft_type}: prompt learning changes positions, use LoRA")
        if weight := getattr(config, "orth_reg_weight", None):
            logger.warning(
                "adapter %r: its regulariser (orth_reg_weight=%g) is not part of the loss, as in TRL", name, weight
            )


def check_reference(model, ref_model) -> None:
    """Raise for a reference that is the policy."""
    same = ref_model is model or (is_peft_model(model) and ref_model is model.get_base_model())
    if ref_model is not None and not isinstance(ref_model, str) and same:
        raise ValueError(
            "ref_model is the same object as model: it would move with the policy. Omit it to use a frozen copy of the "
            "policy (or the policy without its adapter), or load it a second time"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, attention's included, which is an attribute and not a module."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def choose_layout(layout: str, *used: nn.Module) -> str:
    """The layout that runs: for "auto", shared_prefix where every model that is `used` (the policy first) can run it,
    else padded, and a line says why. An explicit "shared_prefix" that cannot run raises ValueError."""
    if layout == "padded":
        return layout
    bases = [model.get_base_model() if is_peft_model(model) else model for model in used]
    reasons = [reason for base in bases for reason in attention.reasons_against(base)]
    if attention.has_dropout(bases[0]):
        reasons.append(f"{type(bases[0]).__name__} has attention dropout, which disable_dropout would switch off")
    if not reasons:
        return "shared_prefix"
    if layout == "shared_prefix":
        raise ValueError(f"layout='shared_prefix' cannot run: {'; '.join(reasons)}; use layout='padded' or 'auto'")
    logger.warning("layout: padded rows, not shared prefixes, because %s", "; ".join(reasons))
    return "padded"
