"""The README's measured figures, written from the committed results between its markers.

    python -m benchmarks.figures            # rewrites README.md
    python -m benchmarks.figures --check    # says how many figures come from how many files; status 1 where they differ

A block begins with `<!-- figures: NAME -->` and ends with `<!-- /figures -->`; NAME is a function below, and the line
after the marker names the files that it reads.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FOLDER = "benchmarks/results/cpu-x86_64"
BLOCK = re.compile(r"<!-- figures: (\w+) -->\n(.*?)<!-- /figures -->\n", re.DOTALL)
FIGURE = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w,]*\d)")


class Sources:
    """Reads results, and remembers which."""

    def __init__(self, root: Path = ROOT):
        self.root, self.read = root, {}

    def __call__(self, stem: str) -> dict:
        path = f"{FOLDER}/{stem}.json"
        if path not in self.read:
            self.read[path] = json.loads((self.root / path).read_text(encoding="utf-8"))
        return self.read[path]


# --- the blocks ------------------------------------------------------------------------------------------------------


def demo(result: Sources) -> str:
    found = result("demo")
    before, after = found["rows"]
    rows = [
        (f"opinions: probability of the preferred answer, mean of {found['opinions']} questions", "preferred"),
        ("opinions: probability of the rejected answer", "rejected"),
        (f"format: samples that are JSON, {found['held_out']} held-out questions x {found['samples']}", "json_sampled"),
        ("format: greedy answers that are JSON", "json_greedy"),
        ("content: greedy answers that are right", "right_greedy"),
    ]
    lines = ["| | before DPO | after DPO |", "|---|---|---|"]
    lines += [f"| {words} | {before[name]:.1%} | {after[name]:.1%} |" for words, name in rows]
    seconds = round(found["processor_s"], -1)
    lines += [
        "",
        f"(seed {found['seed']}, torch {torch_of(found)}, x86-64, {seconds:.0f} processor seconds; other CPUs round "
        "differently)",
    ]
    return "\n".join(lines)


def steps(result: Sources) -> str:
    lines = [
        "| what trains | TRL, head on every position | TRL, on completion tokens | `dpo_fast.trl` | `FastDPOTrainer` |",
        "|---|---|---|---|---|",
    ]
    apart = 0.0
    for mode, words in (("full", "all weights"), ("lora", "LoRA")):
        found = result(f"train-step-cpu-bar-chat-{mode}")
        trl, compact, drop_in, fast = (row_of(found, name) for name in ("trl", "trl-compact", *OURS))
        cells = [
            f"{row['processor_s']:.1f} s, {row['peak_mib'] / 1024:.1f} GiB" for row in (trl, compact, drop_in, fast)
        ]
        lines.append(f"| {words} | {' | '.join(cells)} |")
        faster = [times(row, "times_faster") for row in (compact, drop_in, fast)]
        lines.append(f"| times faster than the first column | 1 | {' | '.join(faster)} |")
        faster = [times(row, "times_faster_compact") for row in (drop_in, fast)]
        lines.append(f"| times faster than the second | | 1 | {' | '.join(faster)} |")
        apart = max(apart, *(found["differences"][name]["loss"] for name in OURS))
    lines += [
        "",
        f"Curves of the loss differ by {apart:.0e} at most (TRL {found['versions']['trl']}, torch {torch_of(found)}).",
    ]
    return "\n".join(lines)


def accuracy(result: Sources) -> str:
    found = result("accuracy")
    ours, trl = row_of(found, "ours"), row_of(found, "trl-1.16")
    return (
        f"For {found['N']:,} bf16 tokens (width {found['H']}, vocabulary {found['V']:,}, on a CPU) log-probs of tokens "
        f"are off by {ours['token_rms_error']:.1e} nats (rms, against fp64)\nand their sum by "
        f"{ours['sequence_error']:.1e}; TRL {found['versions']['trl']}'s, whose logits are rounded to bf16, by "
        f"{trl['token_rms_error']:.1e} and {trl['sequence_error']:.2f}."
    )


BLOCKS: dict[str, Callable[[Sources], str]] = {block.__name__: block for block in (demo, steps, accuracy)}
OURS = ("dpo_fast.trl", "FastDPOTrainer")


def row_of(result: dict, provider: str) -> dict:
    return next(row for row in result["rows"] if row["provider"] == provider)


def torch_of(result: dict) -> str:
    return result["versions"]["torch"].split("+")[0]


def times(row: dict, name: str) -> str:
    """Median of the ratios of single steps, with their range."""
    return f"{row[name]:.1f} ({row[f'{name}_min']:.1f} to {row[f'{name}_max']:.1f})"


# --- the README ------------------------------------------------------------------------------------------------------


def written(text: str, root: Path = ROOT) -> tuple[str, int, set[str]]:
    """(the README with its blocks written anew, how many figures they hold, the files that they come from)."""
    figures, files = 0, set()

    def block(match: re.Match) -> str:
        nonlocal figures
        sources = Sources(root)
        body = BLOCKS[match[1]](sources)
        figures += len(FIGURE.findall(body))
        files.update(sources.read)
        named = ", ".join(sorted(sources.read))
        return f"<!-- figures: {match[1]} -->\n<!-- {named} -->\n{body}\n<!-- /figures -->\n"

    return BLOCK.sub(block, text), figures, files


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.figures", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(argv).check
    text = README.read_text(encoding="utf-8")
    new, figures, files = written(text)
    print(f"{figures} figures from {len(files)} files: {', '.join(sorted(files))}")
    if new == text:
        return 0
    if check:
        print("README.md says something else: python -m benchmarks.figures")
        return 1
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
