"""What is settled before TRL's constructor runs, and what it sees: arguments, models, names of its module."""

import contextlib
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from trl.trainer import dpo_trainer

from ..reference import is_peft_model

logger = logging.getLogger("dpo_fast")

LAYOUTS = ("auto", "shared_prefix", "padded")
_CONSTRUCTING = threading.RLock()


def layout_asked_for(layout: str | None) -> str:
    source, layout = ("layout", layout) if layout else ("DPO_FAST_LAYOUT", os.environ.get("DPO_FAST_LAYOUT") or "auto")
    if layout not in LAYOUTS:
        raise ValueError(f"{source} must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout


def given_by_name(construct: Callable, args: tuple, kwargs: dict) -> dict:
    """What a trainer's constructor is given. Of one that takes *args or **kwargs these count as TRL's, by its names."""
    signature = inspect.signature(construct)
    found: dict = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            trls = list(inspect.signature(dpo_trainer.DPOTrainer).parameters)
            found.update(zip(trls, value, strict=False))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


# Arguments of other trainers, and of TRL's before 1.0 -> what to do instead
_NOT_TAKEN = {
    "tokenizer": "it is called processing_class",
    "model_init": "give the model, and build a trainer for each trial of a search",
    "preprocess_logits_for_metrics": "compute_metrics gets the logits",
    "model_adapter_name": "the adapter that trains is called default",
    "ref_adapter_name": "the reference is the adapter as it is before training",
}


def check_keywords(given: dict, known: set[str]) -> None:
    fields = dpo_trainer.DPOConfig.__dataclass_fields__
    for name in given.keys() - known:
        hint = "put it into DPOConfig" if name in fields else _NOT_TAKEN.get(name, "TRL's DPOTrainer has none")
        raise TypeError(f"DPOTrainer takes no argument {name}: {hint}")


def take_old_dtype(config) -> None:
    """The name that dtype had before transformers 4.56: TRL from 0.23 would load float32 without a word. One that reads
    the old name itself, and says what is wrong with its value, is left to it."""
    options = config.model_init_kwargs
    if isinstance(options, dict) and "torch_dtype" in options and not _trl_reads_torch_dtype():
        dtype = options["torch_dtype"]
        dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, str) else dtype
        logger.warning("dpo_fast.trl: torch_dtype in model_init_kwargs is called dtype now; it is taken as that")
        config.model_init_kwargs = {"dtype": dtype, **{k: v for k, v in options.items() if k != "torch_dtype"}}


def _trl_reads_torch_dtype() -> bool:
    return "torch_dtype" in inspect.getsource(dpo_trainer.DPOTrainer)


def check_models(model, ref_model) -> None:
    """Raise for what TRL cannot take, before it says so with a KeyError or an AttributeError: paths of adapters or of a
    reference, and names of adapters."""
    if isinstance(ref_model, str):
        raise TypeError(
            "ref_model must be a model: load it (AutoModelForCausalLM.from_pretrained), or leave it out, and TRL loads "
            "the model's own path a second time"
        )
    if isinstance(model, str):
        if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"{model!r} holds an adapter, which TRL does not load: pass "
                "peft.AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True) to train it further"
            )
        return
    if not is_peft_model(model) or ref_model is not None:
        return
    names = ", ".join(model.peft_config)
    if "default" not in model.peft_config and hasattr(model, "active_peft_config"):
        raise ValueError(
            f"TRL trains the adapter called default, the model has {names}: load it under that name, pass ref_model, "
            "or use dpo_fast.FastDPOTrainer, which takes any"
        )
    if "ref" in model.peft_config:
        raise ValueError(
            f"TRL keeps its reference as an adapter called ref, and the model has one already ({names}): "
            "model.delete_adapter('ref'), pass ref_model, or use dpo_fast.FastDPOTrainer, which needs no name"
        )


@contextlib.contextmanager
def in_trl(**replacements) -> Iterator[None]:
    """Replace names of `trl.trainer.dpo_trainer`; one that it does not have (BaseTunerLayer without PEFT) is left out.

    One thread at a time; nested uses unwind in order.
    """
    with _CONSTRUCTING:
        originals = {name: vars(dpo_trainer)[name] for name in replacements if name in vars(dpo_trainer)}
        vars(dpo_trainer).update({name: replacements[name] for name in originals})
        try:
            yield
        finally:
            vars(dpo_trainer).update(originals)


@contextlib.contextmanager
def padding_free_unseen(config) -> Iterator[None]:
    """Hide `padding_free` from TRL, which would warn that it ignores it."""
    asked = getattr(config, "padding_free", False)
    if asked:
        config.padding_free = False
    try:
        yield
    finally:
        if asked:
            config.padding_free = True


def refuse_or_log(layout: str, reasons: list[str], instead: str = "padded rows, not shared prefixes") -> None:
    if layout == "shared_prefix":
        raise ValueError(f"layout='shared_prefix' cannot run: {'; '.join(reasons)}; use layout='padded' or 'auto'")
    log_once(f"{instead}, because {'; '.join(reasons)}")


@functools.cache
def log_once(line: str) -> None:
    logger.warning("dpo_fast.trl: %s", line)
