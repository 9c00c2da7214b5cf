"""Two processes train and evaluate as one does: the same losses, weights and metrics."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")

import datasets

from dpo_fast import FastDPOConfig, FastDPOTrainer

TIMES = ("runtime", "second", "preparation_time")


def trainer_of(output_dir, ranks: int, kind: str):
    """kind: full or lora; ahead: the reference scores the data before; simpo: a loss
    without reference; drop-in: of dpo_fast.trl."""
    settings = dict(
        **QUIET,
        output_dir=str(output_dir),
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        max_steps=3,
        learning_rate=1e-2,
        bf16="bf16" in kind,
    )
    train, evaluation, options = tiny_rows(8), tiny_rows(7, seed=3), {}
    if "lora" in kind:
        import peft

        modules = ["q_proj"] if "drop-in" in kind else ["q_proj", "lm_head"]
        options["peft_config"] = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
    if "drop-in" in kind:
        import trl

        from dpo_fast.trl import DPOTrainer

        trainer, args = DPOTrainer, trl.DPOConfig(**settings)
        train, evaluation = datasets.Dataset.from_list(train), datasets.Dataset.from_list(evaluation)
    else:
        # a mean over pairs and one over tokens; one without a reference
        losses = ["simpo"] if "simpo" in kind else ["sigmoid", "sft"]
        metrics = ["entropy", "logits", "mean_token_accuracy"]
        trainer, args = FastDPOTrainer, FastDPOConfig(**settings, extra_metrics=metrics, loss_type=losses)
        args.precompute_ref_log_probs = "ahead" in kind
    if "full" in kind:
        options["ref_model"] = tiny_model(seed=3)
    return trainer(
        tiny_model(),
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
        **options,
    )


def run(output_dir, ranks: int, kind: str) -> dict:
    """Three steps of 4 pairs, then an evaluation of 7 pairs in batches of 4: one short of what two ranks share. early:
    an evaluation before them, too."""
    trainer = trainer_of(output_dir, ranks, kind)
    if "early" in kind:
        trainer.evaluate()
    trainer.train()
    metrics, pairs = trainer.evaluate_pairs()
    if "drop-in" in kind:
        metrics = {}  # TRL counts repeated pairs
    found = {key: value for key, value in metrics.items() if not any(word in key for word in TIMES)}
    found |= {name: sum(value) if isinstance(value, list) else value for name, value in pairs.items()}
    found |= {f"loss {log['step']}": log["loss"] for log in trainer.state.log_history if "loss" in log}
    return found | {name: p.detach().norm().item() for name, p in trainer.model.named_parameters()}


SLOW = pytest.mark.slow
KINDS = ["full", "full ahead", pytest.param("lora", marks=SLOW), "lora early", pytest.param("simpo early", marks=SLOW)]
KINDS += ["lora early drop-in", pytest.param("lora early drop-in bf16", marks=SLOW)]
KINDS += [pytest.param("simpo early bf16", marks=SLOW)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one(tmp_path, kind):
    if "drop-in" in kind:
        pytest.importorskip("trl")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, __file__, str(tmp_path), kind]
    ranks = [
        subprocess.Popen(
            command,
            env={**environment, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    alone = run(tmp_path / "alone", 1, kind)
    results = [process.communicate() for process in ranks]
    for process, (_, errors) in zip(ranks, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    together, other = (json.loads(output.splitlines()[-1]) for output, _ in results)
    assert together == other
    close = dict(rel=2**-7, abs=2**-7) if "bf16" in kind else dict(rel=1e-5, abs=1e-6)
    assert together == pytest.approx(alone, **close)


@pytest.mark.parametrize("kind", ["lora", "lora drop-in"])
def test_ranks_that_would_train_alone_are_refused(tmp_path, monkeypatch, kind):
    """As under `accelerate launch --cpu` without use_cpu."""
    if "drop-in" in kind:
        pytest.importorskip("trl")
    before = trainer_of(tmp_path, 1, kind)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="started 2 processes .* use_cpu=True"):
        type(before)(tiny_model(), args=before.args, train_dataset=before.train_dataset)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], 2, sys.argv[2])), flush=True)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads at times abort a process that leaves the long way, with nothing left to do
