"""Which implementation runs, and why the others cannot.

`triton` runs on CUDA, ROCm and XPU tensors, and on CPU tensors when TRITON_INTERPRET=1; `torch` is the eager path and
runs anywhere; `reference` is the naive oracle. `auto` takes the first that can. An explicit choice never falls back.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

logger = logging.getLogger("dpo_fast")

_TRITON_DEVICES = ("cuda", "xpu")  # ROCm devices are called "cuda" by torch
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs in its interpreter: read by triton when it is imported, so set it before."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of an NVIDIA GPU; None for anything else, and where there is no GPU to ask."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def _against_triton(device: torch.device, dtype: torch.dtype) -> list[str]:
    reasons = []
    if not _TRITON_INSTALLED:
        reasons.append("the package triton is not installed")
    if device.type not in _TRITON_DEVICES and not (device.type == "cpu" and interpreting()):
        reasons.append(
            f"the tensors are on {device.type!r}, Triton needs one of {', '.join(_TRITON_DEVICES)}"
            " (or CPU tensors with TRITON_INTERPRET=1 set before triton is imported)"
        )
    capability = compute_capability(device)
    if capability is not None and capability < (8, 0):
        reasons.append(f"Triton needs compute capability 8.0, this GPU has {capability[0]}.{capability[1]}")
    if dtype == torch.float64:
        reasons.append("the kernels take bf16, fp16 and fp32, not float64")
    return reasons


def _against_none(device: torch.device, dtype: torch.dtype) -> list[str]:
    return []


class Implementation(NamedTuple):
    module: str  # in this package: Tile, token_logps_fwd, token_logps_bwd, sequence_sums (impl_torch.py)
    reasons_against: Callable[[torch.device, torch.dtype], list[str]]  # why it cannot run on such tensors
    plans_for_host: bool = False  # whether its tiles on CPU tensors are those of a CPU


# What `auto` tries, in this order. The oracle is not among them: it is asked for.
IMPLEMENTATIONS = {
    "triton": Implementation("impl_triton", _against_triton),
    "torch": Implementation("impl_torch", _against_none, plans_for_host=True),
}
IMPLS = (*IMPLEMENTATIONS, "reference")


@functools.cache
def implementation(impl: str) -> ModuleType:
    """The module. For registered ops, in which nothing is traced."""
    return importlib.import_module(f"{__package__}.{IMPLEMENTATIONS[impl].module}")


def reasons_against(impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> list[str]:
    """Every reason why `impl` cannot run on such tensors; an empty list means that it can."""
    return IMPLEMENTATIONS[impl].reasons_against(device, dtype) if impl in IMPLEMENTATIONS else []


_HOST_DEVICES = ("cpu",)  # replaced by tests that run the code for accelerators on CPU tensors


def free_to_look(x: torch.Tensor) -> bool:
    """Whether the host reads values of `x` without stopping a stream: what tells the code for CPU from the other."""
    return x.device.type in _HOST_DEVICES


def readable(x: torch.Tensor) -> bool:
    """Whether a check may look at values: they lie on the host, and nothing traces, compiles or vectorises."""
    return (
        not torch.compiler.is_compiling()
        and free_to_look(x)
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


@functools.cache
def fp32_products(device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether torch multiplies 16-bit matrices of `dtype` into an fp32 one on `device`: (as a result, and added to it).

    Asked of torch itself, once: CUDA has the first since 2.8 and the second since 2.10, ROCm later.
    """
    operand, out = torch.zeros((16, 16), dtype=dtype, device=device), torch.zeros((16, 16), device=device)
    can = []
    for multiply in (
        lambda: torch.mm(operand, operand, out_dtype=torch.float32, out=out),
        lambda: torch.addmm(out, operand, operand, out_dtype=torch.float32, out=out),
    ):
        try:
            multiply()
            can.append(True)
        except (RuntimeError, TypeError):  # TypeError: no such argument
            can.append(False)
    return can[0], can[1]


def plan_device(impl: str, device: torch.device) -> str:
    """Whose plan `impl` follows: Triton's is an accelerator's, also where its interpreter stands in for one."""
    return "cpu" if device.type in _HOST_DEVICES and IMPLEMENTATIONS[impl].plans_for_host else "cuda"


@functools.cache
def _log_once(op: str, impl: str, device_type: str, why: str) -> None:
    logger.info("%s: impl=%r on %s%s", op, impl, device_type, f" ({why})" if why else "")


def check_impl(op: str, impl: str, source: str = "impl") -> None:
    if not isinstance(impl, str) or impl not in ("auto", *IMPLS):
        raise ValueError(f"{op}: {source} must be one of 'auto', {', '.join(map(repr, IMPLS))}, got {impl!r}")


def choose_impl(op: str, impl: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The implementation that runs for `impl`; DPO_FAST_IMPL stands in for "auto" where it is set.

    Raises `ValueError` for an unknown name, and for an explicit choice that cannot run, with every reason.
    """
    source = "impl"
    if impl == "auto" and os.environ.get("DPO_FAST_IMPL", "") not in ("", "auto"):
        impl, source = os.environ["DPO_FAST_IMPL"], "DPO_FAST_IMPL"
    if impl == "auto":
        skipped: list[str] = []
        for candidate in IMPLEMENTATIONS:
            reasons = IMPLEMENTATIONS[candidate].reasons_against(device, dtype)
            if not reasons:
                if not torch.compiler.is_compiling():
                    _log_once(op, candidate, device.type, "; ".join(skipped))
                return candidate
            skipped += [f"not {candidate}: {reason}" for reason in reasons]
    check_impl(op, impl, source)
    reasons = reasons_against(impl, device, dtype)
    if reasons:
        raise ValueError(f"{op}: {source}={impl!r} cannot run: " + "; ".join(reasons))
    return impl
