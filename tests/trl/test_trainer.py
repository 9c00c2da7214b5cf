"""Against TRL's own trainer, on the same model, data and order of batches."""

import pytest
import torch
from tiny import QUIET, tiny_chat_rows, tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl

from dpo_fast import FastDPOConfig, FastDPOTrainer
from dpo_fast.training.data import Truncation, prepare_dataset

SETTINGS = dict(
    **QUIET,
    bf16=False,
    per_device_train_batch_size=3,
    max_steps=8,
    learning_rate=1e-3,
)
OF_PAIRS = ["loss", "grad_norm", "logps/chosen", "logps/rejected"]
OF_PAIRS += [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
# TRL averages the means of micro-batches, which is another number where they hold different numbers of tokens
OF_TOKENS = ["entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"]


def history(trainer_class, config_class, tmp_path, rows, peft_config=None, kind="llama", model=(), **options):
    extra = {} if config_class is trl.DPOConfig else dict(extra_metrics=["entropy", "logits", "mean_token_accuracy"])
    model = tiny_model(kind, **dict(model))
    for p in model.parameters():
        p.data.mul_(3 if p.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "model")
    trainer = trainer_class(
        str(tmp_path / "model"),
        args=config_class(output_dir=str(tmp_path), gradient_checkpointing=False, **SETTINGS, **options, **extra),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def assert_same_curves(ours, theirs, names=(*OF_PAIRS, *OF_TOKENS)):
    assert len(ours) == len(theirs) == SETTINGS["max_steps"]
    for mine, other in zip(ours, theirs, strict=True):
        for name in names:
            assert mine[name] == pytest.approx(other[name], abs=1e-4, rel=1e-4), f"step {mine['step']}: {name}"


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gradient_accumulation_steps=2),
        dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2]),
        dict(loss_type=["ipo"], ld_alpha=0.5),
        dict(use_weighting=True, truncation_mode="keep_end"),
    ],
    ids=["sigmoid", "accumulation", "sigmoid+sft", "ipo+ld", "wpo+keep_end"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_loss_curve_is_trls(tmp_path, options):
    rows = tiny_rows(12, seed=4)
    theirs = history(trl.DPOTrainer, trl.DPOConfig, tmp_path, rows, max_length=24, **options)
    ours = history(FastDPOTrainer, FastDPOConfig, tmp_path, rows, max_length=24, **options)
    assert_same_curves(ours, theirs, OF_PAIRS if "gradient_accumulation_steps" in options else OF_PAIRS + OF_TOKENS)
    assert abs(ours[-1]["loss"] - ours[0]["loss"]) > 1e-2


@pytest.mark.parametrize("coefficient", [None, 0.5])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_balancing_loss_of_experts(tmp_path, coefficient):
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key("aten::_grouped_mm", "CPU"):
        pytest.skip(f"torch {torch.__version__} cannot run transformers' experts on CPU: no grouped_mm there")
    rows = tiny_rows(12, seed=4)
    options = dict(kind="qwen3_moe", model=experts, router_aux_loss_coef=coefficient)
    theirs = history(trl.DPOTrainer, trl.DPOConfig, tmp_path, rows, **options)
    ours = history(FastDPOTrainer, FastDPOConfig, tmp_path, rows, **options)
    assert_same_curves(ours, theirs, [*OF_PAIRS, "aux_loss"])
    assert ours[0]["loss"] - 0.693147 == pytest.approx(ours[0]["aux_loss"] * (coefficient or 0.001), rel=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adalora(tmp_path):
    """PEFT adds its regulariser to a loss that TRL does not train on."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=20, init_r=4, target_modules=["q_proj", "v_proj"])
    rows = tiny_rows(12, seed=4)
    theirs = history(trl.DPOTrainer, trl.DPOConfig, tmp_path, rows, config)
    names = [name for name in (*OF_PAIRS, *OF_TOKENS) if "accuracies" not in name]  # margins are nearly 0 here
    assert_same_curves(history(FastDPOTrainer, FastDPOConfig, tmp_path, rows, config), theirs, names)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_chat_and_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    rows = tiny_chat_rows(12)
    theirs = history(trl.DPOTrainer, trl.DPOConfig, tmp_path, rows, config)
    assert_same_curves(history(FastDPOTrainer, FastDPOConfig, tmp_path, rows, config), theirs)


def test_tokens_are_trls():
    """Text and chat: the same prompt and completion ids as TRL's preparation gives."""
    tokenizer = tiny_tokenizer(bos=True)
    args = trl.DPOConfig(use_cpu=True, report_to="none", bf16=False)
    for rows in (tiny_rows(6), tiny_chat_rows(6)):
        table = datasets.Dataset.from_list(rows)
        fake = type("Trainer", (), {"_tokenizer": tokenizer})()
        theirs = trl.DPOTrainer._prepare_dataset(fake, table, tokenizer, args, "train")
        ours = prepare_dataset(table, tokenizer, Truncation())
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            assert list(ours[name]) == list(theirs[name])
