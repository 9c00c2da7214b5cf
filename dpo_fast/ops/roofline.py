"""How long a plan of the head takes on an accelerator: FLOPs, bytes and launches, counted and divided by rates.

    a product      the longer of its FLOPs at the GEMM rate, with rows filled up to whole tiles, and its bytes
    a pass         its bytes at the copy bandwidth; so is what a product adds to memory of fp32, beside its FLOPs
    a launch       a constant

Predictions, which choose between plans and sizes of tiles. Two rates were measured, on one H200 (benchmarks/GPU.md):
GEMMs ran at 0.73 of what processors x clock give, copies at 0.875 of what the memory's clock x width give. Measured
there, too: d_weight, added to an fp32 matrix of V x H = 131,072 x 4,096, took 1.72, 2.40, 3.52 and 5.87 ms for 512,
1,024, 2,048 and 4,096 rows; the sum of FLOPs and bytes says 1.70, 2.40, 3.81 and 6.63, as if nothing overlapped.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

GEMM_SHARE, COPY_SHARE = 0.73, 0.875
LAUNCH = 2.5e-6  # seconds; arithmetic, not measured
GEMM_ROWS = 128  # of a GEMM's tile
CHUNK_LAUNCHES, LAUNCHES = 24, 60  # of a loss of pairs, on vectors of a few numbers (tests/ops/test_launches.py)

# FLOPs of dense products per processor and clock, with 16-bit and with fp32 operands, by architecture; the first is
# taken for one that is not here
_PER_CLOCK = {
    "cuda:9": (4096, 256),
    "cuda:10": (8192, 256),
    "cuda:12": (512, 256),
    "cuda:89": (512, 256),
    "cuda:86": (512, 256),
    "cuda:8": (2048, 128),
    "cuda:7": (1024, 128),
    "hip:gfx90a": (1024, 256),
    "hip:gfx94": (2048, 256),
    "hip:gfx95": (4096, 256),
}
_PLAIN_CLOCK, _PLAIN_BALANCE = 1.7e9, 180.0  # where torch knows no clocks: Hz; FLOPs in 16 bits per byte


@dataclass(frozen=True)
class Device:
    """What decides between plans. Rates are what large products and copies reach, not what a data sheet says."""

    name: str
    memory: int | None  # bytes; None where there is no telling
    processors: int
    gemm: float  # FLOP/s, operands of 16 bits
    gemm_fp32: float
    bandwidth: float  # bytes/s
    launch: float = LAUNCH

    @classmethod
    def of(
        cls, name: str, architecture: str, processors: int, memory: int, clock: float, memory_clock: float, bus: int
    ) -> "Device":
        """architecture: "cuda:90" or "hip:gfx942"; clocks: Hz, 0 where unknown; bus: bits of the memory's."""
        known = (rate for prefix, rate in _PER_CLOCK.items() if architecture.startswith(prefix))
        rates = next(known, _PER_CLOCK["cuda:9"])
        half, full = (GEMM_SHARE * rate * processors * (clock or _PLAIN_CLOCK) for rate in rates)
        bandwidth = COPY_SHARE * 2 * memory_clock * bus / 8
        return cls(name, memory, processors, half, full, bandwidth or half / _PLAIN_BALANCE)


# What torch says of them, without one at hand
H100 = Device.of("NVIDIA H100 80GB HBM3", "cuda:90", 132, 79 << 30, 1.98e9, 2.619e9, 5120)
H200 = Device.of("NVIDIA H200", "cuda:90", 132, 139 << 30, 1.98e9, 3.201e9, 6144)
DEVICES = {"h100": H100, "h200": H200}
PLAIN = replace(H200, name="an accelerator", memory=None)  # whose description is not known


@functools.cache
def describe_device(device: torch.device) -> Device | None:
    """An accelerator as torch knows it; None for a CPU."""
    if device.type == "mps":
        return replace(PLAIN, name="mps", memory=torch.mps.recommended_max_memory())
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return replace(PLAIN, name=xpu.name, memory=xpu.total_memory)
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    architecture = f"hip:{found.gcnArchName}" if torch.version.hip else f"cuda:{found.major}{found.minor}"
    # kHz and bits; older versions of torch have none of the three
    clock, memory_clock, bus = (getattr(found, x, 0) for x in ("clock_rate", "memory_clock_rate", "memory_bus_width"))
    size = found.multi_processor_count, found.total_memory
    return Device.of(found.name, architecture, *size, 1e3 * clock, 1e3 * memory_clock, bus)


@dataclass(frozen=True)
class Work:
    """One call of the head: its sizes, and the tile that a candidate takes."""

    N: int
    H: int
    V: int
    half: bool  # operands of 16 bits
    rows: int  # of a tile
    columns: int  # of a tile of recompute's backward
    hidden_grad: bool = True
    head_grad: bool = True
    pair_lengths: Sequence[int] = ()  # none: chunks are full

    @property
    def operand(self) -> int:
        """Bytes of an element of hidden, weight and D."""
        return 2 if self.half else 4

    def chunks(self, of_pairs: bool) -> list[int]:
        """Tokens in each; of_pairs: of whole pairs, as far as their lengths are known, a longer one alone."""
        if not of_pairs or not self.pair_lengths:
            return [min(self.rows, self.N - start) for start in range(0, self.N, self.rows)]
        found = [0]
        for length in self.pair_lengths:
            if found[-1] + length > self.rows and found[-1]:
                found.append(0)
            found[-1] += length
        return found

    def sequences_of_long_pairs(self) -> list[int]:
        """Tokens of each, taken to be half of the pair's."""
        return [length // 2 for length in self.pair_lengths if length > self.rows for _ in range(2)]


def head_seconds(plan: str, work: Work, device: Device) -> float:
    """What a plan takes, forward and backward, with a loss of pairs where it belongs to the plan."""
    clock, trains = _Clock(work, device), plan in ("pairwise", "pending")
    clock.chunks(plan, [rows for rows in work.chunks(trains) if rows <= work.rows])
    if plan == "recompute":
        for start in range(0, work.V, work.columns):
            clock.slice(min(work.columns, work.V - start))
    if plan == "pending":
        for tokens in work.sequences_of_long_pairs():
            clock.chunks(plan, [min(work.rows, tokens - start) for start in range(0, tokens, work.rows)])
            clock.copy(12 * work.V * work.H)  # added to the whole
    if plan in ("frozen", "pairwise", "pending") and work.hidden_grad:
        clock.copy((4 + work.operand) * work.N * work.H)
    if trains:
        clock.copy((4 + work.operand) * work.V * work.H)
        clock.launches(LAUNCHES)
    return clock.seconds


class _Clock:
    def __init__(self, work: Work, device: Device):
        self.work, self.device, self.seconds = work, device, 0.0
        self.rate = device.gemm if work.half else device.gemm_fp32

    def launches(self, count: int) -> None:
        self.seconds += count * self.device.launch

    def copy(self, size: float) -> None:
        self.seconds += size / self.device.bandwidth + self.device.launch

    def product(self, m: int, k: int, n: int, size: float) -> None:
        """(m, k) x (k, n) of which `size` bytes are read and written."""
        whole = -(-m // GEMM_ROWS) * GEMM_ROWS
        self.seconds += max(2 * whole * k * n / self.rate, size / self.device.bandwidth) + self.device.launch

    def logits(self, rows: int, columns: int) -> None:
        work = self.work
        self.product(rows, work.H, columns, 4 * rows * columns + work.operand * columns * work.H)

    def score(self, rows: int) -> None:
        self.logits(rows, self.work.V)
        self.copy(4 * rows * self.work.V)

    def directions(self, rows: int, columns: int) -> None:
        """The pass that makes D, and d_left."""
        work = self.work
        self.copy((4 + work.operand) * rows * columns)
        if work.hidden_grad:
            self.product(rows, columns, work.H, work.operand * columns * (rows + work.H))

    def d_right(self, rows: int, columns: int, added: int) -> None:
        """added: bytes an entry of fp32 memory that the product reads and writes."""
        work = self.work
        self.product(columns, -(-rows // GEMM_ROWS) * GEMM_ROWS, work.H, work.operand * rows * columns)
        self.copy(added * columns * work.H)

    def chunks(self, plan: str, sizes: Sequence[int]) -> None:
        for index, rows in enumerate(sizes):
            self.score(rows)
            if plan in ("score", "recompute"):
                continue
            self.directions(rows, self.work.V)
            if plan != "frozen":
                self.launches(CHUNK_LAUNCHES)
                self.copy(2 * self.work.operand * rows * self.work.H)  # rows of ignored tokens
                self.d_right(rows, self.work.V, 8 if index else 4)

    def slice(self, columns: int) -> None:
        work = self.work
        self.logits(work.N, columns)
        self.directions(work.N, columns)
        if work.hidden_grad:
            self.copy(8 * work.N * work.H)
        if work.head_grad:
            self.d_right(work.N, columns, 8 + work.operand if work.half else 4)
