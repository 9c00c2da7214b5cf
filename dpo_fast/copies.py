"""Models that compute with their own weights.

`copy.deepcopy` follows bound methods but not closures. Whoever replaces a method of a model by a function that holds
the method of before (TRL's trainers do it to `forward`, accelerate's `dispatch_model` to `to`) makes every later deep
copy of the model compute with the original's weights, or hand out the original: a frozen copy then moves with the
policy, and a copy that is trained does not move at all.
"""

import contextlib
import functools
import hashlib
import logging
import types
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

logger = logging.getLogger("dpo_fast")

ATTACHED = "_dpo_fast"  # under this name `attach` keeps on a model what it needs, the forward of before among it
OLD_FORWARD = "_old_forward"  # what accelerate's hooks call
_BEFORE_ATTACH = "forward, before attach"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def base_model_of(model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, below the wrappers of torch.compile and PEFT if there are any."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compute_with_own_weights(model: nn.Module, original: nn.Module | None = None) -> nn.Module:
    """Give modules their class's methods back where an instance's own reach another model.

    model: the Hugging Face model itself, below a PEFT wrapper. Changes it in place and returns it. A model that needs
    it may be attached, and is not after: `attach` it again. One warning says what was replaced.
    original: the model that `model` is a copy of, if that is known: none of its modules and none of its weights that
      train may be reached then. If it is not, no module of the same class as the one that the method belongs to.
    """
    world, replaced, hooked = _World(model, original), [], []
    for name, module in list(model.named_modules()):
        found = _instance_methods(module)
        if hasattr(vars(module).get(ATTACHED), "original"):
            found[_BEFORE_ATTACH] = vars(module)[ATTACHED].original
        foreign = [key for key, function in found.items() if world.is_foreign(function, module)]
        if foreign:
            replaced.append(f"{name or type(model).__name__}.{foreign[0]}")
            _take_back(module, found, foreign)
        hooks = [hook for table in _HOOKS for hook in getattr(module, table).values()]
        if original is not None and any(world.is_foreign(hook, module) for hook in hooks):
            hooked.append(name or type(model).__name__)
    if replaced:
        logger.warning(
            "%s is a copy some methods of which (%s) worked on the model that it was copied from; it has its class's "
            "again",
            type(model).__name__,
            ", ".join(replaced[:3]) + (", ..." if len(replaced) > 3 else ""),
        )
    if hooked:
        logger.warning(
            "a hook on %s holds a module or a weight of the model that %s was copied from: if it computes with that, "
            "the copy moves when the model is trained",
            hooked[0],
            type(model).__name__,
        )
    return model


def _instance_methods(module: nn.Module) -> dict:
    """The methods of its class that this instance has as attributes of its own."""
    return {
        key: value
        for key, value in vars(module).items()
        if callable(value)
        and not isinstance(value, (nn.Module, type))
        and (key == OLD_FORWARD or callable(getattr(type(module), key, None)))
    }


def _take_back(module: nn.Module, found: dict, foreign: list[str]) -> None:
    """Remove foreign methods, and if one is a forward, what others have built on it."""
    for key in foreign:
        vars(module).pop(key, None)
    forwards = [key for key in foreign if "forward" in key]
    if not forwards:
        return
    hooked = found.get(_BEFORE_ATTACH, found.get("forward")) if forwards == [OLD_FORWARD] else None
    vars(module).pop("forward", None)
    vars(module).pop(ATTACHED, None)
    if OLD_FORWARD in found:  # the instance's forward is then accelerate's, which runs its hooks and calls this
        setattr(module, OLD_FORWARD, module.forward)
        if hooked is not None:
            module.forward = hooked


class _World:
    """What belongs to a model and what to others."""

    def __init__(self, model: nn.Module, original: nn.Module | None):
        self.own = {id(module) for module in model.modules()}
        others = () if original is None else original.modules()
        self.others = {id(module) for module in others} - self.own
        weights = () if original is None else (p for p in original.parameters() if p.requires_grad)
        self.memory = {where for p in weights for where in _storages(p)}

    def is_foreign(self, function, module: nn.Module) -> bool:
        """Whether a function that belongs to `module` reaches what it must not."""
        for value in reached(function):
            if isinstance(value, Tensor):
                foreign = not self.memory.isdisjoint(_storages(value))
            else:
                foreign = id(value) in self.others or (type(value) is type(module) and id(value) not in self.own)
            if foreign:
                return True
        return False


def reached(value, seen: set[int] | None = None) -> Iterator:
    """A callable and what it holds: by `self`, closures, bound arguments, and callables of those. What a module or a
    tensor holds is its own affair."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    held: Sequence[Any] = ()
    if isinstance(value, (nn.Module, Tensor)):
        pass
    elif isinstance(value, types.MethodType):
        held = (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != types.CellType()]
        held = (*(cell.cell_contents for cell in cells), *(value.__defaults__ or ()))
        held += tuple((value.__kwdefaults__ or {}).values())
        names = (value.__globals__.get(name) for name in value.__code__.co_names)  # of a script, say
        held += tuple(found for found in names if isinstance(found, types.MethodType))
    elif isinstance(value, (tuple, list)):
        held = value
    elif isinstance(value, dict):
        held = tuple(value.values())
    elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):  # as accelerate's wrappers
        held = tuple(content for key, content in vars(value).items() if key != "__wrapped__")
    for content in held:
        yield from reached(content, seen)


@contextlib.contextmanager
def gathered(parameter: nn.Parameter) -> Iterator[nn.Parameter]:
    """The parameter, whole inside if DeepSpeed ZeRO-3 has partitioned it: every rank must come here."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter


def check_storage(policy: nn.Module, reference: nn.Module) -> None:
    """Raise ValueError for a reference that holds memory of a parameter that trains."""
    held = {where for p in reference.parameters() for where in _storages(p)}
    shared = [name for name, p in policy.named_parameters() if p.requires_grad and not held.isdisjoint(_storages(p))]
    if shared:
        raise ValueError(
            f"ref_model ({type(reference).__name__}) shares the memory of {len(shared)} parameters that train with "
            f"model ({type(policy).__name__}), {shared[0]} the first: it would move with the policy. Pass a copy "
            "(copy.deepcopy), load it a second time, or omit it to use the policy as it is before training"
        )


def _storages(tensor: Tensor) -> set[int]:
    """Where the memory of a tensor lies; of a wrapper (DTensor, quantised), of what it wraps."""
    if is_traceable_wrapper_subclass(tensor):
        names, _context = tensor.__tensor_flatten__()
        inner = [getattr(tensor, name) for name in names]  # of a DTensor, its mesh, too
        return {where for held in inner if isinstance(held, Tensor) for where in _storages(held)}
    if tensor.is_meta or not tensor.numel():  # nothing there, or not yet
        return set()
    return {tensor.untyped_storage().data_ptr()}


class WeightSample:
    """A few numbers of each weight of a model, 1,024 at most, by which one can tell whether it was rewritten.

    leave_out: ids of parameters of adapters that the model has already; those may be made anew.
    """

    def __init__(self, model: nn.Module, leave_out: Set[int] = frozenset()):
        self.had_adapters = bool(leave_out)
        self.before = [(name, p, _sample(p)) for name, p in model.named_parameters() if id(p) not in leave_out]

    def rewritten_in(self, model: nn.Module) -> list[str]:
        """The names, as they were, of the weights that `model` does not hold any more or holds with other values.

        Waits for the device once per weight: this is for loading.
        """
        held = {id(p) for p in model.parameters()}
        return [name for name, p, sample in self.before if id(p) not in held or not torch.equal(_sample(p), sample)]


def digest(model: nn.Module, leave_out: Set[int] = frozenset()) -> str:
    """Of a sample of each weight, by name, "" for a model whose weights are not whole here."""
    found = hashlib.sha256()
    for name, p in model.named_parameters():
        if id(p) in leave_out:
            continue
        if is_traceable_wrapper_subclass(p) or p.is_meta or hasattr(p, "ds_id"):
            return ""
        found.update(f"{name} {tuple(p.shape)}\n".encode())
        found.update(_sample(p).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def _sample(parameter: nn.Parameter) -> Tensor:
    if is_traceable_wrapper_subclass(parameter) or parameter.is_meta:
        return torch.empty(0, device=parameter.device)  # judged by identity alone
    here = getattr(parameter, "ds_tensor", parameter)  # of one that ZeRO-3 has partitioned, this rank's part
    flat = here.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // 1024))].nan_to_num().clone()
