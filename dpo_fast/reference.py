"""Where reference log-probs come from.

Each class is called with (policy, batch) and gives `SequenceScores` without gradients; what weighs tokens, the
objective applies later. `policy` is the model as it is trained, wrappers included: a reference that is the policy with
another adapter must run through them too.
"""

import contextlib
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from .batch import PreferenceBatch
from .functional import SequenceScores, score
from .hooks import mode


@dataclass
class FrozenModel:
    """Another model, or a frozen copy of the policy; attached, in eval mode."""

    model: nn.Module

    def __call__(self, policy: nn.Module, batch: PreferenceBatch) -> SequenceScores:
        with torch.no_grad():
            return score(self.model, batch)


@dataclass
class InitialPolicy:
    """The policy with the weights that it had before training: those that may change are kept, and put in for a pass.

    Nothing is added to the model or switched in it, so this is right for any number of active adapters, under any name,
    and for parameters that belong to none. Not for sharded models: they put their own weights in.
    """

    weights: "Snapshot"

    def __call__(self, policy: nn.Module, batch: PreferenceBatch) -> SequenceScores:
        with torch.no_grad(), evaluating(policy), self.weights.put_in():
            return score(policy, batch)


@dataclass
class AdapterOff:
    """The policy with its adapter switched off: `peft_model` is the PEFT model inside the policy's wrappers.

    rest: what trains and the switch does not reach, as it was: biases of the base model, unfrozen norms, embeddings.
    """

    peft_model: nn.Module
    rest: "Snapshot | None" = None

    def __call__(self, policy: nn.Module, batch: PreferenceBatch) -> SequenceScores:
        rest = contextlib.nullcontext() if self.rest is None else self.rest.put_in()
        with torch.no_grad(), evaluating(policy), keep_trainable(self.peft_model), rest, self._off():
            return score(policy, batch)

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        with warnings.catch_warnings():
            if self.rest is not None:  # PEFT warns that biases stay as they are; `rest` has them as they were
                warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
            with self.peft_model.disable_adapter():
                yield


@dataclass
class FrozenAdapter:
    """The policy with another adapter: a frozen copy of the one that it had before this training.

    For sharded models; others have `InitialPolicy`.
    """

    peft_model: nn.Module
    adapter: str

    def __call__(self, policy: nn.Module, batch: PreferenceBatch) -> SequenceScores:
        active = self.peft_model.active_adapter
        with torch.no_grad(), evaluating(policy), keep_trainable(self.peft_model):
            self.peft_model.set_adapter(self.adapter)
            try:
                return score(policy, batch)
            finally:
                self.peft_model.set_adapter(active)


@dataclass
class Precomputed:
    """Sums that the batch carries; `ld_alpha` is already in them."""

    def __call__(self, policy: nn.Module, batch: PreferenceBatch) -> SequenceScores:
        if batch.reference_logps is None:
            raise ValueError(
                "reference log-probs came with the data or were precomputed and the reference model is gone, but this "
                "batch has none; give the data set to the trainer when it is built"
            )
        return SequenceScores(batch.reference_logps)


@dataclass
class _Kept:
    """One entry of a module's table of parameters, and the copy that takes its place."""

    module: nn.Module
    name: str
    copy: nn.Parameter

    def swap(self, value: nn.Parameter) -> nn.Parameter:
        """Put `value` into the table; returns what was there."""
        before = self.module._parameters[self.name]
        self.module._parameters[self.name] = value
        return before


@dataclass
class Snapshot:
    """Frozen copies of parameters, and the places where they belong.

    The copies replace entries of modules' tables, not values: no memory is moved in a pass, what holds the parameters
    (optimizer, DDP) does not notice, and a parameter that was exchanged for another (AdaLoRA's, by one of fewer
    ranks) is replaced as well.
    """

    kept: list[_Kept] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, parameters: set[int]) -> "Snapshot":
        """Copies of the parameters with these ids, each once, wherever in `model` they are used."""
        copies, kept = {}, []
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None and id(p) in parameters:
                    if id(p) not in copies:
                        copies[id(p)] = nn.Parameter(p.detach().clone(), requires_grad=False)
                    kept.append(_Kept(module, name, copies[id(p)]))
        return cls(kept)

    @contextlib.contextmanager
    def put_in(self) -> Iterator[None]:
        """The copies in their places inside, what was there after."""
        replaced = []
        try:
            for entry in self.kept:
                before = entry.swap(entry.copy)
                replaced.append((entry, before))
                if (
                    entry.copy.device != before.device or entry.copy.dtype != before.dtype
                ):  # the model was moved or cast
                    entry.copy.data = entry.copy.data.to(before.device, before.dtype)
            yield
        finally:
            for entry, before in reversed(replaced):
                entry.swap(before)


def is_peft_model(model) -> bool:
    return isinstance(getattr(model, "peft_config", None), Mapping) and hasattr(model, "disable_adapter")


def trainable(model: nn.Module) -> set[int]:
    """The ids of the parameters that train."""
    return {id(p) for p in model.parameters() if p.requires_grad}


def of_adapters(model: nn.Module) -> set[int]:
    """The ids of the parameters that PEFT's switch turns off, of all adapters; copies of whole modules included."""
    return {id(p) for _name, p in _in_adapter_layers(model, "adapter_layer_names")}


def moved_by_adapters(model: nn.Module) -> set[int]:
    """The ids of parameters that have no gradient and that an adapter method still changes, as AdaLoRA's ranks."""
    return {id(p) for _name, p in _in_adapter_layers(model, "other_param_names")}


def starts_as_identity(model: nn.Module) -> bool:
    """Whether the adapters' weights alone say that they change nothing yet: a factor of each LoRA product is zero."""
    layers = [m for m in model.modules() if any(hasattr(m, name) for name in _ZERO_AT_START)]
    return bool(layers) and all(_is_zero_product(layer) for layer in layers)


_ZERO_AT_START = ("lora_B", "lora_embedding_A", "lora_E")


def _is_zero_product(layer: nn.Module) -> bool:
    factors = [list(getattr(layer, name).parameters()) for name in _ZERO_AT_START if hasattr(layer, name)]
    return any(factor and not any(p.any() for p in factor) for factor in factors)


def _in_adapter_layers(model: nn.Module, names: str) -> Iterator[tuple[str, nn.Parameter]]:
    """(container, parameter) of PEFT's layers; `names` is the attribute in which they list their containers."""
    for module in model.modules():
        for name in getattr(module, names, ()):
            container = operator.attrgetter(name)(module)
            if isinstance(container, nn.Module):
                yield from ((name, p) for p in container.parameters())


def evaluating(model: nn.Module) -> contextlib.AbstractContextManager:
    """Eval mode (no dropout, no gradient checkpointing) inside, each module's own mode restored after."""
    return mode(model, training=False)


@contextlib.contextmanager
def keep_trainable(model: nn.Module) -> Iterator[None]:
    """Restore what is trainable: PEFT's switches turn `requires_grad` of all parameters of an adapter on."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trainable in before:
            if parameter.requires_grad != trainable:
                parameter.requires_grad_(trainable)


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, nothing trainable; returns the model."""
    return model.eval().requires_grad_(False)
