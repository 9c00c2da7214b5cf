"""Why TRL's reference of a PEFT model is not the model before training, where it is not."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from . import reference
from .copies import WeightSample


@dataclass
class AdapterWatch:
    """Notes what adding adapters does to a model while TRL's trainer is built."""

    sample: WeightSample | None = None

    @classmethod
    def of(cls, model) -> "AdapterWatch":
        """model: what the trainer is given, a path perhaps."""
        return cls(_sample(model) if reference.is_peft_model(model) else None)

    def noting(self, get_peft_model: Callable) -> Callable:
        """`get_peft_model`, which notes the weights of the model that it is given."""

        def noted(model, *args, **kwargs):
            self.sample = _sample(model)
            return get_peft_model(model, *args, **kwargs)

        return noted

    def reasons(self, model: nn.Module) -> list[str]:
        """Why switching or exchanging TRL's adapters does not bring back what `model`, a PEFT model, was."""
        found = []
        rewritten = self.sample.rewritten_in(model) if self.sample is not None else []
        if rewritten:
            found.append(
                f"adding an adapter has rewritten {len(rewritten)} weights of the model, {rewritten[0]} the first"
            )
        rest = reference.trainable(model) - reference.of_adapters(model) - _of_prompts(model)
        names = [name for name, p in model.named_parameters() if id(p) in rest]
        if names:
            found.append(f"{len(names)} parameters train that belong to no adapter, {names[0]} the first")
        if len(model.active_adapters) > 1:
            found.append(f"of the active adapters {', '.join(model.active_adapters)} one alone stays active")
        return found


def _of_prompts(model: nn.Module) -> set[int]:
    """The ids of what prompt learning trains, which PEFT leaves out or exchanges with the adapter."""
    encoders = getattr(model, "prompt_encoder", None)
    return {id(p) for p in encoders.parameters()} if isinstance(encoders, nn.Module) else set()


def _sample(model: nn.Module) -> WeightSample:
    return WeightSample(model, leave_out=reference.of_adapters(model))
