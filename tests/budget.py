"""Run a command and print the processor time of it and all its children next to a budget, in minutes.

    python tests/budget.py 10 python -m pytest -q

The exit status is the command's: a slower processor is no failure.
"""

import resource
import subprocess
import sys


def main(argv: list[str]) -> int:
    budget = float(argv[0])
    status = subprocess.run(argv[1:]).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    minutes = (used.ru_utime + used.ru_stime) / 60
    verdict = "" if minutes <= budget else ": OVER THE BUDGET, mark what is slow (pytest --durations=30 finds it)"
    print(f"processor time: {minutes:.1f} of {budget:g} minutes{verdict}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
