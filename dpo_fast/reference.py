"""Where reference log-probs come from.

Each class is called with (policy, batch, ld_alpha) and gives `SequenceScores` without gradients. `policy` is the model
as it is trained, wrappers included: a reference that is the policy with another adapter must run through them too.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from .batch import PreferenceBatch
from .functional import SequenceScores, score


@dataclass
class FrozenModel:
    """Another model, or a frozen copy of the policy; attached, in eval mode."""

    model: nn.Module

    def __call__(self, policy: nn.Module, batch: PreferenceBatch, ld_alpha: float | None = None) -> SequenceScores:
        with torch.no_grad():
            return score(self.model, batch, ld_alpha=ld_alpha)


@dataclass
class AdapterOff:
    """The policy with its adapter switched off: `peft_model` is the PEFT model inside the policy's wrappers."""

    peft_model: nn.Module

    def __call__(self, policy: nn.Module, batch: PreferenceBatch, ld_alpha: float | None = None) -> SequenceScores:
        with torch.no_grad(), evaluating(policy), keep_trainable(self.peft_model), self.peft_model.disable_adapter():
            return score(policy, batch, ld_alpha=ld_alpha)


@dataclass
class FrozenAdapter:
    """The policy with another adapter: a frozen copy of the one that it had before this training."""

    peft_model: nn.Module
    adapter: str

    def __call__(self, policy: nn.Module, batch: PreferenceBatch, ld_alpha: float | None = None) -> SequenceScores:
        active = self.peft_model.active_adapter
        with torch.no_grad(), evaluating(policy), keep_trainable(self.peft_model):
            self.peft_model.set_adapter(self.adapter)
            try:
                return score(policy, batch, ld_alpha=ld_alpha)
            finally:
                self.peft_model.set_adapter(active)


@dataclass
class Precomputed:
    """Log-probs that the batch carries; `ld_alpha` is already in them."""

    def __call__(self, policy: nn.Module, batch: PreferenceBatch, ld_alpha: float | None = None) -> SequenceScores:
        if batch.reference_logps is None:
            raise ValueError(
                "reference log-probs were precomputed before training and the reference model is gone, but this batch "
                "has none; give the data set to the trainer when it is built, or pass ref_model"
            )
        return SequenceScores(batch.reference_logps)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing) inside, each module's own mode restored after."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
