"""The one measuring function: providers take turns, so that noise of the machine hits all alike.

Times are of the wall and of the processor (all threads); on CUDA, of events on the device. Peak memory is what the
allocator held beyond what was there before, gradients included: on CPU from the profiler's record of allocations.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass
class Timing:
    wall_ms: list[float] = field(default_factory=list)
    processor_ms: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        out = {"rounds": len(self.wall_ms)}
        for name, values in (("wall", self.wall_ms), ("processor", self.processor_ms)):
            if values:
                out |= {f"{name}_median_ms": statistics.median(values), f"{name}_min_ms": min(values)}
                out[f"{name}_max_ms"] = max(values)
        return out


def interleaved(providers: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, Timing]:
    """Run each provider once a round, in turn; the warm-up rounds are not counted."""
    timings = {name: Timing() for name in providers}
    for turn in range(warmup + rounds):
        for name, run in providers.items():
            wall, processor = time_once(run)
            if turn >= warmup:
                timings[name].wall_ms.append(wall)
                if processor is not None:
                    timings[name].processor_ms.append(processor)
    return timings


def time_once(run: Callable[[], object]) -> tuple[float, float | None]:
    """(wall ms, processor ms); on CUDA (device ms, None)."""
    if torch.cuda.is_available():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), None
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return (time.perf_counter() - wall) * 1e3, (time.process_time() - processor) * 1e3


def peak_mib(run: Callable[[], object]) -> float:
    """Most memory held at once while `run` runs, beyond what was held before, in MiB."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    events = trace.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    return peak / 2**20


def ratios(times: Timing, base: Timing, clock: str | None = None) -> dict[str, float]:
    """times / base, round by round, so that the noise of a round hits both: median and range.

    Of the processor's time where there is one, else of the wall's; or of the `clock` that is named."""
    clock = clock or ("processor_ms" if times.processor_ms else "wall_ms")
    found = [a / b for a, b in zip(getattr(times, clock), getattr(base, clock), strict=True)]
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def random_logits(rows: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (rows, vocab) of standard deviation 4 and int64 labels (rows,), made where they are needed."""
    torch.manual_seed(0)
    return torch.randn(rows, vocab, device=device).mul_(4).to(dtype), torch.randint(vocab, (rows,), device=device)
