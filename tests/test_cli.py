"""The command line: quick to answer, one sentence for what it cannot use, a trained model and a report otherwise."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import save_inputs, tiny_rows

pytest.importorskip("datasets")

import datasets

from dpo_fast.cli import COMMANDS, main
from dpo_fast.training import launch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model directory, a JSONL file and a config that uses both."""
    folder = tmp_path_factory.mktemp("cli")
    save_inputs(folder, 8)
    config = {
        "model": str(folder / "model"),
        "dataset": str(folder / "pairs.jsonl"),
        "learning_rate": "5e-3",  # text, as YAML 1.1 reads it
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.5],
        "disable_dropout": False,
        "lr_scheduler_kwargs": {},
        "eval_dataset": None,
        "sample_tokens": 3,
        "use_cpu": True,
        "output_dir": str(folder / "out"),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def run(*arguments: str) -> int:
    return main([str(argument) for argument in arguments])


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys, dpo_fast.cli\n"
        "try: dpo_fast.cli.main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'datasets', 'matplotlib', 'yaml'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_unknown_command_and_option_end_with_status_2(capsys):
    for arguments in (["traim"], [], ["demo", "--nope"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2
    capsys.readouterr()


def test_train_help_lists_every_key(capsys):
    assert run("train", "--help") == 0
    text = capsys.readouterr().out
    for key in ("model", "lora_r", "beta", "loss_type", "learning_rate", "eval_split", "seed"):
        assert f"--{key} " in text
    assert "Strength of the pull towards the reference" in " ".join(text.split())


def test_options_win_over_the_file_and_are_typed(files):
    job, config = launch.read_job([str(files / "config.yaml"), "--beta", "0.3", "--max_steps=5", "--eval-steps", "7"])
    assert (config.learning_rate, config.beta, config.max_steps, config.eval_steps) == (5e-3, 0.3, 5, 7)
    assert config.loss_type == ["sigmoid", "sft"] and config.loss_weights == [1.0, 0.5]
    assert config.disable_dropout is False and config.use_cpu is True and job.lora_r is None
    assert job.given["max_steps"] == "5" and job.given["eval_steps"] == "7" and job.given["loss_weights"] == "1.0 0.5"


def test_train_leaves_a_model_numbers_and_a_report(files, capsys):
    out = files / "out"
    assert run("train", files / "config.yaml", "--eval_dataset", files / "pairs.jsonl", "--loss_type", "sigmoid",
               "--loss_weights", "1.0") == 0  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"]
    assert results["steps"] == 2 and results["pairs"] == 8 and len(results["samples"]) == 4
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()
    page = (out / "report.html").read_text()
    assert "DPO on pairs.jsonl" in page and "learning_rate" in page and "<svg" in page
    assert "evaluation data" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["json", "parquet", "saved"])
def test_train_with_lora_on_other_kinds_of_files(files, kind, tmp_path):
    pytest.importorskip("peft")
    dataset = datasets.Dataset.from_list(tiny_rows(4))
    source = tmp_path / f"pairs.{kind}"
    save = {"json": dataset.to_json, "parquet": dataset.to_parquet, "saved": dataset.save_to_disk}[kind]
    save(str(source))
    options = ["--lora_r", "2", "--max_steps", "1", "--samples", "0", "--output_dir", tmp_path / "out"]
    assert run("train", files / "config.yaml", "--dataset", source, *options) == 0
    assert (tmp_path / "out" / "adapter_config.json").is_file() and (tmp_path / "out" / "report.html").is_file()


def test_the_example_config_names_known_keys_and_the_demos_files():
    values = yaml.safe_load((ROOT / "examples" / "format.yaml").read_text())
    job, config = launch.read_job([str(ROOT / "examples" / "format.yaml")])
    assert job.model == "runs/demo/base" and job.dataset == "runs/demo/format_pairs.jsonl"
    assert config.beta == values["beta"] and config.optim == "sgd" and str(config.save_strategy.value) == "no"


@pytest.mark.parametrize("script", ["own_loop", "chat_lora"])
def test_examples_run(script, tmp_path, capsys, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(script, ROOT / "examples" / f"{script}.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(steps=5)
    assert "0.6931" in capsys.readouterr().out  # ln 2, before the first step


def test_bench_runs_the_checkouts_benchmarks(capsys):
    assert main(["bench", "level1", "--N", "4", "--V", "64", "--rounds", "1", "--no-save"]) == 0
    assert "share_of_copy" in capsys.readouterr().out
    assert main(["bench", "heads"]) == 2
    assert "name one of head, level1" in capsys.readouterr().err


def test_a_share_of_the_data_is_held_out(files, capsys):
    out = files / "shared"
    options = ["--eval_split", "0.25", "--samples", "0", "--loss_type", "sigmoid", "--loss_weights", "1"]
    assert run("train", files / "config.yaml", *options, "--output_dir", out) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["pairs"] == 6 and results["evaluated_pairs"]["total"] == 2
    assert results["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert results["command"].startswith("dpo-fast train ") and "--eval_split 0.25" in results["command"]
    printed = capsys.readouterr().out
    assert "no pairs are held out" not in printed and "hardly moved" not in printed
    assert run("report", out, out, "--output", out / "side.html") == 0
    assert "0.6931" in (out / "side.html").read_text()


def test_a_pipe_that_is_closed_is_no_traceback():
    command = f"{sys.executable} -m dpo_fast.cli train --help | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.startswith("usage: dpo-fast train") and "Traceback" not in run.stderr, run.stderr


def test_a_model_that_has_hardly_moved_is_said(files, capsys):
    options = ["--samples", "0", "--max_steps", "2", "--learning_rate", "1e-9", "--output_dir", files / "still"]
    assert run("train", files / "config.yaml", *options) == 0
    assert "after 2 steps at a learning_rate of 1e-09; more steps or a larger one" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["prompts", "conversations"])
def test_all_pairs_of_a_prompt_are_on_one_side(kind, caplog):
    def row(n: int) -> dict:
        ask, answer = dict(role="user", content=f"prompt {n % 7}"), dict(role="assistant", content=f"answer {n}")
        if kind == "prompts":
            return {"prompt": f"prompt {n % 7}", "chosen": f"answer {n}", "rejected": ""}
        return {"chosen": [ask, answer], "rejected": [ask, answer]}

    rows = datasets.Dataset.from_list([row(n) for n in range(35)])
    trained, held_out = launch._hold_out(rows, 0.2, 3)
    prompts = [{launch._prompt_of(row) for row in part} for part in (trained, held_out)]
    assert not prompts[0] & prompts[1] and len(trained) + len(held_out) == 35 and len(held_out) == 10
    assert "35 pairs have 7 prompts; all pairs of a prompt are held out, or none" in caplog.text
    with pytest.raises(launch.BadInput, match="0.5 of pairs that all have the same prompt leaves none"):
        launch._hold_out(rows.filter(lambda row: "prompt 3" in str(row)), 0.5, 3)


def test_what_is_held_out_depends_on_the_seed_alone():
    rows = datasets.Dataset.from_list([{"n": n} for n in range(40)])
    first, again, other = (launch._hold_out(rows, 0.1, seed)[1].to_list() for seed in (1, 1, 2))
    assert first == again != other and len(first) == 4
    trained, held_out = launch._hold_out(rows, 0.001, 0)
    assert sorted(row["n"] for part in (trained, held_out) for row in part) == list(range(40)) and len(held_out) == 1


def test_without_evaluation_data_the_command_says_how_to_hold_some_out(files, capsys):
    assert run("train", files / "config.yaml", "--samples", "0", "--output_dir", files / "plain") == 0
    assert "eval_split: 0.1" in capsys.readouterr().out
    assert "eval_split: 0.1" in (files / "plain" / "report.html").read_text()
