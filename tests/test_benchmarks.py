"""Benchmarks measure what they say, refuse wrong results, and run from the root; no time decides anything here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def test_gpu_dry_run():
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--dry-run"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "all stages done" in run.stdout
    for stage in ("tests", "selftest", "level1", "sweep", "head"):
        assert f"== {stage}: done in" in run.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_gpu_without_a_gpu_says_so():
    environment = {**os.environ, "PYTHON": sys.executable}
    run = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 2 and "torch sees no GPU here; use --dry-run" in run.stderr


def test_providers_take_turns_and_peaks_are_peaks():
    from benchmarks.measure import interleaved, peak_mib

    order = []
    timings = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and timings["a"].summary()["rounds"] == 2
    if not torch.cuda.is_available():
        assert peak_mib(lambda: (torch.zeros(1 << 18), torch.zeros(1 << 19))[0].sum()) == pytest.approx(3.0, abs=0.1)


def test_no_speed_for_a_wrong_result(monkeypatch, capsys):
    from benchmarks import head

    monkeypatch.setattr(head, "providers", lambda p: {"ours": head.ours, "wrong": lambda *x: head.ours(*x) + 0.01})
    result = head.bench("cpu-tiny", rounds=1, modes=("score", "frozen"))
    assert {row["provider"] for row in result["rows"]} == {"floor-1-gemm", "floor-2-gemm", "ours"}
    assert "wrong (score): no speed, AssertionError: error 0.01 is above" in capsys.readouterr().out


def test_results_are_stamped_and_whole(tmp_path):
    from benchmarks.measure import save

    path = save("some", {"rows": [1]}, tmp_path)
    written = json.loads(path.read_text())
    assert written["rows"] == [1] and written["versions"]["torch"] == torch.__version__ and written["device"]
    assert [p.name for p in path.parent.iterdir()] == ["some.json"]


def test_bars_say_what_is_met_and_what_is_not(tmp_path, capsys):
    from benchmarks import bars

    shares = {"ours, forward": 0.93, "ours, forward + backward": 0.8}
    level1 = [{"case": case, "share_of_copy": share} for case, share in shares.items()]
    (tmp_path / "level1.json").write_text(json.dumps({"rows": level1}))
    row = {"mode": "score", "provider": "ours", "wall_median_ms": 13.5, "beyond_gradients_mib": 260, "to_floor": 1.1}
    (tmp_path / "head-bar.json").write_text(json.dumps({"rows": [row]}))
    assert bars.main(["--folder", str(tmp_path)]) == 0
    verdicts = {line.split("  ")[0]: line.split()[-2] for line in capsys.readouterr().out.splitlines()[2:]}
    assert verdicts == {
        "head, score: ms": "NO",
        "head, score: MiB beyond gradients": "yes",
        "head, score: share of the GEMM rate": "yes",
        "level 1, forward: share of the copy bandwidth": "yes",
        "level 1, forward + backward: share of the copy bandwidth": "NO",
    }
    assert bars.main(["--folder", str(tmp_path / "none")]) == 1


def test_bars_read_the_committed_results():
    from benchmarks import bars

    found = list(bars.lines(ROOT / "benchmarks" / "results" / "cpu-x86_64"))
    assert {file.split("-")[0] for *_, file in found} == {"accuracy.json", "head", "train"} and len(found) > 20
