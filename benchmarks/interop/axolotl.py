"""Axolotl's own entry, `do_train` with a YAML: its data, its builder, its trainer."""

import json
import os

import yaml

from .task import ADAM_EPSILON, BETA, LEARNING_RATE, LONGEST, PAIRS, STEPS, Measure, Task, logged

OPTIONS = {
    "rl": "dpo",
    "rl_beta": BETA,
    "sequence_len": LONGEST,
    "micro_batch_size": PAIRS,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "max_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "adam_epsilon": ADAM_EPSILON,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "attn_implementation": "sdpa",
    "gradient_checkpointing": False,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "skip_prepare_dataset": False,
    "dataset_num_proc": 1,
}


def write_config(task: Task, more: dict) -> str:
    """The pairs, and a YAML, to a folder."""
    folder = task.folder / "axolotl"
    folder.mkdir(exist_ok=True)
    rows = [json.dumps({name: pair[name] for name in ("prompt", "chosen", "rejected")}) for pair in task.pairs()]
    (folder / "pairs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = {"path": str(folder / "pairs.jsonl"), "ds_type": "json", "split": "train", "type": "passthrough"}
    paths = {"base_model": task.model, "datasets": [data], "output_dir": str(folder / "out")}
    paths["dataset_prepared_path"] = str(folder / f"prepared-{task.way}")
    (folder / "dpo.yaml").write_text(yaml.safe_dump({**OPTIONS, **paths, **more}), encoding="utf-8")
    return str(folder / "dpo.yaml")


def main() -> None:
    task = Task.of_command_line()
    os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_preference_datasets
    from axolotl.train import setup_model_and_trainer

    options = {}
    if task.way == "after":
        # swap: before
        # swap: after
        options["trainer_cls"] = "dpo_fast.integrations.axolotl.DPOTrainer"
        # swap: end
    config = load_cfg(write_config(task, options))
    trainer, *_ = setup_model_and_trainer(config, load_preference_datasets(cfg=config))
    measure = Measure()
    trainer.add_callback(measure.callback())
    with measure:
        trainer.train()
    task.write(**logged(trainer), weights=trainer.model.state_dict(), measured=measure.measured())


if __name__ == "__main__":
    main()
