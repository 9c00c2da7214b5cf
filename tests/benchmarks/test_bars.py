"""`dpo-fast bench bars`: what is missed, old, dirty or missing is status 1, and says how to measure anew."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", "-C", root, *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository with some of the measured code, and a folder for a GPU's results."""
    from benchmarks import bars

    (tmp_path / "kernels").mkdir()
    for name in ("kernels/token_logps.py", "README.md"):
        (tmp_path / name).write_text("as measured\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "code")
    (tmp_path / "results" / "gpu").mkdir(parents=True)
    monkeypatch.setattr(bars, "GPU_BARS", tuple(bars.level1_bars()))
    return tmp_path


def level1(root: Path, forward: float = 0.93, both: float = 0.86, **changes) -> None:
    rows = [
        {"case": f"ours, {case}", "share_of_copy": share, "share_min": share - 0.01, "share_max": share + 0.01}
        for case, share in (("forward", forward), ("forward + backward", both))
    ]
    stamp = {"commit": git(root, "rev-parse", "HEAD").strip(), "command": "python -m benchmarks.level1 --rounds 9"}
    path = root / "results" / "gpu" / "level1.json"
    path.write_text(json.dumps({**stamp, "N": 8192, "V": 131_072, "complete": True, "rows": rows, **changes}))


def run(root: Path, capsys) -> tuple[int, str]:
    from benchmarks import bars

    status = bars.main(["--folder", str(root / "results" / "gpu")])
    return status, capsys.readouterr().out


def verdicts(out: str) -> list[str]:
    return [word for line in out.splitlines() for word in line.split("  ") if word.strip() in ("yes", "NO", "old")]


def test_all_met_by_the_code_that_is_checked_out(repository, capsys):
    level1(repository)
    status, out = run(repository, capsys)
    assert status == 0 and "YES: 2 bars, 2 met" in out and "0.92..0.94" in out


def test_a_missed_bar(repository, capsys):
    level1(repository, both=0.80)  # as of a kernel made slower
    status, out = run(repository, capsys)
    assert status == 1 and "NO: 2 bars, 1 met, 1 missed" in out
    assert "missed: level 1, forward + backward: share of the copy bandwidth is 0.8, asked >= 0.85" in out


def test_a_number_that_is_not_one_is_no_success(repository, capsys):
    level1(repository, both=float("nan"))
    assert run(repository, capsys)[0] == 1


@pytest.mark.parametrize("committed", [True, False])
def test_a_result_older_than_its_code(repository, capsys, committed):
    level1(repository)
    (repository / "kernels" / "token_logps.py").write_text("as measured\n# only a comment\n")
    if committed:
        git(repository, "commit", "-qam", "comment")
    status, out = run(repository, capsys)
    since = "since" if committed else "uncommitted changes in kernels/token_logps.py"
    assert status == 1 and "level1.json older than the code" in out and since in out
    assert "measure anew: python -m benchmarks.level1 --rounds 9" in out
    assert "0 met" in out and "2 measured with other code" in out


def test_code_that_is_new_counts_too(repository, capsys):
    level1(repository)
    (repository / "kernels" / "numerics.py").write_text("new\n")
    assert "uncommitted changes in kernels/numerics.py" in run(repository, capsys)[1]


def test_what_is_not_measured_may_change(repository, capsys):
    level1(repository)
    (repository / "README.md").write_text("rewritten\n")
    git(repository, "commit", "-qam", "words")
    assert run(repository, capsys)[0] == 0


@pytest.mark.parametrize(
    "commit, said",
    [
        (None, "carries no commit"),
        ("0123456789ab-dirty", "measured with uncommitted changes (0123456789ab-dirty)"),
        ("0123456789ab", "a commit that is unknown in this repository"),
    ],
)
def test_a_result_of_no_commit_that_can_be_checked_out(repository, capsys, commit, said):
    level1(repository, commit=commit)
    status, out = run(repository, capsys)
    assert status == 1 and said in out and "measure anew:" in out and "2 measured with other code" in out


def test_a_result_of_another_branch(repository, capsys):
    branch = git(repository, "branch", "--show-current").strip()
    git(repository, "switch", "-qc", "other")
    (repository / "kernels" / "token_logps.py").write_text("elsewhere\n")
    git(repository, "commit", "-qam", "other")
    level1(repository)
    git(repository, "switch", "-q", branch)
    status, out = run(repository, capsys)
    assert status == 1 and "is not an ancestor of what is checked out" in out


def test_without_a_repository_no_age_is_judged(repository, capsys, monkeypatch):
    level1(repository)
    from benchmarks import bars

    (repository / ".git").rename(repository / "git")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(repository.parent))
    monkeypatch.setattr(bars, "top_of", lambda folder: repository)
    status, out = run(repository, capsys)
    assert status == 1 and "its age cannot be judged: fatal: not a git repository" in out


def test_without_git_no_age_is_judged(repository, capsys, monkeypatch):
    level1(repository)
    monkeypatch.setenv("PATH", str(repository))
    status, out = run(repository, capsys)
    assert status == 1 and "its age cannot be judged: git is not installed" in out


def test_missing_results_are_named(repository, capsys):
    status, out = run(repository, capsys)
    assert status == 1 and "level1.json does not exist\n  measure anew: python -m benchmarks.level1" in out
    level1(repository, rows=[])
    status, out = run(repository, capsys)
    assert status == 1 and "level1.json has no 'row of ours, forward'\n  measure anew" in out
    level1(repository, N=16)  # smaller than what is asked about
    status, out = run(repository, capsys)
    assert status == 1 and "level1.json has no 'result of N=8192, V=131072'\n  measure anew" in out
    level1(repository, complete=False)
    status, out = run(repository, capsys)
    assert status == 1 and "level1.json stopped before its end" in out and "2 met" in out


def head_result(**times) -> dict:
    """A head result in which each provider takes that many times as long as ours, in all modes."""
    rows = []
    for mode, ours in (("score", "ours"), ("frozen", "ours"), ("trained", "ours-fused")):
        for provider, time in {ours: 1.0, **times}.items():
            ratio = {"to_ours": time, "to_ours_min": time, "to_ours_max": time}
            floor = {"to_floor": time, "to_floor_min": time, "to_floor_max": time}
            memory = 1.0 if provider == ours else 9.0
            rows.append({"mode": mode, "provider": provider, "beyond_gradients_mib": memory, **ratio, **floor})
    return {"rows": rows}


def test_a_bar_that_replaces_another_says_so_and_can_be_missed():
    from benchmarks import bars

    bar = next(b for b in bars.CPU_BARS if b.what == "head, trained: cut-cross-entropy's time / ours")
    row = bars.verdict(bar, head_result(**{"cut-cross-entropy": 0.994}), False)
    assert (row["met"], row["asked first"]) == ("yes", "1: missed")
    assert bars.verdict(bar, head_result(**{"cut-cross-entropy": 1.01}), False)["asked first"] == "1: held"
    assert bars.verdict(bar, head_result(**{"cut-cross-entropy": 0.8}), False)["met"] == "NO"  # ours made slower
    names = {bar.what for bar in bars.CPU_BARS}
    assert bars.FIRST.keys() <= names and len(names) == len(bars.CPU_BARS)


def test_the_bars_of_a_gpu_find_their_numbers_in_its_files():
    from benchmarks import bars

    times = {"wall_median_ms": 30.0, "wall_min_ms": 29.0, "wall_max_ms": 31.0, "beyond_gradients_mib": 3000.0}
    of_head = head_result()
    for row in of_head["rows"]:
        row.update(times)
    found = [bars.verdict(bar, of_head, False) for bar in bars.GPU_BARS if bar.stem.startswith("head")]
    met = {row["what"]: row["met"] for row in found}
    assert len(met) == 10 and set(met.values()) == {"yes", "NO"}
    assert met["head, frozen: ms"] == "NO" and met["head, trained: ms"] == "yes"
    assert met["head, frozen: MiB beyond gradients"] == "NO" and met["head, trained: MiB beyond gradients"] == "yes"
    assert met["head, trained: ms, 2,048 tokens of a 1B-shaped model"] == "NO"


def test_each_bar_has_a_command_and_each_benchmark_its_code():
    from benchmarks import bars, provenance

    assert {bar.stem for bar in (*bars.CPU_BARS, *bars.GPU_BARS)} == bars.COMMANDS.keys()
    assert {stem: provenance.benchmark_of(stem) for stem in bars.COMMANDS} == {
        stem: command.split()[2].removeprefix("benchmarks.") for stem, command in bars.COMMANDS.items()
    }
    if (ROOT / ".git").exists():
        for paths in provenance.CODE.values():
            for path in paths:
                assert path.startswith(":(exclude)") or git(ROOT, "ls-files", "--", path), path


def imported(module: str) -> set[str]:
    """Modules of this checkout that `module` imports anywhere in its text; names of dpo_fast by where they are made."""
    import dpo_fast

    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            package = module.rsplit(".", node.level)[0].split(".") if node.level else []
            source = ".".join([*package, *([node.module] if node.module else [])])
            for alias in node.names:
                if source == "dpo_fast" and alias.name in dpo_fast.__all__:
                    found.add(getattr(dpo_fast, alias.name).__module__)
                found |= {source, f"{source}.{alias.name}"}
    return {name for name in found if (ROOT / f"{name.replace('.', '/')}.py").is_file()}


@pytest.mark.parametrize("name", ["head", "level1", "accuracy", "attention", "sweep", "gemm"])
def test_no_code_that_runs_is_left_out(name):
    """What a benchmark imports, and what that imports, is among the code whose change makes its results old."""
    from benchmarks import provenance

    judges = {f"benchmarks.{other}" for other in ("record", "provenance", "head_gate", "head_plot")}
    judges.add("dpo_fast.testing")
    seen, todo = set(), [f"benchmarks.{name}"]
    while todo:
        module = todo.pop()
        if module not in seen | judges:
            seen.add(module)
            todo += imported(module)
    files = {module.replace("dpo_fast.kernels", "kernels").replace(".", "/") + ".py" for module in seen}
    code = provenance.CODE[name]
    assert {f for f in files if not any(f == c or f.startswith(f"{c}/") for c in code)} == set()
    assert len(files) > 1
