"""Which code a result was measured with, and whether that code is still what is checked out. Judged by git.

    python -m benchmarks.provenance          # the commit that results would carry now; status 1 where they may not

A result carries the commit of its code. It is too old once a file of that code differs from the commit: any difference
counts, a comment too. What draws, stores or judges a result is not part of what it measures.
"""

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
GIVEN = "DPO_FAST_COMMIT"  # the commit, where a checkout travels without its repository

_MEASURE = "benchmarks/measure.py"
_HEAD = ("kernels", "dpo_fast/ops", "dpo_fast/preference.py", "dpo_fast/objective.py", "dpo_fast/losses.py")
_HEAD += ("dpo_fast/comparisons.py", "dpo_fast/logps.py", "dpo_fast/terms.py", "benchmarks/head_providers.py", _MEASURE)
_NOT_IN_A_STEP = ("demo", "data", "report", "cli.py", "env.py", "selftest.py", "testing.py", "text.py")
_AROUND_A_STEP = (
    "launch",
    "recipe",
    "written",
    "keys",
    "settings",
    "aliases",
    "preflight",
    "sources",
    "outcome",
    "facts",
    "card",
    "checkpoints",
    "folder",
)
_NOT_IN_A_STEP += tuple(f"training/{name}.py" for name in _AROUND_A_STEP)


def _package_but(*names: str) -> tuple[str, ...]:
    return ("kernels", "dpo_fast", *(f":(exclude)dpo_fast/{name}" for name in names))


# benchmark -> git's paths of the code that it measures
CODE = {
    "level1": (
        *(f"kernels/{name}.py" for name in ("token_logps", "numerics", "tuned")),
        *(
            f"dpo_fast/ops/{name}.py"
            for name in "call plan roofline logits softmax impl_torch dispatch checks stats oracle".split()
        ),
        "benchmarks/level1.py",
        _MEASURE,
    ),
    "head": (*_HEAD, "benchmarks/head.py"),
    "accuracy": (*_HEAD, "benchmarks/accuracy.py"),
    "train_step": (
        *_package_but(*_NOT_IN_A_STEP),
        *(f"benchmarks/train_step/{name}.py" for name in ("run", "inputs", "worker", "profile")),
    ),
    "demo": (*_package_but(*(name for name in _NOT_IN_A_STEP if name not in ("demo", "data"))), "benchmarks/demo.py"),
    "interop": (*_package_but(*_NOT_IN_A_STEP), "benchmarks/interop", "benchmarks/train_step/inputs.py"),
    "gemm": ("benchmarks/gemm.py", _MEASURE),
    "attention": (
        *(
            f"dpo_fast/{name}.py"
            for name in (
                "attention",
                "flash",
                "flex",
                "scores",
                "block_mask",
                "layout",
                "batch",
                "transfer",
                "comparisons",
                "ops/checks",
            )
        ),
        "benchmarks/attention.py",
        _MEASURE,
    ),
    "host": (
        *(f"dpo_fast/{name}.py" for name in ("batch", "layout", "transfer", "trl_rows", "comparisons", "ops/checks")),
        "benchmarks/host.py",
        _MEASURE,
    ),
    "sweep": ("kernels", "benchmarks/sweep.py", _MEASURE),
    "gpu": ("kernels", "dpo_fast", "tests/kernels", "tests/support", "tests/test_attention.py"),  # of its tests
}


class NoHistory(Exception):
    """No git, or no repository: nobody knows which code this is."""


def benchmark_of(stem: str) -> str | None:
    """The benchmark that writes <stem>.json: "head-growth-cpu-bar" is of `head`."""
    return next((name for name in CODE if stem.replace("-", "_").startswith(name)), None)


def commit_of(paths: tuple[str, ...], root: Path = ROOT) -> str:
    """The checked-out commit, with "-dirty" where `paths` have uncommitted changes; raises NoHistory."""
    try:
        head = _git(root, "rev-parse", "--verify", "HEAD").strip()
        return f"{head}-dirty" if uncommitted(paths, root) else head
    except NoHistory as reason:
        given = os.environ.get(GIVEN)
        if given is None:
            raise
        if not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", given):
            raise NoHistory(f"{GIVEN} must be a commit in hexadecimal digits, got {given!r}") from reason
        return given


def checked_out() -> str:
    """The commit that results of all benchmarks would carry now; raises NoHistory."""
    return commit_of(tuple(dict.fromkeys(path for paths in CODE.values() for path in paths)))


def uncommitted(paths: tuple[str, ...], root: Path = ROOT) -> list[str]:
    """Files among `paths` that are changed or new."""
    lines = _git(root, "status", "--porcelain", "--untracked-files=all", "--", *paths).splitlines()
    return [line[3:] for line in lines]


def top_of(folder: Path) -> Path:
    """The top of the repository that holds `folder`; this checkout's where there is none."""
    try:
        return Path(_git(folder if folder.is_dir() else ROOT, "rev-parse", "--show-toplevel").strip())
    except NoHistory:
        return ROOT


def reason_against(commit: str | None, paths: tuple[str, ...], root: Path = ROOT) -> str | None:
    """Why what was measured at `commit` does not tell about the code checked out at `root`; None if it does."""
    if not commit:
        return "carries no commit"
    if commit.endswith("-dirty"):
        return f"measured with uncommitted changes ({commit})"
    short = commit[:12]
    try:
        shallow = _git(root, "rev-parse", "--is-shallow-repository").strip() == "true"
        if not _says_yes(root, "cat-file", "-e", f"{commit}^{{commit}}"):
            more = ", which is shallow (git fetch --unshallow)" if shallow else ""
            return f"measured at {short}, a commit that is unknown in this repository{more}"
        if not _says_yes(root, "merge-base", "--is-ancestor", commit, "HEAD"):
            return f"measured at {short}, which is not an ancestor of what is checked out"
        changed = _git(root, "diff", "--name-only", "--no-renames", commit, "HEAD", "--", *paths).splitlines()
        if changed:
            return f"older than the code: since {short} changed {_listed(changed)}"
        changed = uncommitted(paths, root)
        if changed:
            return f"older than the code: uncommitted changes in {_listed(changed)}"
    except NoHistory as reason:
        return f"its age cannot be judged: {reason}"
    return None


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _run(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise NoHistory("git is not installed") from None


def _git(root: Path, *arguments: str) -> str:
    found = _run(root, *arguments)
    if found.returncode:
        raise NoHistory((found.stderr.strip().splitlines() or [f"git {arguments[0]} failed"])[0])
    return found.stdout


def _says_yes(root: Path, *arguments: str) -> bool:
    return _run(root, *arguments).returncode == 0


def main() -> int:
    try:
        commit = checked_out()
    except NoHistory as reason:
        print(f"no commit: {reason}; name it in {GIVEN}")
        return 1
    print(commit)
    return int(commit.endswith("-dirty"))


if __name__ == "__main__":
    raise SystemExit(main())
