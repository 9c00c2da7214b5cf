"""The one measuring function: providers take turns, so that noise of the machine hits all alike.

Times are of the wall and of the processor (all threads); on CUDA, of events on the device. Peak memory is what the
allocator held beyond what was there before, gradients included: on CPU from the profiler's record of allocations.
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


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


def stamp() -> dict:
    """Where and with what a result was measured."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent
    )
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "accelerate", "peft", "trl", "liger_kernel", "cut_cross_entropy"):
        try:
            versions[name] = __import__("importlib.metadata", fromlist=["version"]).version(name)
        except ModuleNotFoundError:
            versions[name] = None
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().replace(" ", "-").lower()
    return f"cpu-{platform.machine()}"


def save(name: str, result: dict, folder: Path = RESULTS) -> Path:
    """Write `result` with its stamp to <folder>/<device>/<name>.json, whole or not at all."""
    path = folder / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({**stamp(), **result}, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)
    return path


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as aligned text; floats with four digits."""

    def text(value) -> str:
        return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    cells = [columns, *([text(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
