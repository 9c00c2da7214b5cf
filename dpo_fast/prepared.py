"""What accelerate makes of ranks and of a model, as far as transformers' Trainer leaves that wrong."""

import os

from torch import nn


def check_ranks(world_size: int) -> None:
    """Raise ValueError where a launcher has started several processes and transformers sees one: each of them would
    train by itself, on all data, and write into the same directory. world_size: the training arguments'."""
    started = os.environ.get("WORLD_SIZE", "")
    if world_size == 1 and started.isdecimal() and int(started) > 1:
        raise ValueError(
            f"a launcher has started {started} processes (WORLD_SIZE), but transformers sees only this one, so each "
            "would train by itself. On CPUs, set use_cpu=True (--use_cpu true); if this process is meant to be alone, "
            "unset WORLD_SIZE"
        )


def prepare_anew(trainer) -> None:
    """Before training on several ranks: forget a preparation for evaluation.

    An evaluation before the first training prepares the model without DistributedDataParallel, and accelerate prepares
    no model twice: each rank would then train by itself. Only where that is what ranks need; FSDP and DeepSpeed prepare
    a model for both at once.
    """
    model, accelerator = trainer.model, trainer.accelerator
    if trainer.model_wrapped is not model or not accelerator.distributed_type.value.startswith("MULTI_"):
        return
    accelerator._models[:] = [other for other in accelerator._models if other is not model]
    own = vars(model)
    own.pop("_is_accelerate_prepared", None)
    if "_original_forward" in own:  # autocast around it
        _set_forward(model, own.pop("_original_forward"))


def _set_forward(model: nn.Module, forward) -> None:
    vars(model).pop("forward", None)
    if model.forward != forward:  # its class's otherwise
        model.forward = forward
