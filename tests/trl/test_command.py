"""`dpo-fast trl dpo`: TRL's options, its script, and its numbers, by this package's trainer."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from tiny import save_inputs, tiny_rows

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

import accelerate.commands.launch  # noqa: E402

from dpo_fast.cli import main  # noqa: E402
from dpo_fast.trl import command  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model, eight pairs, and a recipe of two steps of which one line is accelerate's."""
    save_inputs(tmp_path)
    (tmp_path / "data").mkdir()
    lines = [json.dumps(row) + "\n" for row in tiny_rows(8)]
    (tmp_path / "data" / "train.jsonl").write_text("".join(lines))
    recipe = dict(
        dataset_name="data", model_name_or_path="model", learning_rate=1e-3, max_steps=2, use_cpu=True, bf16=False,
        per_device_train_batch_size=4, report_to="none", logging_steps=1, disable_tqdm=True, num_processes=1,
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def launched(monkeypatch):
    """What accelerate is asked to launch, instead of launching it."""
    calls: list = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", calls.append)
    return calls


def test_help_lists_the_options_of_trl(capsys, launched):
    with pytest.raises(SystemExit) as end:
        main(["trl", "dpo", "--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.startswith("usage: dpo-fast trl dpo") and not launched
    for option in ("--model_name_or_path", "--dataset_name", "--use_peft", "--loss_type", "--beta"):
        assert option in shown
    assert main(["trl", "--help"]) == 0
    assert "usage: dpo-fast trl {dpo,kto}" in capsys.readouterr().out


def test_options_go_where_they_belong(folder, launched):
    options = [
        "--config",
        "recipe.yaml",
        "--num_machines",
        "1",
        "--beta",
        "0.3",
        "--output_dir",
        "1",
        "--gradient_accumulation_steps",
        "1",
    ]
    assert main(["trl", "dpo", *options]) == 0
    (launch,) = launched
    assert launch.module and launch.training_script == "dpo_fast.trl.command"
    assert (launch.num_processes, launch.num_machines) == (1, 1)
    assert launch.training_script_args == ["dpo", *options[:2], *options[4:]]
    with pytest.raises(SystemExit) as end:
        main(["trl", "dpo", *options, "--nonsense", "3"])
    assert end.value.code == 2 and len(launched) == 1


def test_a_configuration_of_accelerate_by_name(folder, launched):
    assert main(["trl", "dpo", "--config", "recipe.yaml", "--output_dir", "o", "--accelerate_config", "zero2"]) == 0
    assert Path(launched[0].config_file).is_file() and launched[0].config_file.endswith("accelerate_configs/zero2.yaml")
    (folder / "own.yaml").write_text("num_machines: 1\n")
    assert main(["trl", "dpo", "--config", "recipe.yaml", "--output_dir", "o", "--accelerate_config", "own.yaml"]) == 0
    assert launched[1].config_file == "own.yaml"


def history(out: Path) -> list[dict]:
    return json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())["log_history"]


def assert_same_run(theirs: Path, mine: Path) -> None:
    for a, b in zip(history(theirs), history(mine), strict=True):
        assert a.keys() == b.keys()
        assert b == {key: pytest.approx(value, rel=1e-5, abs=1e-5) for key, value in a.items()}
    models = [transformers.AutoModelForCausalLM.from_pretrained(out) for out in (theirs, mine)]
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:'trl.scripts.dpo' found in sys.modules:RuntimeWarning")  # by the tests above
def test_the_script_gives_trls_numbers(folder, monkeypatch, capsys):
    monkeypatch.setattr(trl, "DPOTrainer", trl.DPOTrainer)  # and so it comes back
    monkeypatch.setattr(sys, "argv", ["dpo.py", "--config", "recipe.yaml", "--output_dir", "theirs"])
    runpy.run_module("trl.scripts.dpo", run_name="__main__", alter_sys=True)
    assert "dpo-fast" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["command.py", "--config", "recipe.yaml", "--output_dir", "mine"])
    command.run_script("dpo")
    line = f"dpo-fast trl dpo: trl.DPOTrainer is dpo_fast.trl.DPOTrainer; all else is TRL {trl.__version__}'s\n"
    assert line in capsys.readouterr().err
    assert trl.DPOTrainer.__module__ == "dpo_fast.trl"
    assert_same_run(folder / "theirs", folder / "mine")


@pytest.mark.slow
def test_from_the_command_line(folder):
    """Through accelerate, whose status and message it is where the script fails, as `trl dpo`'s."""
    command = [sys.executable, "-m", "dpo_fast.cli", "trl", "dpo", "--config", "recipe.yaml", "--output_dir"]
    done = subprocess.run([*command, "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "trl.DPOTrainer is dpo_fast.trl.DPOTrainer" in done.stderr and len(history(folder / "out")) == 3
    failed = subprocess.run([*command, "no", "--dataset_name", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 1 and "CalledProcessError" in failed.stderr
