"""`dpo_fast.trl` keeps TRL's reference, and says where that is not the model before training."""

import copy
import logging

import pytest
import torch
from tiny import tiny_model, tiny_rows, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from dpo_fast.trl import DPOTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def lora(**options):
    return peft.LoraConfig(r=4, target_modules=["q_proj"], **options)


def prompt():
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)


def given(change=lambda model: None, **options):
    model = peft.get_peft_model(tiny_model(), lora(**options))
    change(model)
    return dict(model=model)


def unfreeze_norms(model):
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "norm" in name)


def add_second(model):
    model.add_adapter("second", lora())
    model.base_model.set_adapter(["default", "second"])


CASES = {
    "new": (lambda: dict(model=tiny_model(), peft_config=lora()), None),
    "given": (given, None),
    "prompt": (lambda: dict(model=tiny_model(), peft_config=prompt()), None),
    "given prompt": (lambda: dict(model=peft.get_peft_model(tiny_model(), prompt())), None),
    "reference model": (lambda: dict(ref_model=tiny_model(), **given(unfreeze_norms)), None),
    "pissa": (
        lambda: dict(model=tiny_model(), peft_config=lora(init_lora_weights="pissa")),
        "adding an adapter has rewritten 2 weights of the model, model.layers.0.self_attn.q_proj.weight the first",
    ),
    "given pissa": (lambda: given(init_lora_weights="pissa"), "adding an adapter has rewritten 2 weights"),
    "norms": (lambda: given(unfreeze_norms), "5 parameters train that belong to no adapter"),
    "two": (lambda: given(add_second), "of the active adapters default, second one alone stays active"),
}


def trainer_of(tmp_path, **options):
    args = trl.DPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=3,
        max_steps=3,
        learning_rate=1e-2,
    )
    rows = datasets.Dataset.from_list(tiny_rows(6))
    return DPOTrainer(args=args, train_dataset=rows, processing_class=tiny_tokenizer(), **options)


@pytest.mark.parametrize("name", CASES)
def test_what_is_said(tmp_path, caplog, name):
    options, reason = CASES[name]
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        trainer_of(tmp_path, **options())
    said = [message for message in caplog.messages if "reference is not the model before training" in message]
    assert [reason in message for message in said] == ([] if reason is None else [True])


def test_a_reference_copied_from_a_patched_model(tmp_path):
    """Neither trainer's forward on the original answers for the copy."""
    model = tiny_model()
    trl.trainer.dpo_trainer.add_fused_lm_head(model)
    reference = copy.deepcopy(model)
    trainer = trainer_of(tmp_path, model=model, ref_model=reference)
    ids = torch.arange(3, 9)[None]

    def logits(model):
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    before = logits(reference)
    trainer.train()
    assert torch.equal(logits(reference), before) and not torch.equal(logits(model), before)
