"""What the machine code of each kernel uses on GPUs that need not be here, and what bounds it by that.

python -m benchmarks.static                    # compile, count, print; writes static.json and STATIC.md
python -m benchmarks.static --target cuda:90 --no-save

Counts are facts of one version of the compiler; tests/kernels/test_aot.py holds later code to them. Times are
predicted, for a GPU that reaches its data sheet's clock and 0.9 of its bandwidth (a copy on an H200: 4.3 of 4.8 TB/s).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import triton

ROOT = Path(__file__).parents[1]
COMMITTED, PAGE = Path(__file__).with_name("static.json"), Path(__file__).with_name("STATIC.md")
COUNTED = ("instructions", "registers", "spills", "load_bytes", "loads_in_flight", "shared")
MORE_IS_BETTER = ("load_bytes", "loads_in_flight")


class Device(NamedTuple):
    """From data sheets."""

    target: str
    processors: int  # SMs or CUs
    ghz: float
    tb_per_s: float
    lanes: int = 128  # threads that issue an instruction, per processor and clock
    exponentials: int = 16  # per processor and clock
    registers: int = 65_536  # 32-bit, of a processor
    threads: int = 2048
    shared_kib: int = 228
    warp: int = 32


DEVICES = {
    "A100": Device("cuda:80", 108, 1.41, 2.04, shared_kib=164),
    "H100": Device("cuda:90", 132, 1.98, 3.35),
    "H200": Device("cuda:90", 132, 1.98, 4.8),
    "B200": Device("cuda:100", 148, 1.96, 8.0),
    "RTX 5090": Device("cuda:120", 170, 2.41, 1.79, threads=1536, shared_kib=100),
    "MI300X": Device("hip:gfx942", 304, 2.1, 5.3, lanes=64, registers=131_072, shared_kib=64, warp=64),
}
TARGETS = tuple(dict.fromkeys(device.target for device in DEVICES.values()))


def counted(target: str) -> list[dict]:
    """What tests/aot_compile.py reports; raises CalledProcessError with what the compiler said."""
    script = [sys.executable, str(ROOT / "tests/aot_compile.py"), target]
    run = subprocess.run(script, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def occupancy(report: dict, device: Device) -> float:
    """Share of the threads that a processor can hold: as many programs as registers and shared memory allow."""
    each = -(-report["registers"] // 8) * 8 * report["threads"]
    programs = min(device.registers // each, device.threads // report["threads"])
    if report["shared"]:
        programs = min(programs, device.shared_kib * 1024 // report["shared"])
    return programs * report["threads"] / device.threads


def predicted(report: dict, device: Device) -> tuple[float, str]:
    """Microseconds of a million logits, and what takes that long."""
    clocks = 1e6 / (device.processors * device.ghz * 1e3)  # microseconds, one logit per processor and clock
    parts = {
        "instructions": report["instructions"] / device.lanes * clocks,
        "exponentials": report["exponentials"] / device.exponentials * clocks,
        "memory": report["bytes"] / (0.9 * device.tb_per_s),
    }
    bound = max(parts, key=parts.get)
    return parts[bound], bound


def worse(found: list[dict], committed: list[dict]) -> list[str]:
    """A sentence for each counted figure that got worse, and for each kernel that only one of the two knows."""
    before, after = ({(r["target"], r["kernel"]): r for r in reports} for reports in (committed, found))
    lines = [f"{' '.join(name)}: not in both" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        for figure in COUNTED:
            was, now = before[name][figure], after[name][figure]
            if (now < was) if figure in MORE_IS_BETTER else (now > was):
                lines.append(f"{' '.join(name)}: {figure} {was} -> {now}")
    return sorted(lines)


COLUMNS = ["kernel", "instructions", "flops", "bytes", "registers", "spills", "shared", "load_bytes"]
COLUMNS += ["loads_in_flight", "tensor_core"]


def page(reports: list[dict], version: str) -> str:
    lines = [
        "# What the kernels' machine code uses",
        "",
        f"Written by `python -m benchmarks.static`, with Triton {version}; nothing of it was measured on a GPU.",
        "",
        "- per logit: instructions and flops, in the part of the program that each logit passes; bytes of memory",
        "- per thread: registers, spills, the width of its usual load in bytes, and how many of these it begins before",
        "  its first exponential",
        "- per program: shared memory in bytes, instructions of tensor cores",
        "- predicted: microseconds per million logits, and what bounds them: issue of instructions, exponentials or",
        "  memory, at the data sheet's clock and 0.9 of its bandwidth",
    ]
    for target in TARGETS:
        devices = {name: device for name, device in DEVICES.items() if device.target == target}
        rows = [_row(report, devices) for report in reports if report["target"] == target]
        if rows:
            lines += ["", f"## {target}", "", *_markdown(rows)]
    return "\n".join(lines) + "\n"


def _row(report: dict, devices: dict[str, Device]) -> dict:
    row = {name: report[name] for name in COLUMNS}
    row["occupancy"] = f"{occupancy(report, next(iter(devices.values()))):.0%}"
    for name, device in devices.items():
        if report["exponentials"]:  # sums over sequences have no logits
            row[f"{name}, predicted"] = "{:.2f} {}".format(*predicted(report, device))
    return row


def _markdown(rows: list[dict]) -> list[str]:
    names = list(rows[0])
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", f"|{'---|' * len(names)}"]
    return lines + [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows]


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.static", description=__doc__.splitlines()[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--no-save", action="store_true", help="print only")
    a = parser.parse_args(argv)
    reports = [report for target in a.target for report in counted(target)]
    print(page(reports, triton.__version__))
    if not a.no_save:
        if set(a.target) != set(TARGETS):
            parser.error("the table that is kept holds every target: leave --target out, or add --no-save")
        kept = {"triton": triton.__version__, "reports": reports}
        COMMITTED.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(reports, triton.__version__), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
