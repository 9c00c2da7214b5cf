"""What this machine has, as one line of JSON, and what follows from it for the parts of gpu.py.

python -m benchmarks.facts
"""

import importlib.util
import json
import shutil

from .gpu_stages import Part

# name of the import -> what follows where it is missing
PEERS = {
    "datasets": "no steps are measured",
    "trl": "steps have no TRL beside ours, the head lacks TRL's",
    "peft": "no steps with LoRA",
    "liger_kernel": "the head is not compared with Liger's",
    "quack": "the head is not compared with QuACK's",
    "cut_cross_entropy": "the head is not compared with cut-cross-entropy",
    "flash_attn": "attention is not compared with flash_attn",
    "xdist": "tests run one after the other",
}


def facts() -> dict:
    import torch

    from .record import device_name

    found = {
        "device": device_name(),
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "sanitizer": shutil.which("compute-sanitizer") is not None,
        "missing": [name for name in PEERS if importlib.util.find_spec(name) is None],
    }
    if found["gpus"]:
        found["free_gib"] = torch.cuda.mem_get_info()[0] / 2**30
        found["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def lines_of(found: dict, on_gpu: bool) -> list[str]:
    """What is not as it should be, and what follows."""
    lines = [f"{name} is not installed: {PEERS[name]}" for name in found["missing"]]
    if found["gpus"] > 1:
        lines.append(f"{found['gpus']} GPUs are visible: GPU 0 of them is used, the others stay idle")
    if on_gpu and not found["bf16"]:
        lines.append(f"this GPU (compute capability {found['capability']}) has no bf16: what takes it is left out")
    if on_gpu and not found["sanitizer"]:
        lines.append("compute-sanitizer is not installed: memcheck and racecheck are left out")
    return lines


def reason_against(part: Part, found: dict, on_gpu: bool) -> str | None:
    """Why a part cannot run here; None if it can. A CPU needs neither a GPU's dtype and tools nor its memory."""
    for need in part.needs:
        if need in PEERS and need in found["missing"]:
            return f"{need} is not installed"
        if on_gpu and need == "bf16" and not found["bf16"]:
            return "this GPU has no bf16"
        if on_gpu and need == "sanitizer" and not found["sanitizer"]:
            return "compute-sanitizer is not installed"
    if on_gpu and part.gib > found["free_gib"]:
        return f"it takes about {part.gib:.0f} GiB, {found['free_gib']:.0f} are free"
    return None


if __name__ == "__main__":
    print(json.dumps(facts()))
