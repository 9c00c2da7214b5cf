"""Block sizes that were measured: architecture -> where, and what replaces the constants of a kernel's rule.

    TUNED["cuda:90"] = {"device": "NVIDIA H200, torch 2.11", "token_logps_fwd": (1024, 8), ...}

A kernel without an entry follows its rule, which says how it chooses. `python -m benchmarks.sweep` times the candidates
and prints entries in this form; tests/aot_compile.py compiles them. Nothing tunes itself at run time.

    token_logps_fwd        (LANES, num_warps) of a long row
    token_logps_bwd        (BLOCK_V, num_warps) of a long row
"""

import functools

import torch

TUNED: dict[str, dict] = {}  # no device has been measured yet

# Close relatives: the same instructions and at least the shared memory of the other
RELATIVES = {"cuda:86": "cuda:120", "cuda:87": "cuda:80", "cuda:89": "cuda:120", "cuda:103": "cuda:100"}
RELATIVES |= {"cuda:121": "cuda:120", "hip:gfx950": "hip:gfx942"}


def constants(target: str, kernel: str, rule: tuple[int, ...]) -> tuple[int, ...]:
    """What was measured for `kernel` on `target`, else the rule's."""
    return TUNED.get(RELATIVES.get(target, target), {}).get(kernel, rule)


@functools.cache
def target_name(device: torch.device) -> str:
    """As in "cuda:90" or "hip:gfx942"; "other" for the interpreter and anything else."""
    if device.type != "cuda":
        return "other"
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}{minor}"
