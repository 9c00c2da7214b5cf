"""How the head is run: one pure function from sizes and needs to a plan.

    score      nothing needs a gradient                     1 GEMM   one tile
    frozen     the head does not train                      2 GEMMs  one tile; d_hidden's direction from the forward
    pairwise   the head trains, pairs are independent       3 GEMMs  one tile + fp32 d_weight; the loss of a chunk of
                                                                     whole pairs gives their coefficients on the spot
    pending    as pairwise, one pair is longer than a tile  3 GEMMs  one tile + three fp32 d_weight: D^T hidden of the
                                                                     two sequences waits for their coefficients
    recompute  the loss couples pairs, or unknown; or       4 GEMMs  one tile, and an fp32 d_hidden where a 16-bit one
               where its GEMM takes less time than pending's         is returned; the backward goes slice by slice
               passes over d_weight, or these do not fit

On an accelerator sizes, dtype and the device's description decide, by predicted time (roofline.py).

A GEMM is one product over N x H x V: 2 N H V FLOPs. A tile is the only piece of the logits that ever exists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .roofline import PLAIN, Device, Work, head_seconds

GEMMS = {"score": 1, "frozen": 2, "pairwise": 3, "pending": 3, "recompute": 4}
# Rows of a tile on an accelerator, from which predicted time chooses: each chunk reads and writes d_weight once, and a
# GEMM's tiles have 128 or 256 rows, of which what is left over is wasted. More rows than needed are memory wasted.
TILE_ROWS, ROW_MULTIPLE, WORTHWHILE = (2048, 4096), 256, 0.99
MEMORY_SHARE = 32  # ... as far as they fit this share of the device's memory, whose size does not vary between passes
DEFAULT_TILE_MIB = 256  # on CPU, and the least elsewhere where nothing else is asked for
# Elements to which a tile's row stride is rounded up on an accelerator: 16 bytes let a GEMM use its fast loads, and a
# row of a line's length is read in whole lines
STRIDE_MULTIPLE = 64
# Rows and columns of a tile beyond which a GEMM gains nothing on CPU, where a tile of 8 MiB stays in a cache. For the
# plans that may go through the vocabulary slice by slice; the others take whole rows, of which 384 are nearly as good.
# Processor ms for `frozen` at N=H=1024, V=32,000 in fp32: 1453 with 1024 x 2048, 1499 with 1024 x 4096, 1462 with
# 1024 x 8192, 1469 with 512 x 4096, 1537 with 256 x 8192; 1722 with whole rows, 256 at a time.
_CPU_ROWS, CPU_COLUMNS, _CPU_WHOLE_ROWS = 1024, 2048, 384
_CPU_SLICE_BYTES = 64 << 20  # of a slice with all tokens in `recompute`'s backward


@dataclass(frozen=True)
class HeadPlan:
    """What the fused head will do. `flops` and `workspace_bytes` are counted, `seconds` predicted, nothing measured."""

    name: str
    chunk_rows: int  # tokens in a tile, forward
    chunk_columns: int  # vocabulary entries in a tile, forward: all of them, or on CPU a slice of an online softmax
    slice_columns: int  # vocabulary entries in a tile of `recompute`'s backward, which holds all tokens; V elsewhere
    gemms: int
    flops: int
    workspace_bytes: int  # beyond inputs, outputs and returned gradients
    reason: str
    seconds: float | None = None  # None on a CPU

    def describe(self) -> str:
        predicted = "" if self.seconds is None else f", {1e3 * self.seconds:.3g} ms predicted"
        return (
            f"{self.name}: {self.gemms} GEMMs, {self.flops / 1e12:.3g} TFLOP{predicted}, "
            f"tiles of {self.chunk_rows} tokens x {self.chunk_columns} entries, "
            f"{self.workspace_bytes / 2**20:.0f} MiB of work space ({self.reason})"
        )


@dataclass(frozen=True)
class _Case:
    """What a plan is chosen for."""

    N: int
    H: int
    V: int
    half: bool
    hidden_grad: bool
    head_grad: bool
    pair_lengths: Sequence[int]
    device: Device | None  # None: a CPU

    @property
    def logit_bytes(self) -> int:
        """fp32, and on an accelerator D as 16-bit GEMMs take it."""
        return 6 if self.half and self.device is not None else 4

    @property
    def thin(self) -> int:
        """Bytes of a token's d_hidden and W[y]."""
        return 2 * self.H * 4

    def rows_within(self, columns: int, budget: int) -> int:
        """Rows of a tile within the budget and, with what goes along with a row, within a tenth above it."""
        logits = self.logit_bytes * columns
        return max(1, min(budget // logits, budget * 11 // 10 // (logits + self.thin)))

    def work(self, rows: int, slice_columns: int) -> Work:
        needs = self.hidden_grad, self.head_grad
        return Work(self.N, self.H, self.V, self.half, rows, slice_columns, *needs, self.pair_lengths)

    def plan(self, name: str, rows: int, budget: int, reason: str) -> HeadPlan:
        """rows: of a tile as far as the plan leaves them; budget: bytes of a tile."""
        N, H, V, on_cpu = self.N, self.H, self.V, self.device is None
        if name == "pairwise":
            rows = max(rows, *self.pair_lengths, 1)
        columns = slice_columns = V
        if on_cpu and name in ("score", "frozen", "recompute"):
            columns = min(V, CPU_COLUMNS, budget // 4)
            rows = max(1, min(N, _CPU_ROWS, self.rows_within(columns, budget)))
        workspace = rows * (self.logit_bytes * columns + self.thin)
        if name == "recompute":
            slice_budget = min(budget, _CPU_SLICE_BYTES) if on_cpu else budget
            slice_columns = max(1, min(columns, slice_budget // (max(N, 1) * self.logit_bytes)))
            if not on_cpu and slice_columns < V:
                slice_columns = round_down(slice_columns)
            backward = slice_columns * N * self.logit_bytes
            if self.half and not on_cpu and self.head_grad:
                backward += slice_columns * H * 4  # a product, before it is rounded
            workspace = max(workspace, backward) + (N * H * 4 if self.hidden_grad and self.half else 0)
        gradient_is_work = 1 if self.half else 0  # an fp32 d_weight is itself what is returned
        workspace += V * H * 4 * {"pairwise": gradient_is_work, "pending": 2 + gradient_is_work}.get(name, 0)
        gemms = GEMMS[name]
        if self.head_grad and not self.hidden_grad and name != "score":
            gemms -= 1  # a frozen backbone: no d_hidden
        seconds = None if self.device is None else head_seconds(name, self.work(rows, slice_columns), self.device)
        return HeadPlan(name, rows, columns, slice_columns, gemms, gemms * 2 * N * H * V, workspace, reason, seconds)

    def bytes_given(self) -> int:
        """Hidden states and the weight."""
        return (2 if self.half else 4) * self.H * (self.N + self.V)

    def lacks(self, plan: HeadPlan) -> bool:
        memory = None if self.device is None else self.device.memory
        return memory is not None and self.bytes_given() + plan.workspace_bytes > memory


def plan_head(
    N: int,
    H: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    *,
    hidden_grad: bool = True,
    head_grad: bool = True,
    separable: bool = True,
    pair_lengths: Sequence[int] | None = None,
    sequences: int = 2,
    tile_mib: int | None = None,
    device_type: str = "cuda",
    device: Device | None = None,
) -> HeadPlan:
    """Choose the plan for N tokens, width H, vocabulary V.

    dtype: of hidden and weight; hidden_grad, head_grad: what needs gradients; separable: whether the loss is a sum over
    pairs, with coefficients known once a pair is scored; pair_lengths: tokens of each pair, None: any fits a tile.
    sequences: of the largest group, where comparisons connect more than pairs; pair_lengths are then of the groups.
    tile_mib: the budget for a tile in MiB, with the 16-bit copy that 16-bit GEMMs take; None: 256 MiB on CPU, 2,048 or
    4,096 rows elsewhere, what is predicted to be worthwhile, or fewer where the device's memory is short.
    device_type: "cuda" stands for any device with Triton, its interpreter on CPU tensors included; device: its
    description, None where it is not known.
    A tile has at least one row: with a row above the budget it is that much larger. On an accelerator the rows of all
    plans are the same for equal sizes, unless a pair is longer than a tile: policy and reference are scored by the same
    GEMMs. On CPU the plans that take whole rows have fewer of them.

    Raises MemoryError where what the plan needs is more than the device has.
    """
    if N < 0 or H < 1 or V < 1 or (tile_mib is not None and tile_mib < 1):
        raise ValueError(f"plan_head: sizes must be positive, got N={N}, H={H}, V={V}, tile_mib={tile_mib}")
    half, on_cpu = dtype in (torch.float16, torch.bfloat16), device_type == "cpu"
    where = None if on_cpu else device or PLAIN
    case = _Case(N, H, V, half, hidden_grad, head_grad, pair_lengths or (), where)
    if on_cpu or tile_mib is not None:
        budget = (DEFAULT_TILE_MIB if tile_mib is None else tile_mib) << 20
        longest = case.rows_within(V, budget)
        rows = max(1, min(N, _CPU_WHOLE_ROWS, longest)) if on_cpu else max(1, min(N, round_down(longest)))
    else:
        longest, rows, budget = _rows_of_tile(case)
    return _fitting(case, tile_mib, _candidates(case, separable, sequences, longest, rows, budget))


def _rows_of_tile(case: _Case) -> tuple[int, int, int]:
    """(rows of the longest pair that one tile may hold, rows of a tile, its bytes) on an accelerator. Whatever needs a
    gradient, rows are those that suit a head that trains: that one's d_weight is what they matter for."""
    assert case.device is not None
    row = case.logit_bytes * case.V + case.thin
    most = TILE_ROWS[-1]
    if case.device.memory is not None:
        allowed = max(case.device.memory // MEMORY_SHARE, DEFAULT_TILE_MIB << 20)
        most = min(most, case.rows_within(case.V, allowed))
    trains = replace(case, hidden_grad=True, head_grad=True, pair_lengths=())
    sizes = sorted({round_down(min(rows, most)) for rows in TILE_ROWS})
    seconds = {rows: head_seconds("pairwise", trains.work(rows, case.V), case.device) for rows in sizes}
    rows = next(rows for rows in sizes if min(seconds.values()) >= WORTHWHILE * seconds[rows])
    return most, max(1, min(case.N, rows)), rows * row


def _candidates(
    case: _Case, separable: bool, sequences: int, longest: int, rows: int, budget: int
) -> Iterator[HeadPlan]:
    """What may run, the best first. longest: pair that a tile may hold."""
    if not (case.hidden_grad or case.head_grad):
        yield case.plan("score", rows, budget, "no input needs a gradient")
        return
    if not case.head_grad:
        yield case.plan("frozen", rows, budget, "the head does not train")
        return
    if not separable:
        yield case.plan("recompute", rows, budget, "a token's coefficient is known only after all tokens are scored")
        return
    if not any(length > longest for length in case.pair_lengths):
        yield case.plan("pairwise", rows, budget, "the head trains and pairs are independent")
        yield case.plan("recompute", rows, budget, "the weight's gradient in fp32 does not fit the device")
        return
    why = f"the longest pair has {max(case.pair_lengths)} tokens, a tile {longest} rows"
    if sequences > 2:  # pending holds a d_weight of each sequence of a group
        yield case.plan("recompute", rows, budget, f"{why}, and groups of up to {sequences} sequences")
        return
    pending = case.plan("pending", rows, budget, why)
    recompute = case.plan("recompute", rows, budget, f"{why}; a fourth GEMM takes less than each one's d_weight")
    yield from (pending, recompute) if pending_pays(pending, recompute) else (recompute,)


def pending_pays(pending: HeadPlan, recompute: HeadPlan) -> bool:
    """Whether passes over a d_weight of each of a long pair's sequences take less time than another GEMM over all
    tokens. On a CPU always."""
    return pending.seconds is None or recompute.seconds is None or pending.seconds < recompute.seconds


def _fitting(case: _Case, tile_mib: int | None, candidates: Iterator[HeadPlan]) -> HeadPlan:
    """The first candidate for which the device has memory, were nothing else on it."""
    for plan in candidates:
        if not case.lacks(plan):
            return plan
    assert case.device is not None and case.device.memory is not None
    gib, advice = 2.0**30, "take fewer tokens at a time" if tile_mib is None else "a smaller tile_mib"
    if case.head_grad:
        advice += ", or let the head not train (freeze it, or LoRA without it)"
    raise MemoryError(
        f"the head for N={case.N} tokens, H={case.H}, V={case.V} needs {plan.workspace_bytes / gib:.3g} GiB of work "
        f"space beside {case.bytes_given() / gib:.3g} GiB of hidden states and weight; {case.device.name} has "
        f"{case.device.memory / gib:.3g} GiB: {advice}"
    )


def predicted(N: int, H: int, V: int, dtype: torch.dtype, device: Device) -> dict[str, dict[int, float]]:
    """Plan -> rows of a tile -> seconds on a device, for each candidate, whether there is memory for it or not. Pairs
    fit a tile, but pending's, of which there is one."""
    found: dict[str, dict[int, float]] = {}
    for name in GEMMS:
        needs = name != "score", name not in ("score", "frozen")
        case = _Case(N, H, V, dtype.itemsize == 2, *needs, (N,) if name == "pending" else (), device)
        plans = {rows: case.plan(name, rows, rows * (case.logit_bytes * V + case.thin), "") for rows in TILE_ROWS}
        found[name] = {rows: plan.seconds for rows, plan in plans.items() if plan.seconds is not None}
    return found


def oracle_plan(N: int, H: int, V: int, *, hidden_grad: bool, head_grad: bool) -> HeadPlan:
    """What impl="reference" runs: all logits, in fp64, and autograd through them."""
    gemms = 1 + hidden_grad + head_grad
    return HeadPlan("reference", N, V, V, gemms, gemms * 2 * N * H * V, 16 * N * V, "the oracle was asked for")


def round_down(count: int) -> int:
    """Rows or columns of a tile on an accelerator, down to whole tiles of its GEMMs as far as there are any."""
    multiple = next((m for m in (ROW_MULTIPLE, 64, 16) if count >= m), 1)
    return count - count % multiple


def row_stride(columns: int) -> int:
    """Elements from one row of a tile to the next on an accelerator."""
    return -(-columns // STRIDE_MULTIPLE) * STRIDE_MULTIPLE
