"""The reference of a training: what the model was before it, made from what the trainer is given, and proven."""

import contextlib
import copy
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dpo_fast import reference
from dpo_fast.batch import PreferenceBatch
from dpo_fast.copies import WeightSample, check_storage, compute_with_own_weights, gathered
from dpo_fast.forward import attach
from dpo_fast.functional import SequenceScores, score
from dpo_fast.prepared import engine_of, inference_engine, is_fsdp2, places_models_late

from . import models, reference_columns
from .config import FastDPOConfig

logger = logging.getLogger("dpo_fast")


def of_adapter(model: nn.Module, base: WeightSample | None, accelerator):
    """The reference of a PEFT model without a reference model: itself, before training.

    base: a sample of the base model's weights from before the adapter was added; None: the adapter came with the model.
    """
    sharded, switched = is_sharded(accelerator), reference.of_adapters(model)
    trained = reference.trainable(model)
    rest = trained - switched
    _warn_of_rest(model)
    if base is None:
        if not sharded:
            moved = reference.moved_by_adapters(model)
            return reference.InitialPolicy(reference.Snapshot.of(model, trained | moved))
        check_sharded(model, rest)
        return reference.FrozenAdapter(model, copy_adapter(model))
    if rewritten := base.rewritten_in(model):
        if base.had_adapters:
            raise ValueError(
                f"the model held adapters already (a cell that ran twice?), and the new one ({_kinds(model)}) has "
                f"rewritten {len(rewritten)} weights of the model, {rewritten[0]} the first, a second time: load the "
                "model anew"
            )
        logger.warning(
            "the new adapter has rewritten %d weights of the model (%s, ...), so the model without it is another one "
            "than before: the reference is the model with the adapter as it starts",
            len(rewritten),
            rewritten[0],
        )
        if sharded:
            raise ValueError(
                f"the new adapter ({_kinds(model)}) has rewritten weights of the model, so that switching it off gives "
                f"another model, and a sharded model ({accelerator.distributed_type}) cannot keep its weights from "
                "before training: use an adapter that starts as the identity, or pass data with the columns "
                f"{' and '.join(reference_columns.SUMS)}"
            )
        return reference.InitialPolicy(reference.Snapshot.of(model, trained))
    if not rest:
        return reference.AdapterOff(model)
    if sharded:
        check_sharded(model, rest)
    return reference.AdapterOff(model, reference.Snapshot.of(model, rest))


def _warn_of_rest(model: nn.Module) -> None:
    if names := reference.left_out_by_peft(model):
        logger.warning(
            "%d parameters train that belong to no adapter (%s, ...): the reference keeps them as they were, but a "
            "saved adapter does not hold them; modules_to_save of the adapter's config does",
            len(names),
            names[0],
        )


def is_sharded(accelerator) -> bool:
    """Whether a rank holds parts of parameters, which are gathered in each pass."""
    engine = engine_of(accelerator)
    return engine == "FSDP" or (engine == "DEEPSPEED" and accelerator.state.deepspeed_plugin.zero_stage == 3)


def check_sharded(model: nn.Module, rest: set[int]) -> None:
    """Raise ValueError where switching or copying one adapter does not bring back what the model was."""
    names = [name for name, p in model.named_parameters() if id(p) in rest]
    reason = f"{len(names)} parameters train that belong to no adapter, {names[0]} the first" if names else ""
    if len(model.active_adapters) != 1:
        reason = f"{len(model.active_adapters)} adapters are active"
    if reason:
        raise ValueError(
            f"{reason}, and a sharded model cannot keep its weights from before training: train one adapter alone, or "
            f"pass data with the columns {' and '.join(reference_columns.SUMS)}"
        )


def copy_adapter(model: nn.Module) -> str:
    """Add a frozen copy of the active adapter under a name that is free; returns the name."""
    import peft

    active, taken = model.active_adapters[0], set(model.peft_config)
    name = next(name for n in range(1, len(taken) + 2) if (name := f"reference_{n}") not in taken)
    config = copy.deepcopy(model.peft_config[active])
    if getattr(config, "init_lora_weights", True) is not True:
        config.init_lora_weights = True  # PiSSA and others would rewrite the base model's weights a second time
    base = WeightSample(model, leave_out=reference.of_adapters(model))
    with reference.keep_trainable(model):
        model.add_adapter(name, config)
    if rewritten := base.rewritten_in(model):
        raise ValueError(
            f"adapter {active!r} ({_kinds(model)}) cannot be copied: adding a second one rewrites weights of the "
            f"model, {rewritten[0]} the first; pass data with the columns {' and '.join(reference_columns.SUMS)}"
        )
    weights = peft.get_peft_model_state_dict(model, adapter_name=active)
    peft.set_peft_model_state_dict(model, weights, adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        if name in parameter_name.split("."):
            parameter.requires_grad_(False)
    return name


def _kinds(model: nn.Module) -> str:
    kinds = {getattr(config.peft_type, "value", config.peft_type) for config in model.peft_config.values()}
    return ", ".join(sorted(map(str, kinds)))


def frozen_copy(model: nn.Module) -> nn.Module:
    """A frozen copy of the policy, on its device, that computes with its own weights."""
    twin = copy.deepcopy(model, _partitioned_copies(model))
    twin = reference.freeze(compute_with_own_weights(twin, original=model))
    check_storage(model, twin)
    return twin


def _partitioned_copies(model: nn.Module) -> dict[int, nn.Parameter]:
    """id -> copy, partitioned as well, of each parameter that ZeRO-3 has partitioned; one at a time is whole."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        return {}
    import deepspeed

    copies = {}
    for p in partitioned:
        with gathered(p) as whole:
            twin = nn.Parameter(whole.detach().clone(), requires_grad=False)
        deepspeed.zero.Init(module=nn.ParameterList([twin]))
        copies[id(p)] = twin
    return copies


def prepare_model(model: nn.Module, accelerator, config: FastDPOConfig) -> reference.FrozenModel:
    """A reference model, frozen, attached, and placed, or sharded, as the accelerator does it with the policy."""
    # Attached first: accelerate wraps the forward in autocast, and what is attached last would be left inside for good
    attach(reference.freeze(model), impl=config.impl, tile_mib=config.tile_mib)
    prepared = prepare_frozen(model, accelerator)
    return reference.FrozenModel(model, engine=None if prepared is model else prepared)


def prepare_frozen(model: nn.Module, accelerator) -> nn.Module:
    """Place, and shard, a frozen model as the policy will be; returns what to call in its place."""
    engine = engine_of(accelerator)
    if engine == "DEEPSPEED":
        return inference_engine(model, accelerator)
    if engine == "FSDP":
        if not is_fsdp2(accelerator):
            raise ValueError(
                "FSDP1 shards a model that is trained, and a reference model (which scores before training, too, with "
                "precompute_ref_log_probs) is not: use FSDP2 (fsdp_version: 2 in accelerate's file, or "
                "fsdp_config={'version': 2})"
            )
        from accelerate.utils import fsdp2_prepare_model  # accelerate's `prepare` asks for an optimizer

        return fsdp2_prepare_model(accelerator, model)
    return accelerator.prepare_model(model, evaluation_mode=True)


def scorer_of(source, policy: nn.Module, accelerator, config: FastDPOConfig):
    """What scores data before training, in the reference's place. A policy that is neither on its device nor sharded
    before training starts cannot: there a frozen copy of it, as the reference, does."""
    if isinstance(source, reference.FrozenModel) or not places_models_late(accelerator):
        return source
    with source.inside(policy) as model:
        twin = frozen_copy(model)
    return prepare_model(twin, accelerator, config)


def empty(copied: nn.Module) -> None:
    """Give back the memory of a copy that ZeRO-3 has partitioned: DeepSpeed keeps a list of all its models."""
    for p in copied.parameters():
        if hasattr(p, "ds_tensor"):
            p.ds_tensor.data = p.ds_tensor.new_empty(0)


# --- the proof -----------------------------------------------------------------------------------------------------


def check_start(model: nn.Module, batch: PreferenceBatch, found: SequenceScores, source, accelerator) -> None:
    """Raise RuntimeError unless the policy gives the reference's log-probs, as it must before its first update.

    source: what gave `found`. Runs the policy once more, in eval mode as the reference, and waits for the device. Every
    rank comes here at the same step, and all raise or none does.
    """
    with torch.no_grad(), reference.evaluating(model):
        policy = score(model, batch)
    # An adapter that starts as the identity multiplies by 1 and adds products with 0: roundings, as many as `attach`
    # grants a head. All else are the same operations on the same numbers, and only sums may have another order.
    roundings = 8 if isinstance(source, reference.AdapterOff) else 1
    roundoff = roundings * unit_roundoff(model, accelerator)
    distance, budget = disagreement(policy.tokens.logps, found.tokens.logps, roundoff)
    off = (~(distance <= budget)).float()  # NaN is off, too
    if accelerator.num_processes > 1:
        off = accelerator.reduce(off, reduction="sum")
    if not off.item():
        return
    base = accelerator.unwrap_model(model)
    rounding = f"rounding explains {budget.item():.2g}" + (", it is more on another rank" if distance <= budget else "")
    said = (
        f"{distance.item():.3g} nats per token apart (root mean square; {rounding}), policy {type(base).__name__}, "
        f"reference {type(source).__name__}"
    )
    if isinstance(source, reference.AdapterOff) and not reference.starts_as_identity(base):
        logger.warning(
            "the new adapter (%s) does not start as the identity: at the first step policy and reference, which is the "
            "model without it, are %s",
            _kinds(base),
            said,
        )
        return
    raise RuntimeError(
        f"the reference is not the model that training starts from: at the first step they are {said}. Were weights "
        "changed, or a forward replaced, after the trainer was built? If that is meant, pass ref_model"
    )


def disagreement(policy: Tensor, found: Tensor, roundoff: float) -> tuple[Tensor, Tensor]:
    """(root mean square of the difference of token log-probs, what rounding explains of it), device scalars.

    roundoff: relative to the largest log-prob, which stands for the logits that it was made of.
    """
    if not policy.numel():
        return policy.new_zeros(()), policy.new_zeros(())
    policy, found = policy.double(), found.to(policy.device).double()
    return (policy - found).square().mean().sqrt(), roundoff * found.abs().max().clamp(min=1)


def unit_roundoff(model: nn.Module, accelerator) -> float:
    """The coarsest epsilon among the dtypes that the model computes in."""
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
    dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    dtypes.add(mixed.get(accelerator.mixed_precision, torch.float32))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


# --- what others do to adapters ------------------------------------------------------------------------------------


@contextlib.contextmanager
def keep_adapters(model: nn.Module) -> Iterator[None]:
    """Which adapters are active and what trains, restored after: transformers activates the first one alone when it
    loads a checkpoint."""
    if not models.is_peft_model(model):
        yield
        return
    active = list(model.active_adapters)
    with reference.keep_trainable(model):
        yield
        if list(model.active_adapters) != active:
            model.base_model.set_adapter(active)


@contextlib.contextmanager
def keep_dtypes(model: nn.Module) -> Iterator[None]:
    """The dtypes of a PEFT model's weights, restored after: PEFT turns an adapter that it loads to float32."""
    before = {name: p.dtype for name, p in model.named_parameters()} if models.is_peft_model(model) else {}
    yield
    for name, p in model.named_parameters():
        if p.dtype != before.get(name, p.dtype):
            p.data = p.data.to(before[name])


@contextlib.contextmanager
def unseen(source) -> Iterator[None]:
    """Hide the copy of an adapter that serves as reference, so that it is not saved with the policy's."""
    if not isinstance(source, reference.FrozenAdapter):
        yield
        return
    config = source.peft_model.peft_config.pop(source.adapter)
    try:
        yield
    finally:
        source.peft_model.peft_config[source.adapter] = config
