"""benchmarks/gpu.py: order, time, failures, going on, and machines that lack something; stand-ins do the measuring."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMMIT = "0123456789ab"
H200 = {"device": "h200", "gpus": 1, "sanitizer": True, "missing": [], "free_gib": 139, "bf16": True}
H200 |= {"capability": "9.0"}


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Runs gpu.py on a machine with these `facts`: (words, of parts: their exit status or None) -> exit status; what it
    began is in `ran`. A part that is told to succeed leaves its result file."""
    from benchmarks import gpu

    class Machine:
        def __init__(self):
            self.facts, self.commit, self.fates, self.ran, self.clock = H200, COMMIT, {}, {}, 0.0
            self.environment = {}

        def __call__(self, *words: str, **fates) -> int:
            self.fates, self.ran = {name.replace("_", "-"): fate for name, fate in fates.items()}, {}
            return gpu.main(["--out", str(tmp_path), *words])

        @property
        def folder(self) -> Path:
            return tmp_path / self.facts["device"]

        def execute(self, command, limit, environment, log):
            self.environment = environment
            name, seconds = log.stem, {p.name: p.seconds for s in gpu.STAGES for p in s.parts}[log.stem]
            fate = 1 if "asked for" in command[-1] else self.fates.get(name, 0)
            self.ran[name] = limit
            self.clock += limit if fate is None else seconds
            whole = {"complete": fate == 0, "commit": self.commit, "versions": {}, "rows": [], "entries": {}}
            (self.folder / f"{name}.json").write_text(json.dumps(whole))
            return fate

    machine = Machine()
    monkeypatch.setattr(gpu, "execute", machine.execute)
    monkeypatch.setattr(gpu, "python_says", lambda *_, **__: json.dumps(machine.facts))
    monkeypatch.setattr(gpu, "checked_out", lambda: machine.commit)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: machine.clock)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: None)  # of bars
    return machine


def stages() -> dict[str, list]:
    from benchmarks.gpu_stages import STAGES

    return {stage.name: list(stage.parts) for stage in STAGES}


def test_correctness_then_steps_then_parts_as_far_as_they_fit(gpu, capsys):
    assert list(stages()) == ["tests", "train_step", "attention", "head", "gemm", "level1", "sweep"]
    assert gpu("--minutes", "10") == 0
    parts = {part.name: part for parts in stages().values() for part in parts}
    assert list(gpu.ran)[:4] == ["tests", "memcheck", "racecheck", "train-step-1b-chat-full"]
    assert sum(parts[name].seconds for name in gpu.ran) <= 600 < sum(part.seconds for part in parts.values())
    assert [name for name in parts if name in gpu.ran] == list(gpu.ran)
    out = capsys.readouterr().out
    for name, part in parts.items():
        if name not in gpu.ran:
            assert f"== {name}: no time, it takes about {part.seconds} s" in out
    assert "the same command goes on with them" in out and "all parts that can run here are done" not in out


def test_a_second_call_goes_on_and_a_third_has_nothing_to_do(gpu, capsys):
    gpu("--minutes", "10")
    first = set(gpu.ran)
    assert gpu("--minutes", "60") == 0 and gpu.ran and not first & set(gpu.ran)
    assert "all parts that can run here are done" in capsys.readouterr().out
    gpu("--minutes", "60")
    assert not gpu.ran and "== tests: done before by this commit" in capsys.readouterr().out
    gpu("--minutes", "60", "--only", "gemm", "--again")
    assert list(gpu.ran) == [part.name for part in stages()["gemm"]]


def test_what_other_code_measured_or_left_unfinished_is_measured_anew(gpu):
    gpu("--minutes", "60")
    (gpu.folder / "level1.json").unlink()
    (gpu.folder / "sweep.json").write_text(json.dumps({"complete": True, "commit": "fedcba987654"}))
    gpu("--minutes", "60")
    assert list(gpu.ran) == ["level1", "sweep"]
    gpu.commit = "fedcba987654"
    gpu("--minutes", "60")
    assert "tests" in gpu.ran and len(gpu.ran) > 10
    gpu.commit = f"{COMMIT}-dirty"
    for _ in range(2):  # uncommitted code has no name by which a result could be known
        gpu("--minutes", "60", "--allow-dirty", "--only", "level1")
        assert list(gpu.ran) == ["level1"]


@pytest.mark.parametrize("fate, said", [(1, "FAILED, exit status 1"), (None, "STOPPED, its 130 s were up")])
def test_what_fails_or_takes_too_long_ends_nothing_and_comes_last_next_time(gpu, capsys, fate, said):
    name = "train-step-1b-long-full"
    fates = {name.replace("-", "_"): fate}
    minutes = str((sum(p.seconds for p in stages()["tests"]) + 130) / 60)
    assert gpu("--minutes", minutes, "--only", f"tests,{name},level1", **fates) == 1
    out = capsys.readouterr().out
    assert f"== {name}: {said}" in out and f"failed: {name}; the same command" in out
    assert gpu("--minutes", "60", "--only", f"tests,{name},level1") == 0
    assert list(gpu.ran)[-1] == name and "tests" not in gpu.ran


@pytest.mark.parametrize("stage", ["tests", "train_step", "attention", "head", "gemm", "level1", "sweep"])
def test_a_failure_in_each_stage_is_noticed(gpu, capsys, stage):
    assert gpu("--minutes", "600", "--fail", stage) == 1
    failed = [part.name for part in stages()[stage]]
    assert f"failed: {', '.join(failed)};" in capsys.readouterr().out
    assert len(gpu.ran) == sum(map(len, stages().values()))  # the others were run


@pytest.mark.parametrize("stage", ["tests", "train_step", "attention", "head", "gemm", "level1", "sweep"])
def test_a_delay_in_each_stage_is_cut_off(monkeypatch, tmp_path, stage):
    """A real one, in a real process: with time for none of the parts but the first."""
    from benchmarks import gpu

    monkeypatch.setattr(gpu, "python_says", lambda *_, **__: json.dumps({**H200, "gpus": 0, "device": "cpu"}))
    monkeypatch.setattr(gpu, "LEAST_S", 0.05)
    part = stages()[stage][0].name
    assert gpu.main(["--dry-run", "--stall", stage, "--only", part, "--out", str(tmp_path)]) == 1
    state = json.loads((tmp_path / "cpu" / "gpu.json").read_text())["parts"][part]
    assert (state["state"], state["seconds"] < 5) == ("stopped", True)


def test_a_part_that_is_stopped_leaves_its_output_and_no_process(tmp_path):
    from benchmarks.gpu import execute

    script = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    assert execute([sys.executable, "-c", script], 0.7, dict(os.environ), tmp_path / "log") is None
    assert time.monotonic() - start < 30
    worker = int((tmp_path / "log").read_text())
    for _ in range(100):  # until somebody has read its exit status
        status = Path(f"/proc/{worker}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.05)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker of a part that was stopped went on")
    assert execute([sys.executable, "-c", "import sys; sys.exit(7)"], 30, dict(os.environ), tmp_path / "log") == 7


# --- machines that lack something ------------------------------------------------------------------------------------


def test_a_gpu_without_bf16_is_only_tested(gpu, capsys):
    gpu.facts = {**H200, "bf16": False, "capability": "7.5"}
    assert gpu("--minutes", "60") == 0
    assert list(gpu.ran) == ["tests", "memcheck", "racecheck"]
    out = capsys.readouterr().out
    assert "this GPU (compute capability 7.5) has no bf16: what takes it is left out" in out
    assert "== head-bar: left out, this GPU has no bf16" in out


def test_too_little_memory_leaves_out_what_does_not_fit(gpu, capsys):
    gpu.facts = {**H200, "free_gib": 10}
    assert gpu("--minutes", "60") == 0
    assert list(gpu.ran) == ["tests", "memcheck", "racecheck"]
    out = capsys.readouterr().out
    assert "== train-step-8b-chat-full-sgd: left out, it takes about 72 GiB, 10 are free" in out
    assert "== head-bar: left out, it takes about 40 GiB, 10 are free" in out


@pytest.mark.parametrize("visible, used", [(None, "0"), ("3,1", "3")])
def test_of_two_gpus_the_first_is_used(gpu, capsys, monkeypatch, visible, used):
    gpu.facts = {**H200, "gpus": 2}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu("--minutes", "60") == 0
    assert "2 GPUs are visible: GPU 0 of them is used" in capsys.readouterr().out
    assert gpu.environment["CUDA_VISIBLE_DEVICES"] == used


def test_without_a_sanitizer_and_without_peers(gpu, capsys):
    from benchmarks.facts import PEERS

    gpu.facts = {**H200, "sanitizer": False, "missing": list(PEERS)}
    assert gpu("--minutes", "60") == 0
    assert not [name for name in gpu.ran if name.startswith(("train-step", "memcheck", "racecheck"))]
    assert {"tests", "head-bar", "attention", "sweep"} <= set(gpu.ran)
    out = capsys.readouterr().out
    assert all(f"{name} is not installed: {follows}" in out for name, follows in PEERS.items())
    assert "compute-sanitizer is not installed: memcheck and racecheck are left out" in out
    gpu.facts = {**H200, "missing": ["peft"]}
    gpu("--minutes", "60")
    assert "train-step-1b-chat-full" in gpu.ran and "train-step-1b-chat-lora" not in gpu.ran


def test_facts_of_this_machine(monkeypatch):
    from benchmarks import facts

    monkeypatch.setattr(facts.importlib.util, "find_spec", lambda name: None if name in ("trl", "quack") else True)
    found = facts.facts()
    assert found["missing"] == ["trl", "quack"] and found["gpus"] == torch.cuda.device_count()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        (["--fast"], "unrecognized arguments: --fast"),
        (["--minutes", "ten"], "invalid float value: 'ten'"),
        (["--only", "heads"], "there is no stage or part 'heads'"),
        (["--wheels"], "expected one argument"),
        (["--wheels", "nowhere"], "there is no folder 'nowhere'"),
    ],
)
def test_what_it_does_not_know_is_refused(words, said, capsys):
    from benchmarks import gpu

    with pytest.raises(SystemExit) as stopped:
        gpu.main(words)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_code_without_a_name_is_refused_and_so_is_a_machine_without_a_gpu(gpu, capsys):
    gpu.commit = f"{COMMIT}-dirty"
    with pytest.raises(SystemExit) as stopped:
        gpu()
    assert stopped.value.code == 2 and "uncommitted changes): commit it" in capsys.readouterr().err and not gpu.ran
    gpu.commit, gpu.facts = COMMIT, {**H200, "gpus": 0}
    with pytest.raises(SystemExit) as stopped:
        gpu()
    assert stopped.value.code == 2 and "torch sees no GPU here; use --dry-run" in capsys.readouterr().err


def test_the_script_is_the_module():
    run = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--help"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and "bash benchmarks/gpu.sh --minutes 10" in run.stdout


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of its parent
        return False


@pytest.mark.slow
def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--minutes", "60", "--out", str(tmp_path)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "all parts that can run here are done" in run.stdout
    for part in (part for parts in stages().values() for part in parts if part.dry):
        missing = [name for name in ("datasets", "trl.trainer") if not installed(name)]
        left_out = missing and re.search(rf"^== {re.escape(part.name)}: left out, .* not installed$", run.stdout, re.M)
        assert left_out or f"== {part.name}: done in" in run.stdout


def test_files_with_gpu_tests_need_neither_datasets_nor_trl():
    from benchmarks.gpu_stages import GPU_TESTS

    assert {"tests/kernels/test_gpu.py", "tests/test_attention.py"} <= set(GPU_TESTS)
    script = (
        "import sys, pytest; sys.modules['datasets'] = sys.modules['trl'] = None; sys.exit(pytest.main(sys.argv[1:]))"
    )
    words = ["-qq", "-p", "no:cacheprovider", "-m", "gpu", "--collect-only", *GPU_TESTS]
    run = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]


def test_parts_and_their_files_have_one_name(gpu, monkeypatch):
    """A part's benchmark takes its options, and writes the file that the driver looks for."""
    from benchmarks import bars, gemm, head, provenance, record
    from benchmarks.train_step import run as train_step

    parts = {part.name: part for found in stages().values() for part in found}
    saving = {name: part for name, part in parts.items() if part.saves}
    assert all(f"benchmarks.{provenance.benchmark_of(name)}" == part.words[1] for name, part in saving.items())
    assert {bar.stem for bar in bars.GPU_BARS} <= saving.keys()
    saved = []
    monkeypatch.setattr(record.Record, "save", lambda self, name, result, **_: saved.append(name))
    monkeypatch.setattr(record.Record, "of", classmethod(lambda cls, *_: cls("gemm", [], save=False)))
    monkeypatch.setattr(head, "bench", lambda *_: {})
    monkeypatch.setattr(gemm, "bench", lambda *_: {"rows": []})
    monkeypatch.setattr(train_step, "reason_against", lambda provider: None)
    for name, part in saving.items():
        if name.startswith(("head", "gemm")):
            __import__(part.words[1], fromlist=["main"]).main(list(part.words[2:]))
        elif name.startswith("train-step"):
            arguments = train_step.parse(list(part.words[2:]))
            saved.append(arguments.name)
            assert arguments.profile == 2 and arguments.steps == 8
        else:
            saved.append(name)
    assert saved == list(saving)


# --- the page --------------------------------------------------------------------------------------------------------


def a_folder(folder: Path) -> dict[str, dict]:
    """Results of each kind, as their benchmarks write them."""
    time_of = {"wall_median_ms": 10.0}
    steps = [
        {"provider": p, "wall_s": s, "tokens_per_s": 8000 / s, "peak_mib": 1024 / s, "shares": shares}
        for p, s, shares in (
            ("trl", 0.6, None),
            ("FastDPOTrainer", 0.2, {"optimizer": 0.1, "head": 0.2, "attention": 0.1, "rest": 0.4, "idle": 0.2}),
        )
    ]
    head = [{"mode": m, "provider": "ours", "to_floor": 1.2, **time_of} for m in ("score", "frozen", "trained")]
    case = {"pairs": 8, "lengths": [150, 200, 200], "heads": 32, "kv_heads": 8, "width": 64}
    products = [
        {"role": "copy", "rows": 9, "result": "float32", "gb_per_s": 4300.0, **time_of},
        *({"role": r, "rows": 2048, "result": "float32", "tflops": 700.0, **time_of} for r in ("logits", "d_weight")),
    ]
    of_level1 = [
        {"case": c, "gb_per_s": 4000.0, **time_of} for c in ("copy", "ours, forward", "ours, forward + backward")
    ]
    found = {
        "train-step-1b-chat-full": {"rows": steps},
        "head-bar": {"shape": "bar", "N": 8192, "H": 4096, "V": 131_072, "dtype": "bfloat16", "rows": head},
        "attention": {
            "rows": [{"case": "chat", "implementation": "<varlen>", "peak_mib": 5.0, **time_of}],
            "cases": {"chat": case},
        },
        "gemm-H4096-V131072": {"H": 4096, "V": 131_072, "rows": products},
        "level1": {"N": 8192, "V": 131_072, "dtype": "bfloat16", "rows": of_level1, "complete": False},
        "sweep": {"entries": {"device": "h200"}, "rows": []},
    }
    for stem, result in found.items():
        (folder / f"{stem}.json").write_text(json.dumps({"versions": {"torch": "2.11"}, "commit": COMMIT, **result}))
    return found


def test_the_page_is_whole_by_itself_and_has_each_result(tmp_path):
    from benchmarks import gpu_page

    a_folder(tmp_path)
    parts = {"tests": {"state": "failed", "because": "exit status 1", "seconds": 80.0}}
    page = gpu_page.write(tmp_path, parts).read_text(encoding="utf-8")
    assert "http" not in page and "src=" not in page and "@import" not in page and "<script" not in page
    assert "failed: exit status 1" in page and "&lt;varlen&gt; 10 ms" in page and "(stopped before its end)" in page
    assert "FastDPOTrainer 0.200 s" in page and "idle 20%" in page
    svgs = [ElementTree.fromstring(f"<svg{part.split('</svg>')[0]}</svg>") for part in page.split("<svg")[1:]]
    roofline, steps = svgs
    names = [node.text for node in roofline.iter("title")]
    assert sum(name.startswith("bar, ") for name in names) == 3 and any("d_weight, 2048 rows" in n for n in names)
    assert any("attention chat" in n for n in names) and any(n.startswith("ours, forward") for n in names)
    assert len([node for node in steps.iter("rect") if node.find("title") is not None]) == 1 + 5
    for svg in svgs:
        wide, high = map(float, svg.get("viewBox").split()[2:])
        for node in (*svg.iter("circle"), *svg.iter("text"), *svg.iter("rect")):
            x, y = (float(node.get(k) or node.get(f"c{k}")) for k in "xy")
            assert 0 <= x <= wide and 0 <= y <= high


def test_points_stand_where_their_numbers_say():
    from benchmarks import gpu_page

    result = {
        "H": 4096,
        "V": 131_072,
        "rows": [{"role": "logits", "rows": 2048, "result": "bfloat16", "tflops": 700.0}],
    }
    result["rows"][0]["wall_median_ms"] = 2 * 2048 * 4096 * 131_072 / 700e9
    (point,) = gpu_page.points("gemm-H4096-V131072", result)
    assert point.flops / point.ms / 1e9 == pytest.approx(700.0)
    assert point.bytes == 2 * (2048 * 4096 + 131_072 * 4096 + 2048 * 131_072)
    logits = {"N": 10, "V": 100, "dtype": "bfloat16", "rows": [{"case": "ours, forward", "wall_median_ms": 1.0}]}
    (point,) = gpu_page.points("level1", logits)
    assert point.bytes == 2 * 10 * 100
    axes = gpu_page.Axes([1.0, 1000.0], [0.1, 100.0])
    assert axes.at(1.0, 0.1) == (gpu_page.EDGE, gpu_page.HIGH - gpu_page.EDGE)
    assert axes.at(1000.0, 100.0) == (gpu_page.WIDE - gpu_page.EDGE, gpu_page.EDGE)


def test_without_rates_there_is_no_roofline(tmp_path):
    from benchmarks import gpu_page

    assert "No roofline" in gpu_page.write(tmp_path, {}).read_text(encoding="utf-8")


def test_one_archive_holds_all(gpu, tmp_path):
    gpu("--minutes", "60", "--only", "level1")
    with tarfile.open(tmp_path / "h200.tgz") as archive:
        assert {"h200/gpu.json", "h200/level1.json", "h200/index.html"} <= set(archive.getnames())
