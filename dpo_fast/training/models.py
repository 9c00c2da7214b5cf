"""Policy and reference: from paths, models and adapters to what the trainer calls."""

from __future__ import annotations

import contextlib
import copy
import dis
import inspect
import logging
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers.utils import logging as hf_logging

from dpo_fast import attention, packing, quantised
from dpo_fast.copies import base_model_of, compute_with_own_weights
from dpo_fast.forward import is_ready, reasons_against_packed_rows
from dpo_fast.hooks import NEFTUNE
from dpo_fast.reference import is_peft_model

from .data import ModelLimits
from .rows import check_tokenizer

if TYPE_CHECKING:  # `dpo_fast.trl` runs with a transformers that FastDPOConfig refuses
    from .config import FastDPOConfig

logger = logging.getLogger("dpo_fast")


def load_model(model, config: FastDPOConfig, quantization_config=None, adapter_trains: bool = False) -> nn.Module:
    """A model as it is, or loaded from a path, in float32 unless `model_init_kwargs` says otherwise. The path may be
    that of an adapter, which comes with its base model; `adapter_trains`: to be trained further."""
    if not isinstance(model, str):
        if quantization_config is not None:
            raise ValueError("quantization_config needs a model that is given as a path; this one is loaded already")
        return model
    options = loading_options(config, quantization_config)
    weights = [path.name for path in Path(model).glob("*model*") if path.suffix in (".safetensors", ".bin")]
    if len({name.startswith("adapter_") for name in weights}) == 2:
        raise ValueError(
            f"{model!r} holds the weights of a model and those of an adapter, and transformers would put one on the "
            "other: move one of them into a folder of its own"
        )
    if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        return _load_adapter(model, options, adapter_trains)
    return transformers.AutoModelForCausalLM.from_pretrained(model, **options)


def loading_options(config: FastDPOConfig, quantization_config=None) -> dict[str, Any]:
    """Keywords of `from_pretrained`. ValueError for values that are none; ImportError for a missing package."""
    options: dict[str, Any] = dict(config.model_init_kwargs or {})
    if named := [name for name in quantised.BITS if name in options]:
        raise ValueError(f"model_init_kwargs: write quantization_config: {{{named[0]}: true}} in place of {named[0]}")
    dtype = options.pop("torch_dtype", None)  # its name before transformers 4.56
    given = options.pop("dtype", None)
    options["dtype"] = dtype_of(next((x for x in (given, dtype) if x is not None), torch.float32))
    if quantization_config is not None:
        if options.get("quantization_config") is not None:
            raise ValueError("quantization_config is given twice: as an argument, and in model_init_kwargs")
        options["quantization_config"] = quantization_config
    bits = options.get("quantization_config")
    if isinstance(bits, dict):
        options["quantization_config"] = quantised.config_of(bits)
    elif bits is not None and not hasattr(bits, "quant_method"):
        raise ValueError(f"quantization_config must be a mapping, as {{load_in_4bit: true}}, got {bits!r}")
    return {"trust_remote_code": config.trust_remote_code, **options}


def _load_adapter(path: str, options: dict, trains: bool) -> nn.Module:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"{path!r} holds an adapter, which needs the package peft: pip install peft") from error
    base = peft.PeftConfig.from_pretrained(path).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter in {path!r} does not say which model it was trained on; load it with PEFT")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, **options)
    return peft.PeftModel.from_pretrained(model, path, is_trainable=trains)


_SHORT = {**quantised.SHORT, "fp64": torch.float64}


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """transformers shows one for the files of a model, also for a single one."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def dtype_of(value) -> torch.dtype | str:
    """What `from_pretrained` takes as dtype; ValueError for what is none."""
    found = value
    if isinstance(value, str) and value != "auto":
        found = _SHORT.get(value) or getattr(torch, value.removeprefix("torch."), None)
    if found != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(
            f"dtype in model_init_kwargs must be 'auto' or a floating dtype such as 'bfloat16', got {value!r}"
        )
    return found


def limits(*given: nn.Module | None) -> ModelLimits:
    """What all the models can take: the smallest embedding, the fewest positions."""
    found = [m for m in given if m is not None]
    vocabularies = [_rows_of(embedding) for m in found if (embedding := m.get_input_embeddings()) is not None]
    if len(set(vocabularies)) > 1:
        logger.warning("model has %d token embeddings, ref_model %d", *vocabularies)
    positions = [count for m in found if (count := _positions(m)) is not None]
    learned = any(_has_learned_positions(m) for m in found)
    return ModelLimits(min(vocabularies, default=None), min(positions, default=None), learned)


def _rows_of(embedding: nn.Module) -> int:
    weight: Any = embedding.weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty tensor in its place


def _positions(model: nn.Module) -> int | None:
    count = getattr(base_model_of(model).config.get_text_config(), "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


def _has_learned_positions(model: nn.Module) -> bool:
    count, named = _positions(model), [(n.rpartition(".")[2], m) for n, m in model.named_modules()]
    tables = [m for name, m in named if isinstance(m, nn.Embedding) and (name == "wpe" or "position" in name)]
    return count is not None and any(count <= table.num_embeddings <= count + 8 for table in tables)


def check_trains(model: nn.Module) -> None:
    """Raise ValueError for a model no parameter of which has a gradient, and for one of few bits without an adapter."""
    if quantised.is_quantised(model) and not is_peft_model(model):
        raise ValueError(
            "a quantised model trains an adapter, not its own weights: pass peft_config=LoraConfig(...) (lora_r in a "
            "recipe)"
        )
    if any(p.requires_grad for p in model.parameters()):
        return
    if is_peft_model(model):
        raise ValueError(
            "no parameter of the model trains; an adapter that is to be trained further is loaded with "
            "PeftModel.from_pretrained(model, path, is_trainable=True)"
        )
    raise ValueError("no parameter of the model trains: all have requires_grad=False")


def make_policy(model: nn.Module, config: FastDPOConfig, peft_config) -> nn.Module:
    """The model to train: with a new adapter if `peft_config` says so, without dropout."""
    compute_with_own_weights(base_model_of(model))
    if peft_config is not None:
        model = add_adapter(model, peft_config)
    if is_peft_model(model):
        check_adapter(model)
        if config.gradient_checkpointing:
            model.enable_input_require_grads()  # a reentrant checkpoint without it passes no gradient on
    if config.disable_dropout:
        disable_dropout(model)
    return model


def load_tokenizer(processing_class, model: nn.Module, config: FastDPOConfig, given=None):
    """The given tokenizer, or the one that lies with the model; `given`: what the trainer was, an adapter perhaps, in
    whose folder there may be one, too."""
    if isinstance(processing_class, transformers.ProcessorMixin):
        raise TypeError(
            f"processing_class must be a tokenizer, got {type(processing_class).__name__}; only text can be trained on"
        )
    if processing_class is not None:
        return check_tokenizer(processing_class)
    path = getattr(model.config, "_name_or_path", "")
    if isinstance(given, str) and (Path(given) / "tokenizer_config.json").is_file():
        path = given
    if not path:
        raise ValueError("processing_class is needed: the model was not loaded from a path that may hold a tokenizer")
    return check_tokenizer(transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code))


def add_adapter(model: nn.Module, peft_config) -> nn.Module:
    """The model with a new adapter, as `peft_config` says."""
    import peft

    if is_peft_model(model):
        raise ValueError(
            "got a PEFT model and a peft_config (lora_r in a recipe): pass the model alone to train its adapter, or "
            "merge the adapter first (merge_and_unload) to train a new one"
        )
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(f"peft_config must be a peft.PeftConfig, as LoraConfig, got {type(peft_config).__name__}")
    with warnings.catch_warnings():  # PEFT asks transformers 5.23 for this by its old name
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        try:
            return peft.get_peft_model(model, peft_config)
        except Exception as error:  # whatever PEFT and torch say of a setting: KeyError, NotImplementedError ...
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"the adapter (peft_config) cannot be made: {kind}{error}") from error


def check_adapter(model: nn.Module) -> None:
    """Refuse adapters that the forward cannot score, and say what it leaves out of others."""
    for name, config in model.peft_config.items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        reason = ""
        if getattr(config, "is_prompt_learning", False):
            reason = f"is {kind}: prompt learning changes positions"
        elif getattr(config, "alora_invocation_tokens", None):
            reason = "is an activated LoRA, which starts at a token of each row"
        elif kind == "POLY":
            raise ValueError(f"adapter {name!r} is POLY, which needs the number of a task with each row: use LoRA")
        if reason:
            raise ValueError(
                f"adapter {name!r} {reason}; use LoRA, or dpo_fast.trl.DPOTrainer, which runs it as TRL does"
            )
        if weight := getattr(config, "orth_reg_weight", None):
            logger.warning(
                "adapter %r: its regulariser (orth_reg_weight=%g) is not part of the loss, as in TRL", name, weight
            )


def check_reference(model, ref_model) -> None:
    """Raise for a reference that is the policy."""
    same = ref_model is model or (is_peft_model(model) and ref_model is base_model_of(model))
    for name, given in (("model", model), ("ref_model", ref_model)):
        is_model = isinstance(given, nn.Module) and hasattr(given, "config") and hasattr(given, "get_input_embeddings")
        if not (is_model or isinstance(given, str) and given or name == "ref_model" and given is None):
            came = repr(given) if isinstance(given, str) else type(given).__name__
            raise TypeError(f"{name} must be a language model of transformers or the path of one, got {came}")
    if ref_model is not None and not isinstance(ref_model, str) and same:
        raise ValueError(
            "ref_model is the same object as model: it would move with the policy. Omit it to use a frozen copy of the "
            "policy (or the policy without its adapter), or load it a second time"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0: of modules, and of the numbers that layers hand to functions under names
    such as attention_dropout, resid_pdrop, activation_dropout and layerdrop. Layers that read them off the config in
    each call (Falcon's) get a config of their own: the model's is saved with it."""
    without: dict[int, Any] = {}
    for module in model.modules():
        for name in _dropout_read_off_the_config(module):
            config = without.setdefault(id(module.config), copy.copy(module.config))
            setattr(config, name, 0.0)
            without[id(config)] = module.config = config
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, (int, float)) and not isinstance(value, bool):
                setattr(module, name, 0.0)


def _dropout_read_off_the_config(module: nn.Module) -> list[str]:
    """Names of dropout probabilities that the module's forward takes from its config."""
    forward = inspect.unwrap(type(module).forward)
    if not hasattr(module, "config") or isinstance(module, transformers.PreTrainedModel):
        return []
    loads = [step.argval for step in dis.get_instructions(forward)] if inspect.isfunction(forward) else []
    names = [name for owner, name in pairwise(loads) if owner == "config" and "drop" in str(name)]
    return [name for name in dict.fromkeys(names) if isinstance(getattr(module.config, name, None), (int, float))]


def check_layout(config: FastDPOConfig, *used: nn.Module) -> None:
    """Raise ValueError for an explicit "shared_prefix" that cannot run, as far as that can be read off the models."""
    reasons = _neftune(config)
    for model in used:
        reasons += attention.reasons_against(base_model_of(model))
    _raise_if_explicit(config, reasons)


def choose_layout(config: FastDPOConfig, device: torch.device, *used: nn.Module) -> tuple[str, str]:
    """The layout that runs, and why: for "auto", shared_prefix where every attached model that is `used` (the policy
    first) runs packed rows right, which the probe shows, else padded, and a line says why. An explicit "shared_prefix"
    that cannot run raises ValueError. Models that are sharded or not on their device yet are proven by the first
    batch."""
    if config.layout == "padded":
        return "padded", "layout='padded' asks for it"
    reasons, proven = _neftune(config), True
    for index, model in enumerate(used):
        base = base_model_of(model)
        if is_ready(model, device):
            reasons += reasons_against_packed_rows(model, training=index == 0)
            if index == 0 and config.disable_dropout and packing.draws_in_training(base):
                logger.warning(
                    "disable_dropout: %s draws random numbers in training all the same (a router's noise, or dropout "
                    "under another name); the policy's first loss is not that of its copy",
                    type(base).__name__,
                )
        else:
            proven = False
            reasons += attention.reasons_against(base)
        if config.layout == "shared_prefix":
            packing.require(base)
    _raise_if_explicit(config, reasons)
    if reasons:
        logger.warning("layout: padded rows, not shared prefixes, because %s", "; ".join(dict.fromkeys(reasons)))
        return "padded", "; ".join(dict.fromkeys(reasons))
    asked = "layout='shared_prefix' asks for it, and" if config.layout == "shared_prefix" else "each prompt runs once;"
    return "shared_prefix", f"{asked} {'a probe' if proven else 'the first batch'} shows that the models run it right"


def _neftune(config: FastDPOConfig) -> list[str]:
    if config.neftune_noise_alpha is None:
        return []
    return [NEFTUNE]


def _raise_if_explicit(config: FastDPOConfig, reasons: list[str]) -> None:
    if reasons and config.layout == "shared_prefix":
        raise ValueError(f"layout='shared_prefix' cannot run: {'; '.join(reasons)}; use layout='padded' or 'auto'")
