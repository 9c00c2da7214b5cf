"""LLaMA-Factory's own entry, `run_exp` with the options of a YAML: its data, collator, workflow and trainer."""

import importlib.machinery
import importlib.util
import json
import sys
import types

from .task import ADAM_EPSILON, BETA, LEARNING_RATE, LONGEST, PAIRS, STEPS, Task, Watch, logged

OPTIONS = {
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "full",
    "template": "empty",
    "dataset": "pairs",
    "cutoff_len": LONGEST,
    "disable_shuffling": True,
    "pref_loss": "sigmoid",
    "pref_beta": BETA,
    "per_device_train_batch_size": PAIRS,
    "max_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "adam_epsilon": ADAM_EPSILON,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "disable_gradient_checkpointing": True,
    "overwrite_output_dir": True,
    "overwrite_cache": True,
}


def without_torchaudio() -> None:
    """It is imported at the top of what loads text, and has no build for a torch without CUDA; no audio comes here."""
    if importlib.util.find_spec("torchaudio") is None:
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        sys.modules["torchaudio"] = module


def write_data(task: Task) -> str:
    """The pairs in its own format, to a folder."""
    folder = task.folder / "llamafactory"
    folder.mkdir(exist_ok=True)
    texts = [
        {"instruction": pair["prompt"], "chosen": pair["chosen"], "rejected": pair["rejected"]} for pair in task.pairs()
    ]
    (folder / "pairs.json").write_text(json.dumps(texts), encoding="utf-8")
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return str(folder)


def main() -> None:
    task = Task.of_command_line()
    without_torchaudio()
    from llamafactory.train.tuner import run_exp

    if task.way == "after":
        # swap: before
        # swap: after
        from dpo_fast.integrations import llamafactory

        llamafactory.swap()
        # swap: end
    watch = Watch()
    paths = {"model_name_or_path": task.model, "dataset_dir": write_data(task)}
    run_exp({**OPTIONS, **paths, "output_dir": str(task.folder / "out")}, callbacks=[watch])
    found = logged(watch)
    for name in ("logits/chosen", "logits/rejected"):  # over padding and prompts; after, over completions
        found["metrics"].pop(name)
    task.write(**found, weights=watch.model.state_dict(), measured=watch.measure.measured())


if __name__ == "__main__":
    main()
