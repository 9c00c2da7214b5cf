"""`dpo-fast env`: versions, the device, which implementation runs and why not the others, the head's plan."""

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

from . import attention
from .ops import liger
from .ops.dispatch import IMPLS, choose_impl, reasons_against
from .ops.plan import GEMMS, TILE_ROWS, plan_head, predicted
from .ops.roofline import DEVICES, Device, describe_device

PACKAGES = ("dpo_fast", "torch", "triton", "transformers", "accelerate", "datasets", "peft", "trl")
LEVELS = {
    "level 1, logits_token_logps": "kernels over rows of logits",
    "level 2, linear_token_logps": "tiles of logits between GEMMs",
    "level 3, linear_preference_loss": "tiles of logits between GEMMs",
}
DESCRIPTION = "versions, the device, which implementation runs and why not the others, the head's plan."
MODELS = {  # H, V
    "Llama-3 8B": (4096, 128_256),
    "Llama-3 1B": (2048, 128_256),
    "Qwen3 8B": (4096, 151_936),
    "Gemma-3 4B": (2560, 262_208),
    "GPT-2": (768, 50_257),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device() -> torch.device:
    """The device that a Trainer would use."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        return torch.device(accelerator.type)
    return torch.device("cpu")


def describe_versions() -> list[str]:
    lines = [f"python        {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for name in PACKAGES:
        try:
            # torch says of itself what it was built for, as 2.11.0+cu130; its metadata may not
            version = torch.__version__ if name == "torch" else importlib.metadata.version(name)
            lines.append(f"{name:<13} {version}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name:<13} not installed")
    return lines


def describe_here(where: torch.device) -> list[str]:
    name = torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine()
    lines = [f"device        {where.type}: {name}, {torch.get_num_threads()} threads"]
    set_here = {k: v for k, v in os.environ.items() if k.startswith("DPO_FAST_") or k == "TRITON_INTERPRET"}
    return lines + [f"environment   {k}={v}" for k, v in sorted(set_here.items())]


def describe_implementations(where: torch.device) -> list[str]:
    lines = []
    for level, what in LEVELS.items():
        lines.append(f"{level}: {choose_impl(level, 'auto', where)} ({what})")
    for impl in IMPLS:
        reasons = reasons_against(impl, where)
        lines.append(f"    {impl}: {'not here: ' + '; '.join(reasons) if reasons else 'can run'}")
    reasons = liger.reasons_against_machine(where)
    lines.append(f"plan score by Liger's forward for Hopper ({liger.SWITCH}=1):")
    lines.append(
        f"    {'not here: ' + '; '.join(reasons) if reasons else 'can run, in bfloat16 without bias or soft-cap'}"
    )
    query = torch.empty((1, 1, 1, 128), device=where, dtype=torch.bfloat16)
    chosen = attention.choose_implementation(query)
    lines.append(f"attention over shared prefixes (bfloat16, heads of 128): {chosen}")
    for implementation in attention.IMPLEMENTATIONS:
        reasons = attention.reasons_against_implementation(implementation, query)
        lines.append(f"    {implementation}: {'not here: ' + '; '.join(reasons) if reasons else 'can run'}")
    return lines


def describe_plans(
    N: int, H: int, V: int, dtype: torch.dtype, tile_mib: int | None, device_type: str, device: Device | None
) -> list[str]:
    common: dict[str, Any] = dict(tile_mib=tile_mib, device_type=device_type, device=device)
    cases: dict[str, dict[str, Any]] = {
        "reference, evaluation": dict(hidden_grad=False, head_grad=False),
        "frozen head (LoRA)": dict(head_grad=False),
        "trained head": dict(),
        "trained head, coupled loss (aot)": dict(separable=False),
    }
    budget = "tiles as suits the device" if tile_mib is None else f"tiles of {tile_mib} MiB"
    on = "" if device is None else f" on {device.name}"
    lines = [f"the head for N={N} tokens, H={H}, V={V}, {str(dtype)[6:]}, {budget}{on}:"]
    for name, needs in cases.items():
        try:
            lines.append(f"    {name}: {plan_head(N, H, V, dtype, **common, **needs).describe()}")
        except MemoryError as error:
            lines.append(f"    {name}: not here: {error}")
    return lines


def describe_predictions(N: int, dtype: torch.dtype, device: Device) -> list[str]:
    """Every candidate for heads of real models; the plans above take one of the two rows."""
    sizes = " / ".join(f"{rows:,}" for rows in TILE_ROWS)
    lines = [
        f"predicted ms for N={N} tokens, {str(dtype)[6:]}, tiles of {sizes} rows on {device.name} (pending: one pair):"
    ]
    lines.append(f"    {'':<12}{'H':>6}{'V':>9}" + "".join(f"{name:>17}" for name in GEMMS) + "   rows taken")
    for model, (H, V) in MODELS.items():
        times = predicted(N, H, V, dtype, device)
        cells = "".join(f"{' / '.join(f'{1e3 * s:.1f}' for s in times[name].values()):>17}" for name in GEMMS)
        taken = plan_head(N, H, V, dtype, device=device).chunk_rows
        lines.append(f"    {model:<12}{H:>6,}{V:>9,}{cells}{taken:>13,}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="dpo-fast env", description=DESCRIPTION)
    parser.add_argument("--N", type=int, default=8192, help="scored tokens in a batch")
    parser.add_argument("--H", type=int, default=4096, help="width of the hidden states")
    parser.add_argument("--V", type=int, default=128_256, help="vocabulary")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tile-mib", type=int, help="budget for a tile (default: by the device)")
    parser.add_argument("--device", choices=DEVICES, help="plan for this device, without one at hand")
    a = parser.parse_args(argv)
    where = device()
    planned = describe_device(where) if a.device is None else DEVICES[a.device]
    device_type = where.type if a.device is None else "cuda"
    sections = [
        describe_versions() + describe_here(where),
        describe_implementations(where),
        describe_plans(a.N, a.H, a.V, DTYPES[a.dtype], a.tile_mib, device_type, planned),
    ]
    if planned is not None:
        sections.append(describe_predictions(a.N, DTYPES[a.dtype], planned))
    print("\n\n".join("\n".join(lines) for lines in sections))
    return 0
