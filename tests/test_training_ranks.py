"""Two processes train and evaluate as one does: the same losses, weights and metrics."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")

from dpo_fast import FastDPOConfig, FastDPOTrainer


def run(output_dir, ranks: int, adapter: bool) -> dict:
    """Three steps of 4 pairs, then an evaluation of 7 pairs in batches of 4: one short of what two ranks share."""
    options = {}
    if adapter:
        import peft

        options["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    args = FastDPOConfig(
        output_dir=str(output_dir),
        **QUIET,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        max_steps=3,
        learning_rate=1e-2,
        extra_metrics=["entropy", "logits", "mean_token_accuracy"],
        loss_type=["sigmoid", "sft"],  # a mean over pairs and one over tokens
    )
    trainer = FastDPOTrainer(
        tiny_model(),
        ref_model=None if adapter else tiny_model(seed=3),
        args=args,
        train_dataset=tiny_rows(8),
        eval_dataset=tiny_rows(7, seed=3),
        processing_class=tiny_tokenizer(),
        **options,
    )
    trainer.train()
    metrics = trainer.evaluate()
    found = {key: value for key, value in metrics.items() if "runtime" not in key and "second" not in key}
    found |= {f"loss {log['step']}": log["loss"] for log in trainer.state.log_history if "loss" in log}
    return found | {name: p.detach().norm().item() for name, p in trainer.model.named_parameters()}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("adapter", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_two_ranks_are_one(tmp_path, adapter):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, __file__, str(tmp_path), str(int(adapter))]
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
    alone = run(tmp_path / "alone", 1, adapter)
    results = [process.communicate() for process in ranks]
    for process, (_, errors) in zip(ranks, results, strict=True):
        assert process.returncode == 0, errors[-3000:]
    together = json.loads(results[0][0].splitlines()[-1])
    assert together == pytest.approx(alone, rel=1e-5, abs=1e-6)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(run(sys.argv[1], 2, bool(int(sys.argv[2])))), flush=True)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads at times abort a process that leaves the long way, with nothing left to do
