"""`pytest benchmarks`: a wrong member gets no speed, the others' times arrive unchanged, and slower code is found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

pytest.importorskip("pytest_benchmark")


def test_members_that_are_wrong_or_not_here_are_not_timed():
    from benchmarks.groups import Left, Measured, optional, take_turns

    runs = []

    def member(value):
        def run():
            runs.append(value)
            return torch.full((2**18,), value)

        return run

    def crash():
        raise RuntimeError("no kernel image\nmore")

    def load_missing():
        import a_package_that_nobody_has

        return a_package_that_nobody_has

    def not_offered():
        raise NotImplementedError("no backward here")

    def check(name, result):
        assert result[0] == 1.0, f"{name} is off"

    members = {"ours": member(1.0), "wrong": member(2.0), "crashes": crash, "cannot": not_offered}
    found = take_turns({**members, **optional([("missing", load_missing)])}, check, rounds=3)
    assert isinstance(found["ours"], Measured) and len(found["ours"].times_ms) == 3
    assert 1.0 <= found["ours"].extra["peak_mib"] < 1.1  # what it returns
    assert found["wrong"] == Left("AssertionError: wrong is off", True)
    assert found["crashes"] == Left("RuntimeError: no kernel image", True)
    assert found["cannot"] == Left("NotImplementedError: no backward here", False)
    assert "a_package_that_nobody_has" in found["missing"].reason and not found["missing"].wrong
    assert runs.count(2.0) == 1  # looked at, and never timed


def run_suite(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_sequences.py", "-k", "sums", "-q", "-p", "no:xdist"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
def test_slower_code_is_found(tmp_path):
    pytest.importorskip("datasets")
    saved = tmp_path / "before.json"
    run = run_suite(f"--benchmark-json={saved}")
    assert run.returncode == 0, run.stdout[-2000:]
    before = json.loads(saved.read_text())
    names = {row["name"] for row in before["benchmarks"]}
    assert names >= {f"test_sequence_sums[{member}]" for member in ("ours", "eager", "trl")}
    for row in before["benchmarks"]:
        assert row["stats"]["rounds"] == 30 and 0 < row["stats"]["median"] < 1 and row["extra_info"]["peak_mib"] > 0
        assert row["group"] == "sums of 1024 sequences of 200 tokens" and row["options"]["timer"] == "clock"
    assert before["machine_info"]["torch"] == torch.__version__
    for factor, status in ((1e-3, 1), (1e6, 0)):  # as if it had been a thousand times as fast before, or as slow
        for row in before["benchmarks"]:
            for name in ("min", "max", "mean", "median"):
                row["stats"][name] *= factor
        saved.write_text(json.dumps(before))
        run = run_suite(f"--benchmark-compare={saved}", "--benchmark-compare-fail=median:50%")
        assert run.returncode == status, run.stdout[-2000:] + run.stderr[-2000:]
        assert ("Performance has regressed" in run.stdout + run.stderr) == bool(status)


def test_a_member_of_ours_that_is_wrong_fails():
    """What stands between a wrong number and its speed: the gate of each group sees one that is off."""
    from benchmarks import test_level1

    wrong = {"ours": lambda logits, labels: logits.log_softmax(-1).gather(1, labels[:, None])[:, 0] + 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_level1, "providers", lambda: wrong)
        patch.setattr(test_level1, "ROUNDS", 1)
        patch.setattr(test_level1, "V", 501)
        found = test_level1.measure(backward=True)
    assert found["ours"].wrong and "log-probs" in found["ours"].reason
    assert len(found["torch"].times_ms) == 1
