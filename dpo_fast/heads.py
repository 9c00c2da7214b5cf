"""An output head's module as the tensors that the fused ops take: weight, bias, and a low-rank update.

A plain linear layer, PEFT's LoRA around one, and PEFT's trained copy of one are read; any other module (quantised,
hooked, sharded by ZeRO-3, DoRA) is called as it is, at the price of its (N, V) logits, and `head_tensors` says why.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial


class HeadTensors(NamedTuple):
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    low_rank: tuple[Tensor, Tensor] | None  # (N, r), (V, r)


def head_tensors(head: nn.Module, hidden: Tensor) -> HeadTensors | str:
    """What `head(hidden)` computes, for hidden states (N, H); or the reason why the module has to be called."""
    if any(module._forward_hooks or module._forward_pre_hooks for module in head.modules()):
        return "the output head has forward hooks"
    head = _active_copy(head)
    low_rank = None
    if hasattr(head, "lora_A") and hasattr(head, "base_layer"):
        update = _lora_update(head, hidden)
        if isinstance(update, str):
            return update
        low_rank, head = update, head.base_layer
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        return f"the output head is a {type(head).__name__} with a forward of its own"
    if hasattr(head.weight, "ds_id"):
        return "the output head's weight is partitioned by ZeRO-3"
    return HeadTensors(_whole(head.weight), None if head.bias is None else _whole(head.bias), low_rank)


def _active_copy(head: nn.Module) -> nn.Module:
    """The module that PEFT's `modules_to_save` wrapper would call."""
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module")):
        return head
    active = [name for name in head.active_adapters if name in head.modules_to_save]
    return head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]


def _lora_update(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor] | None | str:
    """(down (N, r), up (V, r)) of a LoRA layer's active adapters, None where they are off or merged."""
    if layer.disable_adapters and layer.merged:
        return "the output head's adapter is switched off, but merged"
    if layer.disable_adapters or layer.merged:
        return None
    if not isinstance(layer.lora_A, nn.ModuleDict):  # AdaLoRA
        return "the output head's adapter is not plain LoRA"
    downs, ups = [], []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if getattr(layer, "lora_variant", {}).get(name) is not None or layer.lora_B[name].bias is not None:
            return "the output head's adapter is not plain LoRA"
        x = layer.lora_dropout[name](hidden.to(layer.lora_A[name].weight.dtype))
        downs.append(layer.lora_A[name](x) * layer.scaling[name])
        ups.append(layer.lora_B[name].weight)
    return (torch.cat(downs, 1), torch.cat(ups, 1)) if downs else None


def _whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered if FSDP2 has it sharded. Each rank's gradient is then its share of a mean over ranks:
    without `grad_placements`, the ranks' gradients would be taken for copies of one another."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
