"""What accelerate makes of ranks and of a model, as far as transformers' Trainer leaves that wrong."""

import copy
import os

from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method


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


def let_reentrant_checkpoints_run(args) -> None:
    """Settle ddp_find_unused_parameters where only one value can run.

    A reentrant checkpoint runs a backward inside the backward, and DistributedDataParallel cannot look for parameters
    without gradients then ("ready only once"). transformers asks it to for every PEFT model.
    """
    reentrant = (args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    if args.gradient_checkpointing and reentrant and args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def prepare_anew(trainer) -> None:
    """Before training on several ranks: forget a preparation for evaluation.

    An evaluation before the first training prepares the model without DistributedDataParallel, and accelerate prepares
    no model twice: each rank would then train by itself. Only where that is what ranks need; FSDP and DeepSpeed prepare
    a model for both at once. FSDP2 leaves the weights of its last units whole after an evaluation, and accelerate then
    finds none that the optimizer has.
    """
    model, accelerator = trainer.model, trainer.accelerator
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if trainer.model_wrapped is model and getattr(trainer, "deepspeed", None) is not None:  # from `prepare_early`
        trainer.deepspeed.destroy()
        trainer.deepspeed = None
        accelerator._models.remove(model)
    if trainer.model_wrapped is not model or not accelerator.distributed_type.value.startswith("MULTI_"):
        return
    accelerator._models[:] = [other for other in accelerator._models if other is not model]
    own = vars(model)
    own.pop("_is_accelerate_prepared", None)
    if "_original_forward" in own:  # autocast around it
        _set_forward(model, own.pop("_original_forward"))


def prepare_early(trainer) -> None:
    """Before an evaluation ahead of the first training: prepare the model where transformers cannot for that alone.

    FSDP2 takes model and optimizer together, so they are prepared for training, which finds them so. DeepSpeed gets an
    engine of its own: transformers has none for ZeRO-1 and 2, and takes the optimizer out of the configuration for that
    of ZeRO-3.
    """
    model, accelerator = trainer.model, trainer.accelerator
    if trainer.is_in_train or trainer.model_wrapped is not model or accelerator._models:
        return
    engine = engine_of(accelerator)
    if engine == "FSDP" and is_fsdp2(accelerator):
        trainer.create_optimizer()
        trainer.model, trainer.optimizer = accelerator.prepare(model, trainer.optimizer)
        trainer.model_wrapped = trainer.model
        register_fsdp_forward_method(trainer.model, "generate")  # as transformers does before training
        accelerator.state.fsdp_plugin.activation_checkpointing = False  # it is there, and would be put around it anew
    elif engine == "DEEPSPEED":
        trainer.deepspeed = inference_engine(model, accelerator)
        accelerator._models.append(model)  # or it would be prepared once more


def engine_of(accelerator) -> str:
    """DEEPSPEED, FSDP, or one of those that hold whole models, as accelerate names them."""
    return str(accelerator.distributed_type).rpartition(".")[2]


def is_fsdp2(accelerator) -> bool:
    return getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) == 2


def places_models_late(accelerator) -> bool:
    """Whether a model stays on the CPU, and whole, until it is prepared for training."""
    return engine_of(accelerator) in ("DEEPSPEED", "FSDP")


def inference_engine(model: nn.Module, accelerator) -> nn.Module:
    """DeepSpeed's engine without an optimizer: ZeRO-3 shards the weights, and what the other stages shard is not there.

    What trains is left out of the configuration, or DeepSpeed would make an optimizer for a model that has none.
    """
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    zero = config.setdefault("zero_optimization", {"stage": 0})
    zero.pop("offload_optimizer", None)
    if zero["stage"] != 3:
        zero["stage"] = 0
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine


def _set_forward(model: nn.Module, forward) -> None:
    vars(model).pop("forward", None)
    if model.forward != forward:  # its class's otherwise
        model.forward = forward
