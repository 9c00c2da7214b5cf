"""`dpo-fast train`: what a run leaves, says and returns when it ends otherwise than planned, and where it may write."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import transformers
from tiny import save_inputs, tiny_model, tiny_rows

pytest.importorskip("datasets")

from safetensors.torch import load_file

from dpo_fast.cli import main
from dpo_fast.text import clean_logs
from dpo_fast.training import checkpoints, folder, outcome
from dpo_fast.training.trainer import FastDPOTrainer


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    made = tmp_path_factory.mktemp("here")
    save_inputs(made, 12)
    return made


@pytest.fixture
def run(here, tmp_path, capfd):
    """Options -> (status, last line on stderr, what was printed), in a folder of its own."""

    def train(*options, out="out"):
        capfd.readouterr()
        quiet = ["--use_cpu", "--report_to", "none", "--samples", "0", "--disable_tqdm", "true"]
        given = ["--model", here / "model", "--dataset", here / "pairs.jsonl", "--output_dir", tmp_path / out]
        few = ["--max_steps", "4", "--save_steps", "2", "--logging_steps", "1", "--per_device_train_batch_size", "2"]
        status = main(["train", *map(str, [*quiet, *given, *few, *options])])
        printed = capfd.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("dpo-fast train: ")]
        return status, lines[-1] if lines else "", printed.out + printed.err

    return train


def files_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}


# --- resuming --------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_one_line(run, tmp_path):
    assert run()[0] == 0
    before = files_of(tmp_path / "out")
    for where in ("true", tmp_path / "out" / "checkpoint-4"):
        status, _, printed = run("--resume_from_checkpoint", where)
        assert status == 0 and printed.count("was finished, at step 4 of 4; nothing was trained") == 1
    assert files_of(tmp_path / "out") == before
    status, _, printed = run("--resume_from_checkpoint", "--max_steps", "6")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert status == 0 and (results["first_step"], results["steps"]) == (4, 6)


def test_a_finished_run_without_checkpoints_is_not_trained_again(run):
    assert run("--save_strategy", "no")[0] == 0
    status, _, printed = run("--save_strategy", "no", "--resume_from_checkpoint")
    assert status == 0 and "has left no checkpoint to go on from; nothing was trained" in printed


def test_a_run_that_ended_before_its_model_was_saved_is_completed(run, tmp_path, monkeypatch):
    def killed(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr(FastDPOTrainer, "save_model", fails_at_the_end(killed))
        with pytest.raises(SystemExit):
            run()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert run("--resume_from_checkpoint")[0] == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    last = load_file(tmp_path / "out" / "checkpoint-4" / "model.safetensors")
    assert all((saved[name] == last[name]).all() for name in last)
    assert folder.read(tmp_path / "out").finished


def fails_at_the_end(fail):
    save = FastDPOTrainer.save_model

    def save_model(self, output_dir=None, _internal_call=False):
        return save(self, output_dir, _internal_call) if _internal_call else fail(self)

    return save_model


@pytest.mark.slow
def test_checkpoints_of_the_run_before_are_not_gone_on_from(run, tmp_path, caplog):
    """The second run in a folder is ended before its first checkpoint."""
    assert run("--max_steps", "6")[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FastDPOTrainer, "training_step", stop)
        assert run("--learning_rate", "1e-3")[0] == 130
    assert "which this one replaces" in caplog.text
    assert run("--learning_rate", "1e-3", "--resume_from_checkpoint")[0] == 0
    assert "passed over checkpoint-6 (of an earlier run)" in caplog.text and "begins at step 0" in caplog.text
    assert json.loads((tmp_path / "out" / "results.json").read_text())["first_step"] == 0


def stop(*_, **__):
    raise KeyboardInterrupt


def test_a_run_that_was_killed_before_it_had_a_marker(run, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    assert run("--resume_from_checkpoint")[0] == 0
    assert "no whole checkpoint in" in caplog.text and folder.read(tmp_path / "out").finished


UNFIT = {
    "nowhere": ("nowhere", "resume_from_checkpoint must be a folder with a trainer_state.json, or true"),
    "nothing yet": ("true", "there is no run to go on with, as there is no folder"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_nothing_to_go_on_from(run, name):
    where, said = UNFIT[name]
    status, line, _ = run("--resume_from_checkpoint", where)
    assert status == 2 and re.search(said, line)


def test_a_checkpoint_that_does_not_fit_is_bad_input(run, tmp_path):
    assert run()[0] == 0
    (tmp_path / "out" / "checkpoint-4" / "optimizer.pt").unlink()
    options = ["--max_steps", "6", "--resume_from_checkpoint", tmp_path / "out" / "checkpoint-4"]
    status, line, _ = run(*options)
    assert status == 2 and "optimizer.pt is missing" in line
    status, line, _ = run("--optim", "sgd", "--max_steps", "6", "--resume_from_checkpoint")
    assert status == 2 and "of another optimizer than SGD" in line


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_run_that_diverges_saves_no_model(run, tmp_path, caplog):
    assert run()[0] == 0
    model = (tmp_path / "out" / "model.safetensors").read_bytes()
    status, line, _ = run("--learning_rate", "1e9", "--max_steps", "6")
    assert status == 1
    assert re.search(
        r"has diverged: weights are not finite, since step \d.*the model is not saved, .* the numbers", line
    )
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == model
    assert sum("the loss is not finite" in record.getMessage() for record in caplog.records) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["steps"] == 6 and results["finished"] and not folder.read(tmp_path / "out").finished


def test_ctrl_c_is_one_line_that_says_how_to_go_on(run, monkeypatch):
    step = FastDPOTrainer.training_step

    def third(self, *arguments, **keywords):
        return step(self, *arguments, **keywords) if self.state.global_step < 2 else stop()

    monkeypatch.setattr(FastDPOTrainer, "training_step", third)
    status, line, _ = run()
    assert status == 130 and "interrupted at step 2 of 4; dpo-fast train --" in line
    assert line.endswith("--resume_from_checkpoint goes on from checkpoint-2")
    status, line, _ = run("--save_steps", "100", out="other")
    assert status == 130 and line.endswith("there is no checkpoint yet (save_steps is 100)")
    monkeypatch.setattr(outcome, "_answers", stop)
    status, line, _ = run(out="third")
    assert status == 130 and line.startswith("dpo-fast train: interrupted")


@pytest.mark.slow
def test_a_real_ctrl_c(here, tmp_path):
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "dpo_fast.cli",
        "train",
        "--model",
        here / "model",
        "--dataset",
        here / "pairs.jsonl",
    ]
    command += ["--output_dir", out, "--use_cpu", "--report_to", "none", "--max_steps", "100000", "--save_steps", "5"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while checkpoints.newest(out) is None and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors
    assert re.search(r"interrupted at step \d+ of 100000; .* goes on from checkpoint-\d+$", errors.strip())


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("kib", [pytest.param(60, marks=pytest.mark.slow), 150])
def test_files_that_cannot_be_written_are_one_line(here, tmp_path, kib):
    """In a process that may write no larger files: the weights have 146 KB, the optimizer's state twice that."""
    code = f"""
import resource, sys
from dpo_fast.cli import main
options = ["--model", {str(here / "model")!r}, "--dataset", {str(here / "pairs.jsonl")!r}, "--samples", "0"]
options += ["--output_dir", {str(tmp_path / "out")!r}, "--use_cpu", "--report_to", "none", "--max_steps", "4"]
import datasets
resource.setrlimit(resource.RLIMIT_FSIZE, ({kib} * 1024, {kib} * 1024))
sys.exit(main(["train", *options, "--save_steps", "2", "--logging_steps", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(r"checkpoint-2 could not be written to '.*': files may not be as large here; ", done.stderr)
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["ended_early"] and len(results["log"]) >= 1


def test_numbers_are_there_where_the_model_cannot_be_saved(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FastDPOTrainer, "save_model", fails_at_the_end(full))
    status, line, _ = run()
    assert status == 1 and re.search("the model could not be written to .*: the disk is full; .* MiB are free", line)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["finished"]
    assert checkpoints.newest(tmp_path / "out").name == "checkpoint-4"


# --- where it writes -------------------------------------------------------------------------------------------------


def test_the_models_own_folder(run, here, tmp_path):
    before = files_of(here / "model")
    (tmp_path / "link").symlink_to(here / "model")
    for place in (here / "model", tmp_path / "link", here / "model" / ".." / "model"):
        status, line, _ = run("--output_dir", place)
        assert (
            status == 2 and "is the model's own folder, which would be overwritten; " in line and "--overwrite" in line
        )
    status, line, _ = run("--ref_model", here / "model", "--model", here / "model", "--output_dir", here / "model")
    assert status == 2 and files_of(here / "model") == before


def test_a_checkpoint_in_the_folder_is_not_trained_from(run, tmp_path):
    assert run()[0] == 0
    status, line, _ = run("--model", tmp_path / "out" / "checkpoint-4")
    assert status == 2 and "model is in a checkpoint there, which may be overwritten" in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "results.json", "x.gguf", "adapter_config.json"])
def test_what_somebody_else_has_written(run, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    (out / "notes.txt").write_text("mine")
    status, line, _ = run()
    assert status == 2 and f"holds files that `dpo-fast train` has not written ({name})" in line
    assert files_of(out) == {name: b"mine", "notes.txt": b"mine"}
    assert run("--overwrite", "--max_steps", "1")[0] == 0 and (out / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_folder_of_ours_may_be_written_again(run, tmp_path, monkeypatch):
    """Also that of a run that was ended before it had written anything else."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(FastDPOTrainer, "training_step", stop)
        assert run()[0] == 130
    assert folder.read(tmp_path / "out").written_by == "dpo-fast train"
    assert run()[0] == 0 and run()[0] == 0


def test_the_demo_asks_too(tmp_path, capsys):
    (tmp_path / "results.json").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds files that `dpo-fast demo` has not written (results.json)" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == "mine"


# --- secrets and control characters ----------------------------------------------------------------------------------

SECRETS = {
    ("--hub_token", "hf_X"): "hf_X",
    ("--hub_token=hf_abcdefghijklmnop",): "hf_abcdefghijklmnop",
    ("--model_init_kwargs", '{"token": "geheim"}'): "geheim",
    ("--lr_scheduler_kwargs", "{}", "--run_name", "of hf_abcdefghijklmnop"): "hf_abcdefghijklmnop",
    ("--hub_model_id", "https://me:geheim@example.org/x"): "geheim",
}


@pytest.mark.parametrize("options", SECRETS)
def test_tokens_reach_neither_report_nor_results_nor_logs(run, tmp_path, options, caplog):
    _, _, printed = run("--max_steps", "1", *options)
    secret = SECRETS[options]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"report.html", "results.json", "dpo_fast_run.json"} <= {path.name for path in files}
    for path in files:
        given = "run_name" in str(options) or "hub_model_id" in str(options)
        if path.name != "training_args.bin" or not given:
            assert secret.encode() not in path.read_bytes(), path
    assert secret not in printed + caplog.text


def test_a_token_under_a_key_that_there_is_not(run, tmp_path):
    status, line, _ = run("--hf_tokn", "hf_abcdefghijklmnop", "--wandb_api_key", "0123456789abcdef")
    assert status == 2 and "hf_abc" not in line and "0123456789abcdef" not in line


def test_control_characters_of_the_data_stay_off_the_terminal(run, tmp_path):
    rows = tiny_rows(4)
    rows[0]["prompt"] = "\x1b[31mred\x07\x9b2J\u202e" + rows[0]["prompt"]
    path = tmp_path / "odd\x1b[2J.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, _, printed = run("--dataset", path, "--print_example", "--samples", "2", "--max_steps", "1")
    assert status == 0 and r"\x1b[31mred" in printed
    rows[1]["chosen"] = ["\x1b[31m"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, line, more = run("--dataset", path, "--max_steps", "1")
    assert status == 2 and line
    assert not set("\x1b\x07\x9b\u202e") & set(printed + more)


MERGES = [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 10)}]}}" for n in range(1, 9)]
BOMBS = {
    "lists in a mapping": ["lora_kwargs:", "  a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)],
    "lists in a list": ["loss_type:", "  - &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"  - &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)],
    "unknown keys": ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)],
    "merges": [f"m0: &m0 {{{', '.join(f'k{n}: 1' for n in range(10))}}}", *MERGES, "<<: *m8"],
    "nesting": ["beta: " + "[" * 3000 + "]" * 3000],
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_short_file_that_unfolds_is_an_error(tmp_path, capsys, name):
    path = tmp_path / "bomb.yaml"
    path.write_text("\n".join(["model: m", "dataset: d", *BOMBS[name]]))
    start = time.process_time()
    assert main(["train", str(path)]) == 2
    assert time.process_time() - start < 30
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpo-fast train: ") and len(line) < 1000


def test_only_text_of_secret_names_is_hidden():
    from dpo_fast.report.record import plain

    found = plain({"loss_per_token": 0.5, "eos_token": 3, "use_auth_token": "x", "deep": [{"api-key": "y"}], "a": "b"})
    assert found == {"loss_per_token": 0.5, "eos_token": 3, "use_auth_token": "(not shown)", "a": "b"} | {
        "deep": [{"api-key": "(not shown)"}]
    }


def test_transformers_knows_no_more_secrets_than_we(here):
    from dpo_fast import FastDPOConfig

    config = FastDPOConfig(hub_token="hf_abc", model_init_kwargs={"token": "hf_abc"}, report_to="none", use_cpu=True)
    assert "hf_abc" not in json.dumps(config.to_dict(), default=str) + str(config.to_sanitized_dict())
    assert isinstance(config, transformers.TrainingArguments)


SPELLED = 'Zq81KxPw"&ü77'  # a secret that JSON and HTML spell otherwise


@pytest.mark.parametrize("options", [("--run_name", f"of {SPELLED}"), ("--run_name", "api_key=Zq81Kx77")])
def test_secrets_are_hidden_before_they_are_spelled(run, tmp_path, monkeypatch, options):
    monkeypatch.setenv("MY_PASSWORD", SPELLED)
    monkeypatch.setenv("DB_PASSWORD", "finished")  # a word
    monkeypatch.setenv("X_TOKEN", '": {\n  "')
    _, _, printed = run("--max_steps", "1", *options)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["finished"] is True and "finished" in str(results.keys()) and "rewards/margins" in printed
    text = json.dumps(results, ensure_ascii=False) + (tmp_path / "out" / "report.html").read_text() + printed
    assert "Zq81Kx" not in text and "(not shown)" in results["settings"]["run_name"]


LEAKS = {
    "an open quote": 'hub_token: "{0}',
    "two colons": "hub_token: {0}: x",
    "a reserved sign": "hub_token: @{0}",
    "a list": "hub_token: [{0}, b]",
    "a mapping": "hub_token: {{a: {0}}}",
    "no mapping": "model_init_kwargs: 'token={0}'",
    "an alias": "hub_token: *{0}",
    "an address": "dataset: https://h.org/x.jsonl?token={0}",
    "a password in an address": "dataset: https://me:a@{0}@h.org/x.jsonl",
}


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("debug", [False, True])
def test_errors_show_no_secrets(tmp_path, capsys, name, debug):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        LEAKS[name].format("Zq81KxPw77Lm") + "\nmodel: nowhere\n" + "dataset: d\n" * ("dataset" not in LEAKS[name])
    )
    assert main(["train", str(path), *["--debug"] * debug]) == 2
    assert "Zq81Kx" not in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--hub_token", "Zq81KxPw77Lm", "abc"], ["-hub_token", "Zq81KxPw77Lm"]])
def test_options_that_are_wrong_show_no_secrets(capsys, options):
    assert main(["train", *options]) == 2
    assert "Zq81Kx" not in capsys.readouterr().err


def test_ordinary_text_is_not_hidden():
    from dpo_fast.text import clean, is_secret, remember, without_secrets

    remember({"eos_token": "training_seconds", "token": "training"})
    text = "http://x.org?q=1\nmail me@x.org, https://medium.com/@name training_seconds training"
    assert without_secrets(text) == text and not is_secret("eos_token") and is_secret("GITHUB_PAT")
    assert clean({"token": "x", "n": 1.5, "list": [True, None]}) == {"token": "x", "n": 1.5, "list": [True, None]}


def test_logs_of_libraries_and_paths_are_printable(run, here, tmp_path, capfd):
    odd = shutil.copytree(here / "model", tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "\x1b[31mEvil"}
    (odd / "config.json").write_text(json.dumps(config))
    _, _, printed = run("--model", odd, "--max_steps", "1", out="o\x1b[31mut")
    assert "\x1b" not in printed and r"o\x1b[31mut" in printed
    stream, logger = io.StringIO(), logging.getLogger("of_a_library")
    logger.addHandler(logging.StreamHandler(stream))
    clean_logs("of_a_library")
    logging.getLogger("of_a_library.below").warning("%s", "\x1b[31mEvil token=Zq81KxPw77Lm")
    assert stream.getvalue() == "\\x1b[31mEvil token=(not shown)\n"


def test_bytes_that_are_no_text(capsys):
    assert main(["train", "--run_name", "\udc80x"]) == 2
    assert r"'\udc80x' is not in UTF-8" in capsys.readouterr().err


# --- one folder, several runs ----------------------------------------------------------------------------------------


@pytest.fixture
def ended(run, monkeypatch):
    """Options -> a run that is ended after some steps."""

    def train(*options, after=3, **where):
        step = FastDPOTrainer.training_step

        def some(self, *arguments, **keywords):
            return step(self, *arguments, **keywords) if self.state.global_step < after else stop()

        with monkeypatch.context() as patch:
            patch.setattr(FastDPOTrainer, "training_step", some)
            assert run(*options, **where)[0] == 130

    return train


def losses(path: Path) -> list:
    log = json.loads((path / "results.json").read_text())["log"]
    return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in log if "loss" in entry]


@pytest.mark.parametrize("options", [("--lora_r", "4"), ("--save_strategy", "epoch", "--learning_rate", "1e-3")])
def test_files_of_an_earlier_run_do_not_stay_in_a_checkpoint(run, ended, tmp_path, options):
    """An adapter beside a whole model; another run's optimizer."""
    if "--lora_r" in options:
        pytest.importorskip("peft")
    assert run("--max_steps", "6", "--learning_rate", "5e-2")[0] == 0
    ended(*options, "--max_steps", "6")
    assert run(*options, "--max_steps", "6", "--resume_from_checkpoint")[0] == 0
    assert run(*options, "--max_steps", "6", out="alone")[0] == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "alone")


def test_checkpoints_without_an_optimizer_are_not_mixed_with_others(run, ended, caplog):
    assert run()[0] == 0
    ended("--save_only_model", "true")
    assert run("--save_only_model", "true", "--resume_from_checkpoint")[0] == 0
    assert "optimizer.pt is missing" in caplog.text and "begins at step 0" in caplog.text


def test_a_folder_holds_one_kind_of_weights(run, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    assert run("--lora_r", "2")[0] == 0 and (out / "adapter_model.safetensors").exists()
    assert run()[0] == 0
    assert (out / "model.safetensors").exists() and not list(out.glob("adapter_*"))
    assert run("--lora_r", "2")[0] == 0
    assert (out / "adapter_config.json").exists() and not (out / "model.safetensors").exists()
    (out / "model.safetensors").write_bytes(b"x")
    status, line, _ = run("--model", out, out="next")
    assert status == 2 and "holds the weights of a model and those of an adapter" in line


def test_the_base_of_an_adapter_is_not_written_over(run, tmp_path):
    pytest.importorskip("peft")
    assert run(out="base")[0] == 0
    assert run("--model", tmp_path / "base", "--lora_r", "2", out="adapter")[0] == 0
    status, line, _ = run("--model", tmp_path / "adapter", out="base")
    assert status == 2 and "is the folder of the base of model, which would be overwritten" in line


def test_an_adapter_goes_on_on_its_base_alone(run, ended, tmp_path):
    pytest.importorskip("peft")
    ended("--lora_r", "2")
    save_inputs(tmp_path / "other", model=tiny_model(seed=9))
    status, line, _ = run("--lora_r", "2", "--model", tmp_path / "other" / "model", "--resume_from_checkpoint")
    assert status == 2 and "it is of an adapter of another model" in line


def test_a_whole_model_goes_on_from_where_it_began(run, ended, tmp_path):
    """Its reference is what it began from."""
    ended()
    save_inputs(tmp_path / "other", model=tiny_model(seed=9))
    status, line, _ = run("--model", tmp_path / "other" / "model", "--resume_from_checkpoint")
    assert status == 2 and "it is of a run that began from other weights" in line
    reference_free = ["--loss_type", "simpo"]
    ended(*reference_free, out="free")
    assert run(*reference_free, "--model", tmp_path / "other" / "model", "--resume_from_checkpoint", out="free")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_goes_on_from_a_checkpoint_that_is_named_is_a_run_of_its_own(run, ended, tmp_path, elsewhere):
    """Not the run that had gone further from there."""
    assert run("--max_steps", "6")[0] == 0
    where = tmp_path / "out" / "checkpoint-2"
    out = "other" if elsewhere else "out"
    if elsewhere:
        assert run("--max_steps", "6", "--seed", "5", out="other")[0] == 0
    slower = ["--learning_rate", "1e-5", "--max_steps", "6"]
    ended(*slower, "--resume_from_checkpoint", where, after=3, out=out)
    assert run(*slower, "--resume_from_checkpoint", out=out)[0] == 0
    results = json.loads((tmp_path / out / "results.json").read_text())
    assert results["first_step"] == 2 and results["steps"] == 6
    assert losses(tmp_path / out)[3][2] < 1e-5


def test_other_settings_are_said(run, ended, caplog):
    ended()
    assert run("--beta", "0.3", "--max_steps", "6", "--resume_from_checkpoint")[0] == 0
    assert "other settings than it has had: beta (it was 0.1)" in caplog.text


def test_a_finished_run_is_finished_whatever_it_has_saved(run):
    best = ["--eval_split", "0.25", "--eval_strategy", "steps", "--eval_steps", "2", "--save_strategy", "best"]
    best += ["--metric_for_best_model", "loss", "--greater_is_better", "true", "--max_steps", "6"]
    assert run(*best)[0] == 0
    status, _, printed = run(*best, "--resume_from_checkpoint")
    assert status == 0 and "was finished, at step 6 of 6; nothing was trained" in printed


def test_checkpoints_of_somebody_else(run, tmp_path):
    precious = tmp_path / "out" / "checkpoint-2" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    status, line, _ = run("--save_total_limit", "1")
    assert status == 2 and "has not written (checkpoint-2)" in line and precious.exists()


def test_what_is_read_from_the_folder_is_kept(run, here, tmp_path):
    out = tmp_path / "out"
    assert run()[0] == 0
    (out / "checkpoint-4" / "policy").mkdir()
    for name in ("config.json", "model.safetensors"):
        (out / "checkpoint-4" / "policy" / name).write_bytes((here / "model" / name).read_bytes())
    status, line, _ = run("--model", out / "checkpoint-4" / "policy")
    assert status == 2 and "model is in a checkpoint there" in line
    status, line, _ = run("--dataset", out / "results.json")
    assert status == 2 and "dataset is results.json in it, which would be overwritten" in line


def test_an_empty_variable_is_no_folder(run):
    status, line, _ = run("--resume_from_checkpoint=")
    assert status == 2 and "resume_from_checkpoint must be true, false or a folder, got ''" in line
