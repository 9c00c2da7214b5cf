"""Models that compute with their own weights.

`copy.deepcopy` follows bound methods but not closures. Whoever replaces `model.forward` by a function that holds the
forward of before (TRL's trainers do) makes every later deep copy of the model compute with the original's weights: a
frozen copy then moves with the policy, and a copy that is trained does not move at all.
"""

import functools
import logging
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

logger = logging.getLogger("dpo_fast")

ATTACHED = "_dpo_fast"  # under this name `attach` keeps on a model what it needs, the forward of before among it
_FORWARDS = ("forward", "_old_forward")  # the second is what accelerate's hooks call


def compute_with_own_weights(model: nn.Module) -> nn.Module:
    """Give modules their class's forward back where an instance's own computes with another model's modules.

    model: the Hugging Face model itself, below a PEFT wrapper. Changes it in place and returns it. A model that needs
    it may be attached, and is not after: `attach` it again. One warning says what was replaced.
    """
    own = {id(module) for module in model.modules()}
    replaced = []
    state = vars(model).get(ATTACHED)
    for name, module in model.named_modules():
        bound = {key: vars(module)[key] for key in _FORWARDS if key in vars(module)}
        if module is model and state is not None:
            bound["the forward before attach"] = state.original
        if not any(_is_foreign(function, module, own) for function in bound.values()):
            continue
        vars(module).pop("forward", None)
        if "_old_forward" in bound:  # hooks of accelerate would be lost with the instance's forward
            module._old_forward = module.forward
            if not _is_foreign(bound.get("forward"), module, own):
                module.forward = bound["forward"]
        if module is model:
            vars(model).pop(ATTACHED, None)
        replaced.append(name or type(model).__name__)
    if replaced:
        logger.warning(
            "%s is a copy whose forward (of %s) computed with the weights of the model that it was copied from; it has "
            "its class's forward again",
            type(model).__name__,
            ", ".join(replaced[:3]) + (", ..." if len(replaced) > 3 else ""),
        )
    return model


def _is_foreign(function, module: nn.Module, own: set[int]) -> bool:
    """Whether a forward of `module` reaches a module of the same class outside of the model."""
    return any(type(m) is type(module) and id(m) not in own for m in _modules_reached(function, set()))


def _modules_reached(value, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a callable holds: by `self`, closures, arguments that are bound, and callables of those."""
    if id(value) in seen:
        return
    seen.add(id(value))
    held = ()
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, types.MethodType):
        held = (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, types.FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != types.CellType()]
        held = (*(cell.cell_contents for cell in cells), *(value.__defaults__ or ()))
        held += tuple((value.__kwdefaults__ or {}).values())
    elif isinstance(value, (tuple, list)):
        held = value
    elif isinstance(value, dict):
        held = tuple(value.values())
    elif callable(value) and not isinstance(value, type) and hasattr(value, "__dict__"):  # as accelerate's wrappers
        held = tuple(content for key, content in vars(value).items() if key != "__wrapped__")
    for content in held:
        yield from _modules_reached(content, seen)


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
        return {where for name in names for where in _storages(getattr(tensor, name))}
    if tensor.is_meta or not tensor.numel():  # nothing there, or not yet
        return set()
    return {tensor.untyped_storage().data_ptr()}


class WeightSample:
    """A few numbers of each weight of a model, 1,024 at most, by which one can tell whether it was rewritten.

    leave_out: ids of parameters of adapters that the model has already; those may be made anew.
    """

    def __init__(self, model: nn.Module, leave_out: set[int] = frozenset()):
        self.had_adapters = bool(leave_out)
        self.before = [(name, p, _sample(p)) for name, p in model.named_parameters() if id(p) not in leave_out]

    def rewritten_in(self, model: nn.Module) -> list[str]:
        """The names, as they were, of the weights that `model` does not hold any more or holds with other values.

        Waits for the device once per weight: this is for loading.
        """
        held = {id(p) for p in model.parameters()}
        return [name for name, p, sample in self.before if id(p) not in held or not torch.equal(_sample(p), sample)]


def _sample(parameter: nn.Parameter) -> Tensor:
    if is_traceable_wrapper_subclass(parameter) or parameter.is_meta:
        return torch.empty(0, device=parameter.device)  # judged by identity alone
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // 1024))].nan_to_num().clone()
