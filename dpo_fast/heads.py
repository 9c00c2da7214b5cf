"""An output head's module as the tensors that the fused ops take: weight, bias, and a low-rank update.

A plain linear layer, PEFT's LoRA around one, and PEFT's trained copy of one are read where nothing hangs on them: then
calling one computes the product and nothing else. Any other module (hooked, quantised, sharded by ZeRO-3, DoRA, a
forward of somebody's own) is called as it is, at the price of its (N, V) logits, and `head_tensors` says why.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from .hooks import HOOKS, global_hooks


class HeadTensors(NamedTuple):
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    low_rank: tuple[Tensor, Tensor] | None  # (N, r), (V, r)


# As torch defines it; None where somebody has replaced it already
_LINEAR_FORWARD = nn.Linear.forward if nn.Linear.forward.__module__ == "torch.nn.modules.linear" else None


def head_tensors(head: nn.Module, hidden: Tensor) -> HeadTensors | str:
    """What `head(hidden)` computes, for hidden states (N, H); or the reason why the module has to be called."""
    if reason := _what_hangs_on(head):
        return f"the output head has {reason}"
    layer: Any = _active_copy(head)
    low_rank = None
    if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
        update = _lora_update(layer, hidden)
        if isinstance(update, str):
            return update
        low_rank, layer = update, layer.base_layer
    if not _is_linear(layer):
        return f"the output head is a {type(layer).__name__} with a forward of its own"
    if hasattr(layer.weight, "ds_id"):
        return "the output head's weight is partitioned by ZeRO-3"
    tensors = layer.weight, layer.bias
    if foreign := [type(x).__name__ for x in tensors if x is not None and not _is_plain(x)]:
        return f"the output head's tensors are of the class {foreign[0]}"
    return HeadTensors(_whole(layer.weight), None if layer.bias is None else _whole(layer.bias), low_rank)


def _what_hangs_on(head: nn.Module) -> str:
    """What calling the head or a module in it would run beside its class's forward; "" for nothing. Loops, because
    Dynamo before torch 2.12 does not trace generators here."""
    replaced, compiled = type(head).__call__ is not nn.Module.__call__, False
    for module in head.modules():
        for kind in HOOKS:
            if getattr(module, kind):
                return "hooks"
        replaced = replaced or "forward" in module.__dict__
        compiled = compiled or module._compiled_call_impl is not None
    for hooks in global_hooks():
        for hook in hooks.values():
            # torch's own only look: which module runs, for a profiler or a counter of FLOPs
            if not str(getattr(hook, "__module__", "")).startswith("torch.utils."):
                return "the hooks of all modules"
    return "a forward that was replaced" if replaced else "been compiled by itself" if compiled else ""


def _is_linear(module: nn.Module) -> bool:
    """Whether calling it is `nn.Linear.forward`, as torch defines it."""
    return type(module).forward is _LINEAR_FORWARD and type(module).__call__ is nn.Module.__call__


def _is_pefts(module: nn.Module) -> bool:
    """Whether calling it is what PEFT has written: no subclass, no forward of somebody else's on its class."""
    kind = type(module)
    if not kind.__module__.startswith("peft.") or kind.__call__ is not nn.Module.__call__:
        return False
    return torch.compiler.is_compiling() or kind.forward.__module__.startswith("peft.")


def _is_plain(tensor: Tensor) -> bool:
    """Whether a product with it is a product of numbers: no quantised, sparse, fake or otherwise wrapped tensor."""
    if type(tensor) is DTensor:
        tensor = tensor._local_tensor
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return known and not tensor.is_meta and not tensor.is_quantized


def _active_copy(head: nn.Module) -> nn.Module:
    """The module that PEFT's `modules_to_save` wrapper would call."""
    if not (hasattr(head, "modules_to_save") and hasattr(head, "original_module") and _is_pefts(head)):
        return head
    active = [name for name in head.active_adapters if name in head.modules_to_save]
    called: Any = head.original_module if head.disable_adapters or not active else head.modules_to_save[active[0]]
    return called


def _lora_update(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor] | None | str:
    """(down (N, r), up (V, r)) of a LoRA layer's active adapters, None where they are off or merged."""
    if layer.disable_adapters and layer.merged:
        return "the output head's adapter is switched off, but merged"
    if layer.disable_adapters or layer.merged:
        return None
    if not isinstance(layer.lora_A, nn.ModuleDict) or not _is_pefts(layer):  # AdaLoRA, or somebody's own
        return "the output head's adapter is not plain LoRA"
    downs, ups = [], []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        up = layer.lora_B[name]
        plain = _is_linear(up) and up.bias is None and _is_plain(up.weight)
        if getattr(layer, "lora_variant", {}).get(name) is not None or not plain:
            return "the output head's adapter is not plain LoRA"
        x = layer.lora_dropout[name](hidden.to(layer.lora_A[name].weight.dtype))
        downs.append(layer.lora_A[name](x) * layer.scaling[name])
        ups.append(up.weight)
    return (torch.cat(downs, 1), torch.cat(ups, 1)) if downs else None


def _whole(parameter: Tensor) -> Tensor:
    """The parameter, gathered if FSDP2 has it sharded. Each rank's gradient is then its share of a mean over ranks:
    without `grad_placements`, the ranks' gradients would be taken for copies of one another."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
