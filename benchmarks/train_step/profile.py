"""Where the time of whole steps goes: shares of head, attention, optimizer and the rest, and of waiting.

On a GPU, the time of kernels, each with the operations around its launch; without one, the processor's time in each
operation by itself. The profiler slows the host down: a share of idle time is the most that it can be.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# What one of the names around an operation holds, in lower case; the first part that fits
PARTS = {
    "optimizer": ("optimizer.step",),
    "head": ("logprob", "pairwiselossfunction", "dpo_fast::", "dpo_fast_", "token_logps"),
    "attention": ("attention", "attn", "flash", "fmha", "flex"),
}
PARTS_OF_A_STEP = (*PARTS, "rest", "idle")


def part_of(names: Iterable[str]) -> str:
    """names: of an operation or kernel, and of the operations around it."""
    lower = [name.lower() for name in names]
    return next((p for p, words in PARTS.items() if any(w in name for name in lower for w in words)), "rest")


def shares(times: Iterable[tuple[float, tuple[str, ...]]], busy: float, whole: float) -> dict[str, float]:
    """Of `whole`: each part, in proportion to its times, of the time that was `busy`, and what is left of it, `idle`.

    times: (time, names)."""
    found = dict.fromkeys(PARTS_OF_A_STEP, 0.0)
    for time, names in times:
        found[part_of(names)] += time
    busy = min(busy, whole)
    scale = busy / whole / (sum(found.values()) or 1.0)
    return {part: time * scale for part, time in found.items()} | {"idle": 1 - busy / whole}


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


class Profile:
    """torch.profiler from here to `shares`."""

    def __init__(self):
        self.cuda = torch.cuda.is_available()
        self.trace = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * self.cuda])
        self.trace.start()

    def shares(self, seconds: float) -> dict[str, float]:
        """Of the steps since, which took that many seconds."""
        self.trace.stop()
        events: Any = self.trace.events()
        on_device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU and not e.is_user_annotation]
        on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
        if self.cuda:
            times = [(kernel.duration, (kernel.name, *_around(e))) for e in on_host for kernel in e.kernels]
            nameless = sum(e.time_range.elapsed_us() for e in on_device) - sum(time for time, _ in times)
            times.append((max(nameless, 0.0), ()))
        else:
            times = [(e.self_cpu_time_total, _around(e)) for e in on_host]
        busy = on_device if self.cuda else [e for e in on_host if e.cpu_parent is None]
        return shares(times, covered((e.time_range.start, e.time_range.end) for e in busy), 1e6 * seconds)


def _around(event: Any) -> tuple[str, ...]:
    """Its name and those of the operations that it is in, the innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(names)
