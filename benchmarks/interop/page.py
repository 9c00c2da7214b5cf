"""docs/swap.md: its table from the committed results, its lines from the scripts that were run, between its markers.

A block begins with `<!-- interop: NAME -->` and ends with `<!-- /interop -->`; NAME is `table`, or a script's name.
"""

import json
import re
import textwrap
from pathlib import Path

from ..record import RESULTS
from .frameworks import FRAMEWORKS, Framework

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "swap.md"
BLOCK = re.compile(r"(<!-- interop: (\S+) -->\n).*?(<!-- /interop -->\n)", re.DOTALL)
SWAP = re.compile(r"# swap: before\n(.*?)# swap: after\n(.*?)# swap: end\n", re.DOTALL)
HEAD = (
    "| framework | lines to change | processor seconds, before -> after | peak memory, before -> after | "
    "largest difference | not covered |\n|---|---|---|---|---|---|"
)


def write() -> None:
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def written(text: str) -> str:
    """The page with its blocks written anew."""
    return BLOCK.sub(lambda found: found[1] + (table() if found[2] == "table" else lines(found[2])) + found[3], text)


def swap_of(script: str) -> tuple[str, str]:
    """The lines before and after, as the script runs them."""
    source = (Path(__file__).parent / f"{script}.py").read_text(encoding="utf-8")
    found = SWAP.findall(source)
    if not found:
        raise ValueError(f"{script}.py marks no lines: see task.py")
    sides = ([code(side) for side in sides] for sides in zip(*found, strict=True))
    before, after = ("\n".join(filter(None, side)) for side in sides)
    return before, after


def code(marked: str) -> str:
    """What stands between two marks, without the `else:` that lets one script be both, at the left margin."""
    kept = [line for line in marked.splitlines() if line.strip() != "else:"]
    return textwrap.dedent("\n".join(kept)).strip()


def lines(script: str) -> str:
    before, after = swap_of(script)
    return f"```python\n# before\n{before or '# (nothing)'}\n\n# after\n{after}\n```\n"


def changed(script: str) -> int:
    """Lines of code that the user writes: those after that were not there before."""
    before, after = (set(filter(is_code, side.splitlines())) for side in swap_of(script))
    return len(after - before)


def is_code(line: str) -> bool:
    return bool(line.strip()) and not line.strip().startswith("#")


def table() -> str:
    return "\n".join([HEAD, *map(row, FRAMEWORKS)]) + "\n"


def row(framework: Framework) -> str:
    title = f"{framework.title}"
    change = f"[{changed(framework.script)}](#{framework.heading.lower().replace(' ', '-')})"
    path = RESULTS / "interop" / f"{framework.name}.json"
    if framework.not_run or not path.exists():
        cells = [framework.not_run or "not measured yet", "", ""]
    else:
        cells = measured(framework, json.loads(path.read_text(encoding="utf-8")))
    return f"| {' | '.join([title, change, *cells, framework.beside])} |"


def measured(framework: Framework, result: dict) -> list[str]:
    from .run import LIMIT, ROUNDS

    before, after = result["before"], result["after"]
    faster, memory = result["faster"], result["memory"]
    rounds = "" if len(result["rounds"]) >= ROUNDS else f" ({len(result['rounds'])} round so far)"
    seconds = f"{before['processor_s']:.1f} -> {after['processor_s']:.1f}, {faster:.1f} times faster{rounds}"
    if framework.faster:
        seconds += bar(faster >= framework.faster, f">= {framework.faster:g}")
    peaks = f"{before['peak_mib'] / 1024:.2f} -> {after['peak_mib'] / 1024:.2f} GiB, {memory:.2f} of it"
    if framework.memory:
        peaks += bar(memory <= framework.memory, f"<= {framework.memory:g}")
    worst = max(result["differences"], key=result["differences"].get)
    apart = f"{result['differences'][worst]:.1e} ({worst})"
    if not result["differences"][worst] <= LIMIT:
        apart += f", **more than {LIMIT:.0e}**"
    return [seconds, peaks, apart]


def bar(met: bool, asked: str) -> str:
    return f" (asked: {asked}{'' if met else ', **not met**'})"
