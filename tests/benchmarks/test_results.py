"""Benchmarks measure what they say, refuse wrong results, and run from the root; no time decides anything here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


STAGES = ("tests", "memcheck", "train_step", "gemm", "head", "level1", "attention", "sweep")


def gpu(*words: str, python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": str(python), **environment}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_gpu_dry_run():
    run = gpu("--dry-run", "--minutes", "60")  # no time decides anything
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "all stages done" in run.stdout
    for stage in STAGES:
        assert f"== {stage}: done in" in run.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_gpu_notices_a_stage_that_fails(stage):
    run = gpu("--dry-run", "--only", stage, "--fail", stage)
    assert run.returncode == 1 and "this failure was asked for" in run.stderr
    assert f"== {stage}: FAILED (exit status 1)" in run.stdout and f"failed: {stage} (after" in run.stdout


@pytest.fixture
def stand_in(tmp_path):
    """A Python that sees a GPU and a commit, and prints its arguments; it waits in stages named in SLOW."""
    script = tmp_path / "python"
    script.write_text(
        """#!/usr/bin/env bash
        case "$*" in
            *is_available*) exit 0 ;;
            *benchmarks.provenance*) echo 0123456789ab ;;
            *benchmarks.bars* | *"asked for"*) exit 1 ;;
            *) echo "ran $*"; [ -n "${SLOW:-}" ] && [[ $* == *$SLOW* ]] && exec sleep 60 ;;
        esac
        exit 0
        """.replace("        ", "", 1)
    )
    script.chmod(0o755)
    return script


def limits(out: str) -> dict[str, int]:
    """Seconds that each stage got, in the order in which they began."""
    return {name: int(seconds) for name, seconds in re.findall(r"^== (\w+): (\d+) s at most$", out, re.MULTILINE)}


def test_gpu_runs_correctness_then_a_step_then_its_parts(stand_in):
    run = gpu("--minutes", "10", python=stand_in)
    assert run.returncode == 0, run.stdout + run.stderr
    assert [name for name in limits(run.stdout) if name != "memcheck"] == [s for s in STAGES if s != "memcheck"]
    assert "measuring commit 0123456789ab" in run.stdout and "== bars: says no (status 1)" in run.stdout


def test_gpu_goes_on_after_a_stage_that_fails(stand_in):
    run = gpu("--only", "gemm,head", "--fail", "gemm", python=stand_in)
    assert run.returncode == 1 and "failed: gemm (after" in run.stdout and "== head: done in" in run.stdout


def test_gpu_stops_a_stage_at_its_share_and_passes_on_what_is_left(stand_in):
    run = gpu("--minutes", "0.15", "--only", "train_step,head,sweep", python=stand_in, SLOW="train_step")
    assert run.returncode == 1 and "failed: train_step (after" in run.stdout
    assert "ran -m benchmarks.train_step" in run.stdout  # what it printed before it was stopped
    assert "== train_step: its time is up" in run.stdout and "== head: done in" in run.stdout
    found = limits(run.stdout)
    assert found["train_step"] == 9 * 28 // (28 + 16 + 8) and 1 < found["sweep"] <= 9 - found["train_step"]


@pytest.mark.parametrize(
    "words, said",
    [
        (["--fast"], "unknown argument '--fast'"),
        (["--minutes", "ten"], "--minutes takes a number, got 'ten'"),
        (["--only", "heads"], "there is no stage 'heads'"),
        (["--wheels"], "--wheels needs a value"),
    ],
)
def test_gpu_refuses_what_it_does_not_know(words, said):
    run = gpu(*words)
    assert run.returncode == 2 and said in run.stderr and "bash benchmarks/gpu.sh --minutes 10" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_without_a_gpu_says_so():
    run = gpu()
    assert run.returncode == 2 and "torch sees no GPU here; use --dry-run" in run.stderr


def test_gpu_names_each_file_with_gpu_tests_and_they_need_neither_datasets_nor_trl():
    marked = {path.name for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    marked.discard(Path(__file__).name)
    line = next(x for x in (ROOT / "benchmarks" / "gpu.sh").read_text().splitlines() if x.startswith("GPU_TESTS="))
    files = line.removeprefix("GPU_TESTS=(").rstrip(")").split()
    assert {Path(file).name for file in files} == marked
    script = (
        "import sys, pytest; sys.modules['datasets'] = sys.modules['trl'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "-qq", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", *files]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]


def test_wheels_are_listed_with_their_reasons():
    command = ["bash", str(ROOT / "benchmarks" / "wheels.sh")]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True)
    assert listed.returncode == 0 and "needed    dill: datasets needs it" in listed.stdout
    assert subprocess.run(command, capture_output=True).returncode == 2


def test_providers_take_turns_and_peaks_are_peaks():
    from benchmarks.measure import interleaved, peak_mib

    order = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and timings["a"].summary()["rounds"] == 2
    if not torch.cuda.is_available():
        assert peak_mib(lambda: (torch.zeros(1 << 18), torch.zeros(1 << 19))[0].sum()) == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("name", ["ours-wrong", "theirs-wrong"])
@pytest.mark.parametrize("dtype, off", [(torch.float32, 0.01), (torch.bfloat16, 0.5)], ids=["fp32", "bf16"])
def test_no_speed_for_a_wrong_result(monkeypatch, capsys, dtype, off, name):
    from benchmarks import head

    monkeypatch.setitem(head.SHAPES, "small", (512, 2, 32, 501, dtype, None))
    wrong = lambda *x: head.ours(*x) + off  # noqa: E731
    candidates = {"ours": head.ours, "eager": eager, name: wrong}
    monkeypatch.setattr(head, "providers", lambda *_: candidates)
    result = head.bench("small", rounds=1, modes=("score", "frozen"))
    assert {row["provider"] for row in result["rows"]} == {"floor-1-gemm", "floor-2-gemm", "ours", "eager"}
    assert f"{name} (score): no speed, AssertionError: logps" in capsys.readouterr().out


def eager(p, hidden, weight):
    from benchmarks import head_providers

    return head_providers.eager(p, hidden, weight)


@pytest.mark.parametrize("what", ["d_hidden", "d_weight"])
def test_no_speed_for_a_wrong_gradient(what):
    from benchmarks import head_gate, head_providers

    p = head_providers.Problem.make(512, 2, 32, 501, torch.float32, 5.0, "cpu")
    gate = head_gate.Gate(p)
    out, *gradients = head_providers.case(p, head_providers.eager, "trained")()
    assert gate.errors("theirs", out, *gradients)["gradient_error"] < 1e-5
    gradients["d_hidden d_weight".split().index(what)] *= 1.01
    with pytest.raises(AssertionError, match=what):
        gate.errors("theirs", out, *gradients)


def test_ours_is_held_to_logits_in_fp32_and_a_loss_to_its_tokens():
    from benchmarks import head_gate, head_providers

    p = head_providers.Problem.make(512, 2, 32, 501, torch.bfloat16, None, "cpu")
    gate = head_gate.Gate(p)
    rounded = head_providers.eager(p, p.hidden, p.weight)
    gate.errors("eager", rounded, None, None)
    with pytest.raises(AssertionError):
        gate.errors("ours", rounded, None, None)
    loss = p.loss(gate.truth.logps).float()
    assert gate.errors("ours-fused", loss, None, None)["error"] < 1e-6
    with pytest.raises(AssertionError, match="loss: error 0.001"):
        gate.errors("ours-fused", loss + 1e-3, None, None)


def test_ratios_are_of_rounds():
    from benchmarks.measure import Timing, ratios

    noisy, base = Timing(wall_ms=[2.0, 20.0, 6.0]), Timing(wall_ms=[1.0, 10.0, 2.0])
    assert ratios(noisy, base) == {"median": 2.0, "min": 2.0, "max": 3.0}


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Makes a Record of `level1` that finds these commits, one after the other; `changed`: what differs in its code."""
    from benchmarks import record

    def make(*commits: str, changed: str | None = None, **knobs):
        left = iter(commits)
        monkeypatch.setattr(record, "commit_of", lambda paths: next(left))
        monkeypatch.setattr(record, "reason_against", lambda commit, paths: changed)
        return record.Record("level1", ["--N", "4", "--allow-dirty"], folder=tmp_path, **knobs)

    return make


def test_results_are_stamped_and_whole(record):
    path = record("abc", "abc").save("some", {"rows": [1]})
    written = json.loads(path.read_text())
    assert written["rows"] == [1] and written["versions"]["torch"] == torch.__version__ and written["device"]
    assert (written["commit"], written["command"]) == ("abc", "python -m benchmarks.level1 --N 4")
    assert written["complete"] is True and [p.name for p in path.parent.iterdir()] == ["some.json"]


def test_uncommitted_code_is_not_measured_unless_told(record):
    from benchmarks.record import Refused

    with pytest.raises(Refused, match="uncommitted changes"):
        record("abc-dirty")
    path = record("abc-dirty", allow_dirty=True).save("some", {}, complete=False)
    assert json.loads(path.read_text())["commit"] == "abc-dirty"
    assert record(save=False).save("some", {}) is None


def test_code_that_changes_under_a_measurement_is_dirty(record, capsys):
    for now in ("abc-dirty", "def"):
        path = record("abc", now, changed="older than the code").save("some", {})
        assert json.loads(path.read_text())["commit"] == "abc-dirty" and "changed while" in capsys.readouterr().out
    path = record("abc", "def").save("some", {})  # a commit of other files
    assert json.loads(path.read_text())["commit"] == "abc" and "changed while" not in capsys.readouterr().out


def test_a_benchmark_refuses_before_it_measures(monkeypatch, capsys):
    from benchmarks import level1, record

    monkeypatch.setattr(record, "commit_of", lambda paths: "abc-dirty")
    monkeypatch.setattr(level1, "bench", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        level1.main(["--N", "4"])
    assert stopped.value.code == 2 and "commit them first, or add --no-save or --allow-dirty" in capsys.readouterr().err


def test_a_part_that_is_known_is_saved_at_once(record):
    from benchmarks import level1

    seen = []
    level1.bench(4, 64, torch.float32, 1, lambda result, complete: seen.append((len(result["rows"]), complete)))
    assert seen == [(2, False), (3, False), (4, False), (5, True)]


def test_without_a_repository_the_commit_can_be_given(monkeypatch, tmp_path):
    from benchmarks import provenance

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv(provenance.GIVEN, raising=False)
    with pytest.raises(provenance.NoHistory, match="not a git repository"):
        provenance.commit_of(("kernels",), tmp_path)
    monkeypatch.setenv(provenance.GIVEN, "0123456789ab")
    assert provenance.commit_of(("kernels",), tmp_path) == "0123456789ab"
    monkeypatch.setenv(provenance.GIVEN, "main")
    with pytest.raises(provenance.NoHistory, match="must be a commit"):
        provenance.commit_of(("kernels",), tmp_path)


@pytest.mark.parametrize("kernel", ["fwd", "bwd"])
def test_the_sweep_times_what_the_rule_would_take(kernel):
    from benchmarks import sweep
    from dpo_fast.kernels import token_logps

    fields = sweep.NAMES[kernel][1]
    rule = {"fwd": token_logps.forward_config(131_072, 2), "bwd": token_logps.backward_config(131_072)}[kernel]
    candidates = {"fwd": sweep.forward_candidates, "bwd": sweep.backward_candidates}[kernel]()
    assert [rule[field] for field in fields] in [[c[field] for field in fields] for c in candidates]


@pytest.mark.parametrize("name", ["gemm", "attention"])
def test_tables_have_a_line_of_each_part(name, capsys):
    module = __import__(f"benchmarks.{name}", fromlist=["main"])
    assert module.main(["--no-save"]) == 0
    out = capsys.readouterr().out
    if name == "gemm":
        assert all(f"role {role}, rows {n}" in out for role in module.ROLES for n in (16, 32))
    else:
        assert "case tiny, implementation eager" in out
        # No backward on CPU in some versions of torch, a slow one in others
        assert "tiny, flex: no speed" in out or "case tiny, implementation flex" in out
