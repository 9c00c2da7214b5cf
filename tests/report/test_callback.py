"""`ReportCallback` in three trainers: what it writes and when, and that training is the same with it."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers
from html_pages import check
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")

import datasets

from dpo_fast import FastDPOConfig, FastDPOTrainer
from dpo_fast.report import ReportCallback, callback
from dpo_fast.report.charts import logged_points

LN2 = pytest.approx(math.log(2), abs=1e-4)
TRLS_NAMES = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
TRLS_NAMES |= {"loss", "logps/chosen", "logps/rejected"}
OF_TOKENS = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}


def build(folder, kind="fast", callbacks=(), evaluation=6, model=None, **settings):
    """kind: fast, drop-in (of dpo_fast.trl) or trl."""
    settings = dict(
        QUIET | dict(logging_steps=3), output_dir=str(folder), per_device_train_batch_size=4, max_steps=7,
        learning_rate=1e-2, bf16=False,
    ) | settings  # fmt: skip
    if kind == "fast":
        trainer, config = FastDPOTrainer, FastDPOConfig
    else:
        trl = pytest.importorskip("trl")
        from dpo_fast.trl import DPOTrainer

        trainer, config = DPOTrainer if kind == "drop-in" else trl.DPOTrainer, trl.DPOConfig
        settings["gradient_checkpointing"] = False
    model = tiny_model() if model is None else model
    if kind != "fast" and not hasattr(model, "peft_config"):  # TRL loads its reference from where the model came from
        model.save_pretrained(folder / "base")
        model = str(folder / "base")
    return trainer(
        model,
        args=config(**settings),
        train_dataset=datasets.Dataset.from_list(tiny_rows(20)),
        eval_dataset=datasets.Dataset.from_list(tiny_rows(evaluation, seed=5)) if evaluation else None,
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


class Copies(transformers.TrainerCallback):
    """Keeps the page as it is after each step."""

    def __init__(self):
        self.pages = []

    def on_step_begin(self, args, state, control, **_):
        self.pages.append((state.global_step, open(f"{args.output_dir}/report.html", encoding="utf-8").read()))


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["fast", "drop-in", "trl"])
def test_page_lives_while_training_and_rests_after(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(callback, "PAUSE", 0.0)
    copies, report = Copies(), ReportCallback("<my run>")
    build(tmp_path, kind, [report, copies]).train()
    for step, page in copies.pages:
        check(page)
        logged = max((at for at in (0, 1, 3, 6) if at <= step), default=0)
        assert 'http-equiv="refresh"' in page and f"Training, step {logged} of 7" in page
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    check(page)
    assert "refresh" not in page and "&lt;my run&gt;" in page and "7 steps" in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["finished"] and results["steps"] == 7 and results["training_seconds"] > 0
    points = logged_points(results["log"], "loss")
    assert points[0] == (0, LN2) and [x for x, _ in points] == [0, 1.5, 4, 6]  # logs at steps 1, 3, 6, 7
    assert TRLS_NAMES <= {name for logs in results["log"] for name in logs}
    if kind == "trl":
        assert results["before"] == {} and "facts" not in results and "are held out" not in page
        return
    assert results["before"]["eval_loss"] == LN2 and results["after"]["eval_loss"] < 0.69
    assert logged_points(results["log"], "eval_loss")[0] == (0, LN2) and "Rewards of single pairs" in page
    assert len(results["evaluated_pairs"]["chosen_rewards"]) == 6
    how = {name: (value, why) for name, value, why in results["facts"]["how"]}
    assert how["layout"][0] == "shared_prefix" and how["reference"][1]
    assert results["facts"]["lengths"]["pairs"] == 20 and 0 < results["facts"]["lengths"]["scored"] < 1


@pytest.mark.thorough
def test_names_of_tokens_metrics_are_trls_too(tmp_path):
    trainer = build(tmp_path, extra_metrics=["entropy", "logits", "mean_token_accuracy"], evaluation=0, logging_steps=1)
    trainer.train()
    assert TRLS_NAMES | OF_TOKENS <= {name for logs in trainer.state.log_history for name in logs}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["fast", "drop-in"])
def test_training_is_the_same_with_a_report(tmp_path, kind):
    """Its dropout, too, which is drawn from the host's generator."""
    losses = []
    for callbacks in ([], [ReportCallback()]):
        model = tiny_model(attention_dropout=0.3)
        trainer = build(tmp_path, kind, callbacks, model=model, logging_steps=1, disable_dropout=False)
        trainer.train()
        losses.append([logs["loss"] for logs in trainer.state.log_history if "loss" in logs])
    assert losses[0] == losses[1] and len(losses[0]) == 7


@pytest.mark.thorough
@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is memory to pin")
@pytest.mark.parametrize("kind", ["fast", "drop-in"])
def test_no_warning_that_nobody_can_act_on(tmp_path, recwarn, kind):
    build(tmp_path, kind, [ReportCallback()], max_steps=1, use_cpu=False).train()
    said = [str(warning.message) for warning in recwarn if issubclass(warning.category, (UserWarning, FutureWarning))]
    assert not [line for line in said if "pin_memory" in line or (kind == "fast" and "deprecated" in line)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("fast", {}),
        ("drop-in", {}),
        ("drop-in", {"ld_alpha": 0.25}),
        ("drop-in", {"precompute_ref_log_probs": True}),
    ],
)
def test_values_of_pairs_are_those_of_the_means(tmp_path, kind, settings):
    # TRL weighs batches alike, so in its case they are of one size
    size = 3 if kind == "fast" else 7
    trainer = build(tmp_path, kind, evaluation=7, per_device_eval_batch_size=size, **settings)
    trainer.train()
    metrics, pairs = trainer.evaluate_pairs()
    assert pairs["total"] == 7 == len(pairs["chosen_rewards"])
    for side in ("chosen", "rejected"):
        mean = sum(pairs[f"{side}_rewards"]) / 7
        assert mean == pytest.approx(metrics[f"eval_rewards/{side}"], abs=1e-5) and mean != 0
        ids = f"{side}_ids"
        assert pairs[f"{side}_tokens"] == [len(row[ids]) for row in trainer.eval_dataset.to_list()]
    right = sum(c > r for c, r in zip(pairs["chosen_rewards"], pairs["rejected_rewards"], strict=True))
    assert right / 7 == pytest.approx(metrics["eval_rewards/accuracies"])
    assert trainer._of_pairs is None and trainer.evaluate()["eval_loss"] == metrics["eval_loss"]


@pytest.mark.thorough
def test_values_of_pairs_with_an_adapter(tmp_path):
    """The drop-in's reference is then a second adapter of the same model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules="all-linear"))
    trainer = build(tmp_path, "drop-in", evaluation=7, per_device_eval_batch_size=7, model=model)
    trainer.train()
    metrics, pairs = trainer.evaluate_pairs()
    assert sum(pairs["chosen_rewards"]) / 7 == pytest.approx(metrics["eval_rewards/chosen"], abs=1e-5)
    assert metrics["eval_rewards/chosen"] != 0


@pytest.mark.thorough
def test_terms_of_the_loss_add_up(tmp_path):
    trainer = build(tmp_path, evaluation=0, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], logging_steps=1)
    trainer.add_callback(ReportCallback())
    trainer.train()
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert logged[0]["loss/sigmoid"] == LN2 and logged[0]["loss/sft"] > 1
    for logs in logged:
        assert logs["loss/sigmoid"] + logs["loss/sft"] == pytest.approx(logs["loss"], abs=1e-3)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Terms of the loss, weighted" in page and "sigmoid, sft" in page and "eval_split: 0.1" in page


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["fast", "drop-in"])
def test_a_run_that_an_error_ends_says_so(tmp_path, kind):
    class Fails(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 4:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        build(tmp_path, kind, [ReportCallback(), Fails()], evaluation=0).train()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    check(page)
    assert "Ended early, after step 4 of 7" in page and "refresh" not in page


@pytest.mark.thorough
def test_a_killed_run_leaves_files_that_are_whole(tmp_path):
    code = (
        "import os, sys\nsys.path.insert(0, sys.argv[2])\nimport test_callback as t\n"
        "from dpo_fast.report import callback, files\n"
        "callback.PAUSE, writes, write = 0.0, [], files.write_text\n"
        "def kill(path, text):\n    writes.append(path)\n"
        "    with files.replace_file(path) as temporary:\n        temporary.write_text(text[: len(text) // 2])\n"
        "        if len(writes) > 7: os._exit(9)\n        temporary.write_text(text)\n"
        "callback.write_text = kill\n"
        "t.build(sys.argv[1], callbacks=[callback.ReportCallback()], evaluation=0, logging_steps=1).train()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), os.path.dirname(__file__)]
    assert subprocess.run(command, capture_output=True).returncode == 9
    check((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert json.loads((tmp_path / "results.json").read_text())["finished"] is False


@pytest.mark.thorough
def test_a_second_training_is_a_new_record(tmp_path):
    trainer = build(tmp_path, callbacks=[ReportCallback()], evaluation=0)
    trainer.train()
    trainer.args.max_steps = 3
    trainer.train()
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["steps"], results["max_steps"], results["finished"]) == (3, 3, True)
    assert results["counts"]["pairs"] == 12


@pytest.mark.thorough
def test_no_file_of_a_rank_that_is_not_the_first(tmp_path):
    report = ReportCallback()
    args = FastDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    state, control = transformers.TrainerState(is_world_process_zero=False, max_steps=1), transformers.TrainerControl()
    report.on_train_begin(args, state, control)
    state.global_step = 1
    assert report.on_step_end(args, state, control).should_log
    report.on_train_end(args, state, control)
    assert list(tmp_path.iterdir()) == [] and report.run["finished"]


def test_dropped_pairs_and_truncation_are_counted():
    pytest.importorskip("accelerate")
    from dpo_fast.training import facts
    from dpo_fast.training.data import Truncation, prepare_dataset

    said, rows = [], tiny_rows(9) + [{"prompt": "a", "chosen": " same", "rejected": " same"}]
    cut = Truncation(max_length=20)
    dataset = prepare_dataset(rows, tiny_tokenizer(), cut, said=said)
    assert said == ["train dataset: 1 of 10 pairs dropped: 1 equal completions"]
    found = facts.of_lengths(dataset, cut, "max_length 20")
    longer = [
        max(len(row["chosen_ids"]), len(row["rejected_ids"])) + len(row["prompt_ids"]) > 20 for row in dataset.to_list()
    ]
    assert found["pairs"] == found["looked_at"] == 9 and found["cut"] == sum(longer) and 0 < sum(longer) < 9
    longest = max(len(ids) for ids in dataset["chosen_ids"])
    assert found["parts"]["chosen"]["longest"] == longest
    assert facts.of_lengths(dataset.to_iterable_dataset(), cut, "") is None


def test_memory_is_that_of_this_process():
    from dpo_fast.report import record

    memory = record.peak_memory(torch.device("cpu"))
    assert memory is None or memory["of"].startswith("the process") and 50 < memory["mib"] < 2**20
