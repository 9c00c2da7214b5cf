"""The forwards that a trainer's models have while it uses them."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import nn

from .. import attention
from ..copies import ATTACHED, compute_with_own_weights
from ..forward import LEADING, on_top

SEAMS = "_dpo_fast_trl"  # of a model: the seams of the trainers that it went through, as a model may go through several


class Seam(Protocol):
    """State of one installed forward, kept on the model by attribute, so that a deep copy of the model has its own."""

    def answer(self, model: nn.Module, args: tuple, kwargs: dict) -> Any: ...


def lead(model: nn.Module, seam: Seam) -> None:
    """Let `seam` answer calls of `model`, a causal LM."""
    seams = vars(model).setdefault(SEAMS, [])
    level = len(seams)
    seams.append(seam)

    @functools.wraps(type(model).forward)  # `generate` reads its signature
    def forward(self, *args, **kwargs):
        return vars(self)[SEAMS][level].answer(self, args, kwargs)

    LEADING.add(forward)
    model.forward = types.MethodType(forward, model)


class Installed:
    """A model with a forward that `install` puts on it, from its construction on; `leave` takes that off again, `enter`
    puts it back."""

    def __init__(self, model: nn.Module, install: Callable[[nn.Module], None]):
        self.model, self.install = model, install
        self.in_use: dict | None = None
        self._install()

    def _install(self) -> None:
        compute_with_own_weights(self.model)  # or a forward that works on another model would come back
        self.before = _way_of(self.model)
        self.install(self.model)
        self.ours = getattr(self.model.forward, "__func__", self.model.forward)

    def enter(self) -> None:
        if self.in_use is None:
            return
        if _way_of(self.model) == self.before:
            _set_way(self.model, self.in_use)
        else:  # it was wrapped in the meantime
            self._install()
        self.in_use = None

    def leave(self) -> None:
        """Keeps a forward that somebody has wrapped, unless it was accelerate, whose wrapper comes back with ours."""
        attention.disable(self.model)
        if self.in_use is None and on_top(self.model.forward, [self.ours]):
            self.in_use = _way_of(self.model)
            _set_way(self.model, self.before)


class UsesModels:
    """Comes before a trainer of TRL's: its models have the forwards that are given to them while it uses them."""

    _uses = 0
    _installed: list[Installed]

    def train(self, *args, **kwargs):
        """As TRL's."""
        with self._models_in_use():
            return super().train(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        """As TRL's."""
        with self._models_in_use():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As TRL's."""
        with self._models_in_use():
            return super().predict(*args, **kwargs)

    def compute_loss(self, *args, **kwargs):
        """As TRL's. By itself it leaves the models as they are in use: a backward may come."""
        self._use_models()
        return super().compute_loss(*args, **kwargs)

    def compute_ref_log_probs(self, *args, **kwargs):
        """As TRL's."""
        self._use_models()
        return super().compute_ref_log_probs(*args, **kwargs)

    @contextlib.contextmanager
    def _models_in_use(self) -> Iterator[None]:
        """After the outermost use the models are called as before this trainer was made, and pickles of them and of
        their configs load without us."""
        self._use_models()
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                for there in self._installed:
                    there.leave()

    def _use_models(self) -> None:
        for there in getattr(self, "_installed", ()):  # TRL's constructor calls methods, too
            there.enter()


_WAY = ("forward", "_original_forward", "_is_accelerate_prepared", ATTACHED, SEAMS)


def _way_of(model: nn.Module) -> dict:
    """The attributes that say what calling a model runs, of its own, not of its class."""
    own = {name: vars(model)[name] for name in _WAY if name in vars(model)}
    return {name: list(value) if isinstance(value, list) else value for name, value in own.items()}


def _set_way(model: nn.Module, way: dict) -> None:
    for name in _WAY:
        vars(model).pop(name, None)
    vars(model).update(way)
