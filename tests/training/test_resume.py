"""A trained adapter that is killed and resumed ends where one that was left alone does, bit for bit on CPU; other kinds
of runs: faults.py."""

import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from tiny import tiny_model, tiny_rows
from trainers import fast_trainer

pytest.importorskip("datasets")


DIES_AT = 5


class Die(transformers.TrainerCallback):
    """SIGKILL: no handler, no clean-up, nothing flushed."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == DIES_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer(output_dir, callbacks=None):
    """With dropout and shuffling, so that every random generator matters; a checkpoint after steps 2 and 4."""
    import peft

    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(), config)
    settings = dict(
        save_strategy="steps",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=8,
        save_steps=2,
        learning_rate=1e-2,
        disable_dropout=False,
    )
    return fast_trainer(output_dir, model, tiny_rows(9), options=dict(callbacks=callbacks), **settings)


def history(trainer):
    volatile = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}
    return [
        {key: value for key, value in log.items() if key not in volatile}
        for log in trainer.state.log_history
        if "loss" in log
    ]


def test_killed_and_resumed(tmp_path):
    pytest.importorskip("peft")
    command = [sys.executable, __file__, str(tmp_path / "killed"), str(torch.get_num_threads())]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    whole = trainer(tmp_path / "whole")
    whole.train()
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors[-3000:]
    assert not (tmp_path / "killed" / "checkpoint-6").exists()

    resumed = trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    assert [log["step"] for log in history(resumed)] == list(range(1, 9))
    assert history(resumed) == history(whole)
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    trainer(sys.argv[1], callbacks=[Die()]).train()
