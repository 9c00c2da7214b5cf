"""The frame of `benchmarks.interop`: pages from results, numbers compared, environments used again. Nothing is
installed and nothing is timed here."""

import ast
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks.interop import page, run, task
from benchmarks.interop.frameworks import FRAMEWORKS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "interop"
BY_NAME = {framework.name: framework for framework in FRAMEWORKS}


# --- the page and the table ------------------------------------------------------------------------------------------


def test_the_page_is_what_results_and_scripts_give():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text) == text, "python -m benchmarks.interop --page writes it anew"
    emptied = page.BLOCK.sub(lambda found: found[1] + found[3], text)
    assert emptied != text and page.written(emptied) == text


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.name)
def test_each_framework_has_a_script_its_lines_and_a_row(framework):
    text = page.PAGE.read_text(encoding="utf-8")
    before, after = page.swap_of(framework.script)
    for side in (before, after):
        ast.parse(side)
    assert page.changed(framework.script) >= 1
    assert re.search(rf"^## {re.escape(framework.heading)}$", text, re.MULTILINE)
    assert f"<!-- interop: {framework.script} -->\n{page.lines(framework.script)}" in text
    assert page.row(framework) in text.splitlines()
    assert framework.pins or framework.environment in BY_NAME or framework.not_run
    for pin in (*framework.pins, *framework.bare):
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?==[\w.+]+", pin), f"{pin} floats"


def test_names_are_told_apart():
    assert len(BY_NAME) == len(FRAMEWORKS) and not {f.script for f in FRAMEWORKS} & {"task", "run", "page"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_each_result_is_of_a_framework_and_of_its_pins(path):
    result, framework = json.loads(path.read_text(encoding="utf-8")), BY_NAME[path.stem]
    assert result["complete"] and re.fullmatch("[0-9a-f]{40}", result["commit"]), "not of a clean commit"
    owner = BY_NAME[framework.environment or framework.name]
    for pin in (*owner.pins, *owner.bare):
        name, version = re.sub(r"\[.*\]", "", pin).lower().split("==")
        assert result["versions"][name.replace("_", "-")].split("+")[0] == version
    for found in result["rounds"]:
        assert len(found["before"]["processor_s"]) == len(found["after"]["processor_s"]) == task.STEPS


def test_a_swap_is_read_from_a_script_that_is_both(tmp_path, monkeypatch):
    source = """
def main():
    if way == "before":
        # swap: before
        from a import Trainer
        # swap: after
    else:
        # its weights, too
        from b import Trainer

        Trainer.x = 1
        # swap: end
    # swap: before
    Trainer()
    # swap: after
    Trainer()
    keep(Trainer)
    # swap: end
"""
    (tmp_path / "some.py").write_text(source)
    monkeypatch.setattr(page, "__file__", str(tmp_path / "page.py"))
    after = "# its weights, too\nfrom b import Trainer\n\nTrainer.x = 1\nTrainer()\nkeep(Trainer)"
    assert page.swap_of("some") == ("from a import Trainer\nTrainer()", after)
    assert page.changed("some") == 3
    (tmp_path / "some.py").write_text("pass\n")
    with pytest.raises(ValueError, match="marks no lines"):
        page.swap_of("some")


# --- the comparison --------------------------------------------------------------------------------------------------


def found(**changed) -> dict:
    curves = {"losses": [0.69, 0.68], "grad_norms": [24.0, 20.0], "metrics": {"rewards/accuracies": [0.5, 1.0]}}
    return {**curves, **changed}


SAME = ({"w": torch.ones(3)}, {"w": torch.ones(3)})


def differences(before: dict, after: dict, weights: tuple[dict, dict] = SAME) -> dict:
    return run.differences({"before": before, "after": after}, dict(zip(run.WAYS, weights, strict=True)))


def test_differences_are_of_every_number_but_the_signs_of_rounding():
    assert set(differences(found(), found()).values()) == {0.0}
    assert differences(found(), found(losses=[0.69, 0.69]))["loss"] == pytest.approx(0.01)
    assert differences(found(), found(grad_norms=[24.0, 19.0]))["grad_norm"] == pytest.approx(0.05)
    assert differences(found(), found(metrics={"rewards/accuracies": [0.0, 1.0]}))["rewards/accuracies"] == 0
    assert differences(found(), found(metrics={"rewards/accuracies": [0.5, 0.75]}))["rewards/accuracies"] == 0.25
    assert differences(found(), found(losses=[float("nan"), 0.68]))["loss"] == torch.inf
    apart = differences(found(), found(), ({"w": torch.zeros(3)}, {"w": torch.tensor([0.0, -2e-5, 0.0])}))
    assert apart["weights"] == pytest.approx(2e-5)


@pytest.mark.parametrize("absent", ["curve", "weight"])
def test_what_only_one_side_has_is_no_comparison(absent):
    with pytest.raises(run.NoResult, match="only one of before and after has"):
        if absent == "curve":
            differences(found(), found(metrics={}))
        else:
            differences(found(), found(), ({"w": torch.ones(1)}, {}))


def test_a_run_that_learned_nothing_is_no_comparison():
    with pytest.raises(run.NoResult, match="nothing was learned"):
        differences(found(losses=[0.69, 0.69]), found())


def rounds(before=(9.0, 4.0, 2.0), after=(9.0, 1.0, 1.0), peaks=(100.0, 30.0)) -> list[dict]:
    sides = {}
    for way, seconds, peak in zip(run.WAYS, (before, after), peaks, strict=True):
        measured = {"processor_s": seconds, "wall_s": seconds, "peak_mib": peak, "start_mib": 1.0}
        sides[way] = {**found(), "measured": measured, "versions": {"torch": "2.13.0"}}
    return [{**sides, "differences": {"loss": 3e-6}}]


def test_an_outcome_leaves_the_first_step_out_and_takes_medians_over_rounds():
    first, second, third = rounds(), rounds(after=(9.0, 2.0, 1.0), peaks=(100.0, 50.0)), rounds(before=(9.0, 1.0, 1.0))
    third[0]["differences"] = {"loss": 7e-6}
    result = run.outcome([*first, *second, *third])
    assert result["faster_rounds"] == [3.0, 2.0, 1.0] and result["faster"] == 2.0
    assert result["memory_rounds"] == [0.3, 0.5, 0.3] and result["memory"] == 0.3
    assert result["before"]["processor_s"] == 6.0 and result["differences"] == {"loss": 7e-6}


def test_what_is_not_met_is_said_and_ends_with_status_1(monkeypatch, capsys, tmp_path):
    framework = next(f for f in FRAMEWORKS if f.faster == 3.0 and f.memory == 0.4)
    result = run.outcome(rounds())
    assert run.reasons_against(framework, result) == []
    worse = {**result, "faster": 2.9, "memory": 0.41, "differences": {"loss": 1.1e-5, "weights": float("inf")}}
    said = run.reasons_against(framework, worse)
    assert len(said) == 4 and "loss differs by 1.1e-05" in said[0] and "2.90 times faster, 3.0 is asked" in said[2]
    cells = page.measured(framework, {**worse, "before": result["before"], "after": result["after"]})
    assert [cell.count("**not met**") for cell in cells] == [1, 1, 0] and "more than 1e-05" in cells[2]
    for outcome, status in ((result, 0), (worse, 1)):
        monkeypatch.setattr(run, "run_rounds", lambda *_, outcome=outcome: outcome)
        assert run.main([framework.name, "--no-save"]) == status
    assert "not met: 2.90 times faster" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["trl-0.1", "--no-save"])
    assert "no framework trl-0.1" in capsys.readouterr().err


def test_a_script_that_fails_says_with_what(tmp_path):
    import sys

    with pytest.raises(run.NoResult, match="No module named benchmarks.interop.no_such_script"):
        run.call(Path(sys.executable), ["benchmarks.interop.no_such_script", "before"], tmp_path)


# --- environments ----------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """What was done instead of making environments: whether one was cleared, what pip was asked for. Status 0, or
    that which `commands.status` has."""

    class Commands(list):
        status = 0

        def run(self, command):
            self.append(command[6:])
            return subprocess.CompletedProcess(command, self.status)

        def create(self, folder, clear, **_):
            folder.mkdir(exist_ok=True)
            self.append(clear)

    done = Commands()
    monkeypatch.setenv("DPO_FAST_INTEROP", str(tmp_path))
    monkeypatch.setattr(run.venv, "create", done.create)
    monkeypatch.setattr(run.subprocess, "run", done.run)
    return done


def test_an_environment_is_made_once_per_pins(commands, monkeypatch, tmp_path):
    one = run.Framework("one", "One", "One", "one", ("a==1", "b==2"), bare=("c==3",))
    other = run.Framework("two", "Two", "One", "one", environment="one")
    monkeypatch.setattr(run, "FRAMEWORKS", (one, other))
    assert run.python_of(one) == run.python_of(other) == tmp_path / "one" / "bin" / "python"
    assert commands == [False, ["a==1", "b==2"], ["--no-deps", "c==3"]]
    changed = run.Framework("one", "One", "One", "one", ("a==1", "b==3"))
    monkeypatch.setattr(run, "FRAMEWORKS", (changed, other))
    run.python_of(other)
    assert commands[3:] == [True, ["a==1", "b==3"]]


def test_one_that_could_not_be_installed_is_not_used(commands, capsys):
    commands.status = 1
    for _ in range(2):
        assert run.main(["trl-0.24", "--no-save"]) == 1
    assert capsys.readouterr().out.count("trl-0.24: no result, pip install torch==") == 2 and len(commands) == 4


def test_make_interop_takes_names():
    said = subprocess.run(["make", "-n", "interop", "trl-0.24", "trl-1.9"], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"-m benchmarks.interop trl-0.24 trl-1.9\s*$", said.stdout, re.MULTILINE), (
        said.stdout + said.stderr
    )
    other = subprocess.run(["make", "-n", "trl-0.24"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode != 0 and "No rule" in other.stderr


# --- what a script gets ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_a_measure_counts_what_training_adds():
    held = torch.ones(64 << 18)  # 64 MiB that stood before, and are freed inside
    torch.ones(128 << 18)  # 128 MiB that are gone
    with task.Measure() as measure:
        for step in range(task.STEPS):
            if step == 2:
                extra = torch.ones(32 << 18)
                del extra
            sum(range(20_000))
            measure.step()
        del held
    measured = measure.measured()
    assert 31 <= measured["peak_mib"] < 40
    assert all(seconds > 0 for seconds in measured["wall_s"]) and len(measured["processor_s"]) == task.STEPS
    with pytest.raises(ValueError, match="7 steps were measured of 6"):
        measure.step()
        measure.measured()


def test_a_task_writes_what_the_comparison_reads(tmp_path):
    numbers = [float(i) for i in range(task.STEPS)]
    mine = task.Task("after", tmp_path / "after.json")
    mine.write(numbers, numbers, {"margins": numbers}, {"w": torch.ones(2)}, {"peak_mib": 1.0})
    written = json.loads(mine.out.read_text())
    assert run.curves_of(written) == {"loss": numbers, "grad_norm": numbers, "margins": numbers}
    assert written["versions"]["torch"] == torch.__version__
    assert torch.equal(torch.load(tmp_path / "after.pt")["w"], torch.ones(2))
    with pytest.raises(ValueError, match="margins has 5 numbers for 6 steps"):
        mine.write(numbers, numbers, {"margins": numbers[1:]}, {}, {})


def test_the_task_is_the_same_each_time(tmp_path, monkeypatch):
    import transformers

    monkeypatch.setattr(task, "SHAPE", task.Shape(1, 16, 16, 2, 2, 300))
    for name in "ab":
        task.prepare(tmp_path / name)
    a, b = (sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in "ab")
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]
    pairs = json.loads((tmp_path / "a" / "pairs.json").read_text())
    assert len(pairs) == task.STEPS * task.PAIRS
    assert (
        max(len(p["prompt_ids"]) + len(p[side]) for p in pairs for side in ("chosen_ids", "rejected_ids"))
        <= task.LONGEST
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a" / "model")
    messages = [{"role": "user", "content": pairs[0]["prompt"]}, {"role": "assistant", "content": pairs[0]["chosen"]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer(text)["input_ids"] == pairs[0]["prompt_ids"] + pairs[0]["chosen_ids"]
