"""The causal LM inside what a training loop calls as its model.

wrappers     torch's, DeepSpeed's and accelerate's (DDP, FSDP, an engine, torch.compile): their forward must run, and
             hands on what it is given
holders      a framework's own modules around the model (an actor): hooks may sit on them, but their forward takes
             other arguments; inside `leading_through` it hands the call on instead
"""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .copies import base_model_of, reached

_WRAPPERS = ("torch", "deepspeed", "accelerate")  # packages whose forwards hand on what they are given


def path_to_lm(op: str, model: nn.Module) -> list[nn.Module]:
    """From `model` to the causal LM (or the PEFT model around it): the modules on the way, these two included.

    Raises TypeError, which names the argument `model`, where there is none, an encoder-decoder, or more than one.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a causal language model, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise TypeError(f"{op}: model is a DataParallel, which splits batches by rows; use DistributedDataParallel")
    paths = list({id(path[-1]): path for path in reversed(list(_paths(model)))}.values())  # the first way to each
    if not paths or getattr(base_model_of(paths[0][-1]), "get_output_embeddings", lambda: None)() is None:
        raise TypeError(
            f"{op}: model must be, or hold, a Hugging Face causal LM with an output head (get_output_embeddings), "
            f"got {type(model).__name__}; a model of another kind: dpo_fast.get_batch_logps of its logits"
        )
    if len(paths) > 1:
        names = ", ".join(type(path[-1]).__name__ for path in paths)
        raise TypeError(f"{op}: model holds {len(paths)} language models ({names}): pass the one to be scored")
    config = getattr(paths[0][-1], "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{op}: model must be a decoder, {type(paths[0][-1]).__name__} is an encoder-decoder; "
            "dpo_fast.logits_token_logps scores its logits, which are not shifted"
        )
    return paths[0]


def _paths(module: nn.Module) -> Iterator[list[nn.Module]]:
    """To each language model below `module` that is not in another one."""
    if _is_lm(module):
        yield [module]
        return
    for child in module.children():
        for path in _paths(child):
            yield [module, *path]


def _is_lm(module: nn.Module) -> bool:
    """Asked of its class: FSDP and DeepSpeed hand on every attribute of what they wrap."""
    kind: Any = type(module)
    if hasattr(kind, "get_base_model"):  # PEFT's
        return True
    return hasattr(kind, "get_output_embeddings") and kind.get_output_embeddings(module) is not None


@contextlib.contextmanager
def leading_through(path: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, a call of the first module of the path is a call of the last one, with the same arguments.

    The forwards of wrappers run; those of holders are replaced for the time, their hooks run.
    """
    holders = [(outer, inner) for outer, inner in itertools.pairwise(path) if not _hands_on(outer)]
    before = [vars(outer).get("forward") for outer, _ in holders]
    with contextlib.ExitStack() as precision:
        for own in before:  # accelerate's, around the forward that is replaced
            for cast in [value for value in reached(own) if isinstance(value, torch.autocast)][:1]:
                precision.enter_context(copy.copy(cast))
        try:
            for outer, inner in holders:
                vars(outer)["forward"] = inner.__call__
            yield
        finally:
            for (outer, _), own in zip(holders, before, strict=True):
                vars(outer).pop("forward")
                if own is not None:
                    vars(outer)["forward"] = own


def _hands_on(module: nn.Module) -> bool:
    """Asked of the forward itself: FSDP2 puts a class of its own before the module's."""
    forward = type(module).forward
    # A module without a forward has torch's, which raises; torch.compile's has its own on the instance
    bare = forward is nn.Module.forward and not hasattr(module, "_orig_mod")
    if bare or isinstance(module, nn.Sequential):  # whose forward takes one argument
        return False
    return forward.__module__.partition(".")[0] in _WRAPPERS
