"""Which checkpoint a training goes on from, which it refuses and why, and what it does with it."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer
from trainers import TOKENIZER, fast_trainer

pytest.importorskip("datasets")

import accelerate
import datasets
import transformers

from dpo_fast.training import checkpoints
from dpo_fast.training.sampler import set_epoch
from dpo_fast.training.trainer import FastDPOTrainer

SETTINGS = dict(save_strategy="steps", save_steps=2, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2)


def peft_config(**changes):
    import peft

    return peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Name of a kind -> folder of a run of four steps with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("runs")
    fast_trainer(folder / "full", **SETTINGS).train()
    if importable("peft"):
        fast_trainer(folder / "lora", options=dict(peft_config=peft_config()), **SETTINGS).train()
    return folder


def importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


@pytest.fixture
def copy(runs, tmp_path):
    """kind -> a copy of its run, to be damaged."""

    def make(kind: str = "full") -> Path:
        if kind == "lora":
            pytest.importorskip("peft")
        return shutil.copytree(runs / kind, tmp_path / kind)

    return make


def resume(folder: Path, where, model=None, options=None, **changes):
    trainer = fast_trainer(folder, model, options=options, **{**SETTINGS, **changes})
    trainer.train(resume_from_checkpoint=where)
    return trainer


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [Path.unlink, cut], ids=["gone", "cut"])
def test_a_checkpoint_that_is_not_whole_is_named_and_passed_over(copy, caplog, name, damage):
    out = copy()
    damage(out / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=rf"checkpoint-4' is not a checkpoint .*{name.split('.')[0]}"):
        resume(out, str(out / "checkpoint-4"))
    with caplog.at_level(logging.WARNING, "dpo_fast"):
        trainer = resume(out, True)
    assert f"passed over checkpoint-4 ({name}" in caplog.text and "resuming from" in caplog.text
    assert f"{out / 'checkpoint-2'}, at step 2" in caplog.text
    assert trainer.state.global_step == 4 and not checkpoints.faults(out / "checkpoint-4")


def test_generators_may_be_missing(copy):
    out = copy()
    (out / "checkpoint-2" / "rng_state.pth").unlink()
    assert resume(out, str(out / "checkpoint-2")).state.global_step == 4


@pytest.mark.parametrize("where", [True, "checkpoint-4"])
@pytest.mark.parametrize("epochs", [False, True])
def test_a_finished_run_is_not_trained_a_step_further(copy, monkeypatch, where, epochs):
    """Also where the last step is in the middle of an epoch (8 pairs make 4 batches of 2, or 3 of 3)."""
    out = copy()
    changes = dict(max_steps=-1, num_train_epochs=1) if epochs else dict(per_device_train_batch_size=3)
    monkeypatch.setattr(FastDPOTrainer, "training_step", None)
    trainer = resume(out, where if where is True else str(out / where), **changes)
    assert trainer.state.global_step == 4
    saved = transformers.AutoModelForCausalLM.from_pretrained(out / "checkpoint-4")
    for (name, ours), theirs in zip(trainer.model.named_parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def experts():
    vocabulary = len(tiny_tokenizer())
    config = transformers.Qwen3MoeConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, moe_intermediate_size=24, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=4,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


def test_weights_that_are_saved_under_other_names_are_loaded(tmp_path):
    """Experts: Trainer leaves them as they were before training, with a line among others."""
    whole = fast_trainer(tmp_path, experts(), **SETTINGS)
    whole.train()
    resumed = resume(tmp_path, str(tmp_path / "checkpoint-2"), experts())
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_drop_in_loads_them_too(tmp_path):
    trl = pytest.importorskip("trl")

    from dpo_fast.trl import DPOTrainer

    settings = {**QUIET, **SETTINGS, "output_dir": str(tmp_path), "bf16": False, "gradient_checkpointing": False}
    built = [
        DPOTrainer(
            experts(),
            args=trl.DPOConfig(**settings),
            train_dataset=datasets.Dataset.from_list(tiny_rows(8)),
            processing_class=TOKENIZER,
            ref_model=experts(),
        )
        for _ in range(2)
    ]
    built[0].train()
    built[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(built[1].model.named_parameters(), built[0].model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_best_model_has_its_experts(tmp_path):
    settings = {**SETTINGS, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1.0}
    settings |= dict(load_best_model_at_end=True, metric_for_best_model="rewards/chosen")
    trainer = fast_trainer(tmp_path, experts(), options=dict(eval_dataset=tiny_rows(4)), **settings)
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    for (name, ours), theirs in zip(trainer.model.named_parameters(), best.named_parameters(), strict=True):
        assert torch.equal(ours, theirs[1]), name


def test_an_adapter_of_16_bits_stays_one(tmp_path):
    """PEFT turns an adapter that it loads to float32."""
    peft = pytest.importorskip("peft")

    def built():
        torch.manual_seed(0)
        config = peft_config(init_lora_weights=False)
        model = peft.get_peft_model(tiny_model().bfloat16(), config, autocast_adapter_dtype=False)
        return fast_trainer(tmp_path, model, **{**SETTINGS, "learning_rate": 0.5})

    whole, resumed = built(), built()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16 and torch.equal(ours, theirs), name


def test_weights_that_no_adapter_holds_are_not_taken_for_saved(tmp_path):
    peft = pytest.importorskip("peft")

    def built():
        model = peft.get_peft_model(tiny_model(), peft_config())
        model.get_base_model().model.norm.weight.requires_grad_(True)
        return fast_trainer(tmp_path, model, **SETTINGS)

    built().train()
    with pytest.raises(checkpoints.Unfit, match=r"1 weights that train belong to no adapter \(.*norm.weight"):
        built().train(resume_from_checkpoint=True)


def test_checkpoints_of_an_earlier_run_do_not_count(copy, caplog):
    out = copy()
    for step, run in ((2, "ours"), (4, "theirs")):
        checkpoints.write_progress(out / f"checkpoint-{step}", checkpoints.Progress(run))
    assert checkpoints.newest(out, "ours", say=True).name == "checkpoint-2"
    assert "passed over checkpoint-4 (of an earlier run)" in caplog.text
    assert checkpoints.newest(out).name == "checkpoint-4"
    (out / "checkpoint-4" / checkpoints.PROGRESS).unlink()  # another trainer's
    assert checkpoints.newest(out, "ours").name == "checkpoint-4"


def test_a_checkpoint_of_two_ranks_has_both_generators(copy):
    folder = copy() / "checkpoint-4"
    checkpoints.write_progress(folder, checkpoints.Progress(ranks=2))
    assert checkpoints.faults(folder) == ["rng_state_0.pth is missing", "rng_state_1.pth is missing"]


def test_sharded_checkpoints_are_taken_for_what_they_are(copy):
    """FSDP2's and DeepSpeed's own files have no config.json; only they can read them."""
    folder = copy() / "checkpoint-4"
    for name in ("config.json", "model.safetensors", "optimizer.pt"):
        (folder / name).unlink()
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "optimizer_0").mkdir()
    with pytest.raises(checkpoints.Unfit, match=r"pytorch_model_fsdp_0/\.metadata is missing"):
        checkpoints.check(folder, tiny_model())
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (folder / name / ".metadata").write_bytes(b"x")
    checkpoints.check(folder, tiny_model())
    shutil.rmtree(folder / "pytorch_model_fsdp_0")
    (folder / "global_step4").mkdir()
    with pytest.raises(checkpoints.Unfit, match="latest, which names DeepSpeed's folder"):
        checkpoints.check(folder, tiny_model())
    (folder / "latest").write_text("global_step4")
    checkpoints.check(folder, tiny_model())


def test_a_state_that_is_overwritten_is_no_checkpoint_meanwhile(copy, monkeypatch):
    out = copy()
    seen = []
    save = transformers.Trainer._save_checkpoint

    def spy(self, *arguments):
        seen.append(checkpoints.newest(out))
        return save(self, *arguments)

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", spy)
    resume(out, str(out / "checkpoint-2"))
    assert [path.name for path in seen] == ["checkpoint-2"] and checkpoints.newest(out).name == "checkpoint-4"


@pytest.mark.parametrize("where", ["torch", "safetensors", "os"])
def test_a_full_disk_is_said_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, where):
    from safetensors import SafetensorError

    errors = {
        "torch": RuntimeError(
            "[enforce fail at inline_container.cc:672] . unexpected pos 3003840 vs 3003728: No space left"
        ),
        "safetensors": SafetensorError("I/O error: No space left on device (os error 28)"),
        "os": OSError(28, "No space left on device"),
    }
    trainer = fast_trainer(tmp_path, **SETTINGS)
    save = trainer._save_optimizer_and_scheduler

    def fails(output_dir):
        if output_dir.endswith("checkpoint-4"):
            raise errors[where]
        save(output_dir)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fails)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written to .*: the disk is full; [\d,]+ MiB"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists() and checkpoints.newest(tmp_path).name == "checkpoint-2"


def stream(rows: int, drawn=None):
    def generate():
        yield from tiny_rows(rows)

    return datasets.IterableDataset.from_generator(generate)


def test_no_step_is_an_error(tmp_path):
    unusable = datasets.IterableDataset.from_generator(lambda: iter([{"prompt": "a", "chosen": "", "rejected": ""}]))
    for data, accumulation in ((unusable, 1), (stream(1), 2)):
        settings = dict(max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=accumulation)
        with pytest.raises(ValueError, match="no step was trained: the stream made no batch"):
            fast_trainer(tmp_path, train_dataset=data, **settings).train()


def test_batches_that_make_no_whole_step_of_a_stream_are_left_out(tmp_path, caplog):
    """Trainer adds their gradients to the first step of the next pass."""
    settings = dict(per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-2)
    odd = fast_trainer(tmp_path / "odd", train_dataset=stream(5), **settings)
    odd.train()
    assert "(1 of gradient_accumulation_steps=2) are left out" in caplog.text
    even = fast_trainer(
        tmp_path / "even", train_dataset=tiny_rows(5)[:4], train_sampling_strategy="sequential", **settings
    )
    even.train()
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (odd, even)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("changes", [{}, dict(tokens_per_batch=60)])
def test_groups_by_length_are_drawn_from_seed_and_epoch(tmp_path, changes):
    """Not from the global generator, and also where the first batches are skipped over, as a resumed run does."""
    settings = dict(per_device_train_batch_size=2, train_sampling_strategy="group_by_length")
    trainer = fast_trainer(tmp_path, train_dataset=tiny_rows(24), **settings, **changes)

    def batches(epoch: int, skipped: int = 0) -> list:
        loader = trainer.get_train_dataloader()
        set_epoch(loader, epoch)
        loader = accelerate.skip_first_batches(loader, skipped) if skipped else loader
        loader.set_epoch(epoch)
        return [batch["input_ids"].tolist() for batch in loader]

    first, second = batches(0), batches(1)
    torch.manual_seed(5)
    assert batches(1) == second != first and batches(1, skipped=3) == second[3:]


def test_loss_that_is_not_finite_is_said_once(tmp_path, caplog):
    """With the step and the pairs; weights that are not finite make no checkpoint."""

    class Poison(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    model.get_input_embeddings().weight[TOKENIZER("yes")["input_ids"][-1]] = torch.nan

    rows = tiny_rows(2) + [{"prompt": "a b", "chosen": " a b", "rejected": " b"}]
    rows = [rows[2], rows[2], rows[2], rows[2], rows[0], rows[2], rows[0], rows[2]]
    changes = {**SETTINGS, "logging_steps": 4, "train_sampling_strategy": "sequential"}
    trainer = fast_trainer(tmp_path, train_dataset=rows, options=dict(callbacks=[Poison()]), **changes)
    trainer.train()
    said = [record.getMessage() for record in caplog.records if "not finite (" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("step 3: the loss is not finite (nan)")
    assert trainer.first_bad_step == 3 and not trainer.is_finite()
    assert "checkpoint-4 is not written: weights" in caplog.text and not (tmp_path / "checkpoint-4").exists()
    assert "of 1 of its 2 pairs" in said[0] or "of 2 of its 2 pairs" in said[0]


def test_runs_that_are_killed():
    """One kill of each of the first six kinds of `make faults`."""
    script = Path(__file__).parents[1] / "faults.py"
    done = subprocess.run([sys.executable, script, "--kills", "6"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 of 6" in done.stdout


def test_progress_of_others_is_unknown(tmp_path):
    assert checkpoints.read_progress(tmp_path) is None
    (tmp_path / checkpoints.PROGRESS).write_text(json.dumps({"run": "x", "later": 1}))
    assert checkpoints.read_progress(tmp_path) is None
