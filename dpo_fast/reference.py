"""Where reference log-probs come from.

A source is a `Reference`: it gives the log-prob of each scored token, which the objective weighs later, and it says
who it is. Those of this file are models; `training.reference_columns` has the one that reads the data. `policy` is the
model as it is trained, wrappers included: a reference that is the policy with another adapter runs through them too.
"""

import contextlib
import dataclasses
import hashlib
import json
import operator
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .batch import PreferenceBatch
from .copies import base_model_of, gathered
from .forward import attachment
from .functional import SequenceScores, score
from .hooks import mode


class Reference(Protocol):
    def __call__(self, policy: nn.Module, batch: PreferenceBatch) -> SequenceScores:
        """The batch's log-probs, without gradients: of tokens, or where a source has no others, of sequences."""

    def fingerprint(self, policy: nn.Module) -> str:
        """What says whose log-probs these are: the same for the same weights, adapter, head and precision, whatever
        they are used for. It reads all weights. ValueError where there is no telling."""


class _OfModel(ABC):
    """A reference that is a model."""

    @abstractmethod
    def inside(self, policy: nn.Module) -> contextlib.AbstractContextManager[nn.Module]:
        """The model as a context, in which it is the reference."""

    def __call__(self, policy: nn.Module, batch: PreferenceBatch) -> SequenceScores:
        with torch.no_grad(), self.inside(policy) as model:
            return score(model, batch)

    def fingerprint(self, policy: nn.Module) -> str:
        with torch.no_grad(), self.inside(policy) as model:
            return fingerprint(model)


@dataclass
class FrozenModel(_OfModel):
    """Another model, or a frozen copy of the policy; attached, in eval mode.

    engine: a wrapper of the model that is called in its place, as DeepSpeed's.
    """

    model: nn.Module
    engine: nn.Module | None = None

    @contextlib.contextmanager
    def inside(self, policy: nn.Module) -> Iterator[nn.Module]:
        yield self.model if self.engine is None else self.engine


@dataclass
class InitialPolicy(_OfModel):
    """The policy with the weights that it had before training: those that may change are kept, and put in for a pass.

    Nothing is added to the model or switched in it, so this is right for any number of active adapters, under any name,
    and for parameters that belong to none. Not for sharded models: they put their own weights in.
    """

    weights: "Snapshot"

    @contextlib.contextmanager
    def inside(self, policy: nn.Module) -> Iterator[nn.Module]:
        with evaluating(policy), self.weights.put_in():
            yield policy


@dataclass
class AdapterOff(_OfModel):
    """The policy with its adapter switched off: `peft_model` is the PEFT model inside the policy's wrappers.

    rest: what trains and the switch does not reach, as it was: biases of the base model, unfrozen norms, embeddings.
    """

    peft_model: nn.Module
    rest: "Snapshot | None" = None

    @contextlib.contextmanager
    def inside(self, policy: nn.Module) -> Iterator[nn.Module]:
        rest = contextlib.nullcontext() if self.rest is None else self.rest.put_in()
        with evaluating(policy), keep_trainable(self.peft_model), rest, self._off():
            yield policy

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        with warnings.catch_warnings():
            if self.rest is not None:  # PEFT warns that biases stay as they are; `rest` has them as they were
                warnings.filterwarnings("ignore", message="Careful, disabling adapter layers")
            with self.peft_model.disable_adapter():
                yield


@dataclass
class FrozenAdapter(_OfModel):
    """The policy with another adapter: a frozen copy of the one that it had before this training.

    For sharded models; others have `InitialPolicy`.
    """

    peft_model: nn.Module
    adapter: str

    @contextlib.contextmanager
    def inside(self, policy: nn.Module) -> Iterator[nn.Module]:
        active = self.peft_model.active_adapter
        with evaluating(policy), keep_trainable(self.peft_model):
            self.peft_model.set_adapter(self.adapter)
            try:
                yield policy
            finally:
                self.peft_model.set_adapter(active)


def left_out_by_peft(model: nn.Module) -> list[str]:
    """Names of what trains beside a PEFT model's adapters, which PEFT does not save with them: biases it does, where an
    adapter asks for them."""
    rest = trainable(model) - of_adapters(model)
    saved = ".bias" if any(getattr(config, "bias", "none") != "none" for config in model.peft_config.values()) else None
    return [name for name, p in model.named_parameters() if id(p) in rest and not (saved and name.endswith(saved))]


# --- who a model is ------------------------------------------------------------------------------------------------

_WRAPPERS = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module)(?=\.)")
# Of a config: where a model lies, who wrote it, and what changes memory or speed alone
_NOT_IN_THE_NUMBERS = {"_name_or_path", "name_or_path", "transformers_version", "architectures", "use_cache"}
_CHUNK = 64 << 20  # bytes of a weight on the host at a time


def fingerprint(model: nn.Module) -> str:
    """64 hexadecimal digits of what a model's log-probs depend on: its weights and buffers, by name and dtype; adapters
    that are active; config and head transform; autocast's dtype. ValueError for a model whose weights are not here."""
    digest, unused = hashlib.sha256(), _unused_by_adapters(model)
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers()), key=lambda item: item[0]):
        if id(tensor) in unused:
            continue
        if tensor.is_meta or isinstance(tensor, DTensor) or hasattr(tensor, "ds_id"):
            raise ValueError(f"{name} is not whole on this rank, and a fingerprint needs all weights")
        digest.update(f"{_WRAPPERS.sub('', name)} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for part in tensor.detach().contiguous().view(-1).view(torch.uint8).split(_CHUNK):
            digest.update(part.cpu().numpy())
    digest.update(json.dumps(_how_it_computes(model), sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _unused_by_adapters(model: nn.Module) -> set[int]:
    """The ids of the parameters of adapters that are switched off or not active."""
    unused = set()
    for module in model.modules():
        active = () if getattr(module, "disable_adapters", False) else getattr(module, "active_adapters", ())
        for name in getattr(module, "adapter_layer_names", ()):
            container = operator.attrgetter(name)(module)
            for adapter, part in container.items() if isinstance(container, (nn.ModuleDict, nn.ParameterDict)) else ():
                if adapter not in active:
                    unused |= {id(part)} if isinstance(part, nn.Parameter) else {id(p) for p in part.parameters()}
    return unused


def _how_it_computes(model: nn.Module) -> dict:
    """What its numbers depend on beside the weights."""
    inner: Any = model
    while not hasattr(inner, "config") and hasattr(inner, "module"):  # DDP and the like
        inner = inner.module
    base = base_model_of(inner)
    config = {key: value for key, value in base.config.to_dict().items() if key not in _NOT_IN_THE_NUMBERS}
    device = next((p.device.type for p in base.parameters()), "cpu")
    autocast = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""
    scalings = {}
    for name, module in base.named_modules():
        if getattr(module, "scaling", None) and isinstance(module.scaling, dict) and not module.disable_adapters:
            scalings[name] = {adapter: module.scaling.get(adapter) for adapter in module.active_adapters}
    return {
        "class": type(base).__qualname__,
        "config": config,
        "head": dataclasses.asdict(attachment(base).transform),
        "autocast": autocast,
        "scalings": scalings,
    }


@dataclass
class _Kept:
    """One entry of a module's table of parameters, and the copy that takes its place."""

    module: nn.Module
    name: str
    copy: nn.Parameter

    def swap(self, value: nn.Parameter | None) -> nn.Parameter | None:
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
    return any(factor and not any(_has_values(p) for p in factor) for factor in factors)


def _has_values(parameter: nn.Parameter) -> bool:
    with gathered(parameter) as whole:
        return bool(whole.any())


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
