"""Hooks inside a model, and how a pass through it leaves no trace."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules import module as torch_modules

# What `nn.Module.__call__` looks for before it goes to `forward` alone
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
NEFTUNE = "NEFTune (neftune_noise_alpha) scales its noise by the length of a row"
_LIBRARIES = {"torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "bitsandbytes", "dpo_fast"}


def watched(model: nn.Module, backbone: nn.Module) -> list[str]:
    """Hooks below the backbone, and global ones: they would be shown a packed row where they expect one sequence."""
    name = type(model).__name__
    for dictionary in global_hooks():
        for hook in dictionary.values():
            if not _is_a_librarys(hook):
                return [f"a global hook of modules ({_name_of(hook)}) would see packed rows"]
    for module in _hooked(backbone, model.get_input_embeddings()):
        for hook in (hook for kind in HOOKS for hook in getattr(module, kind).values()):
            if "neftune" in _name_of(hook):
                return [f"{NEFTUNE} of {name}"]
            if not _is_a_librarys(hook):
                path = next((path for path, m in backbone.named_modules() if m is module), "embeddings")
                return [f"the hook {_name_of(hook)} on {name}'s {path} would see packed rows"]
    return []


def _hooked(backbone: nn.Module, embeddings: nn.Module) -> Iterator[nn.Module]:
    """Modules with hooks below the backbone, whose own are its caller's business, and the embeddings, which may lie
    outside of it. Asked in each step: a walk of a quarter of what `modules()` takes (0.1 ms for 32 layers)."""
    rest = [*backbone._modules.values(), embeddings]
    while rest:
        module = rest.pop()
        if module is None:
            continue
        own = module.__dict__
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            yield module
        if own["_modules"]:
            rest.extend(own["_modules"].values())


def global_hooks() -> list[dict]:
    """The hooks of all modules, kind by kind."""
    return [getattr(torch_modules, f"_global{kind}") for kind in HOOKS]


def _function_of(hook):
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__func__", hook)


def _name_of(hook) -> str:
    function = _function_of(hook)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _is_a_librarys(hook) -> bool:
    """FSDP, ZeRO-3, transformers and PEFT hang hooks on modules which do not read rows; everybody's recipe for
    gradient checkpointing with adapters, make_inputs_require_grad, does not either."""
    function = _function_of(hook)
    origin = getattr(function, "__module__", None) or type(function).__module__
    known = origin.partition(".")[0] in _LIBRARIES and "neftune" not in _name_of(hook)
    return known or "make_inputs_require_grad" in _name_of(hook)


@contextlib.contextmanager
def no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Random numbers, hooks that are not a library's and autocast's cache as before.

    The cache: in torch 2.8 a cast of a weight that is made without gradients is taken for the one that training needs.
    """
    cached = torch.is_autocast_cache_enabled()
    with random_numbers_kept(model, device), _without_hooks(model):
        torch.manual_seed(0)  # the same on every rank
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def random_numbers_kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    """What is drawn inside is drawn again after it."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == device.type})
    forked = dict(devices=devices, device_type=device.type) if device.type not in ("cpu", "meta") else dict(devices=[])
    with torch.random.fork_rng(**forked):
        yield


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    dictionaries = [getattr(m, kind) for m in model.modules() for kind in HOOKS] + global_hooks()
    saved = [(d, list(d.items())) for d in dictionaries if any(not _is_a_librarys(hook) for hook in d.values())]
    for dictionary, hooks in saved:
        for key, hook in hooks:
            if not _is_a_librarys(hook):
                del dictionary[key]
    try:
        yield
    finally:
        for dictionary, hooks in saved:
            added = [item for item in dictionary.items() if item not in hooks]
            dictionary.clear()
            dictionary.update([*hooks, *added])


def is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training mode or eval mode inside; bitsandbytes' layers, which choose a kernel by it on a CPU, stay in theirs:
    what is compared (policy and reference, packed and padded rows) then runs on one."""
    changed = [m for m in model.modules() if m.training != training and not is_bitsandbytes(m)]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training
