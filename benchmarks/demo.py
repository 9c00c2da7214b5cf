"""What `make demo` shows, in numbers: answers before and after DPO, and the processor seconds that it took.

python -m benchmarks.demo
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from dpo_fast.demo import story

from .record import Record, add_arguments, table


def measure(settings: story.Settings) -> dict:
    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        results = story.run(Path(folder), settings)
    seconds = time.process_time() - started
    form = results["format"]
    questions = [asked for asked in results["opinions"]["questions"] if asked["agreement"] is not None]  # with pairs
    rows = []
    for when in ("before", "after"):
        rows.append(
            {
                "when": when,
                "preferred": statistics.fmean(question[when] for question in questions),
                "rejected": statistics.fmean(question[f"other_{when}"] for question in questions),
                "json_sampled": form[when]["sampled"],
                "json_greedy": form[when]["greedy"],
                "right_greedy": form[when]["right_greedy"],
            }
        )
    return {
        "seed": settings.seed,
        "opinions": len(questions),
        "held_out": form["questions"],
        "samples": settings.samples,
        "processor_s": seconds,
        "rows": rows,
        "claims": results["claims"],
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.demo", description=__doc__.splitlines()[0])
    add_arguments(parser)
    argv = sys.argv[1:] if argv is None else argv
    record = Record.of("demo", argv, parser.parse_args(argv), parser)
    result = measure(story.Settings())
    print(table(result["rows"], list(result["rows"][0])))
    record.save("demo", result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
