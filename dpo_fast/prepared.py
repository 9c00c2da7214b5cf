"""What accelerate makes of a model, as far as transformers' Trainer leaves that wrong."""

from torch import nn


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
