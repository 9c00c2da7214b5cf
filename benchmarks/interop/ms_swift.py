"""ms-swift's own entry, `rlhf_main` with the options of its command line: its data, its template, its trainer."""

import json

from .task import ADAM_EPSILON, BETA, LEARNING_RATE, LONGEST, PAIRS, STEPS, Task, Watch, logged

OPTIONS = {
    "rlhf_type": "dpo",
    "model_type": "llama",
    "template": "task",
    "tuner_type": "full",
    "torch_dtype": "float32",
    "attn_impl": "sdpa",
    "use_hf": True,
    "max_length": LONGEST,
    "beta": BETA,
    "per_device_train_batch_size": PAIRS,
    "gradient_accumulation_steps": 1,
    "max_steps": STEPS,
    "learning_rate": LEARNING_RATE,
    "adam_epsilon": ADAM_EPSILON,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "gradient_checkpointing": False,
    "dataset_shuffle": False,
    "train_dataloader_shuffle": False,
    "split_dataset_ratio": 0.0,
    "dataloader_num_workers": 0,
    "dataset_num_proc": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "add_version": False,
    "create_checkpoint_symlink": False,
    "load_from_cache_file": False,
}


def write_pairs(task: Task) -> str:
    """In its own format, to a file."""
    rows = []
    for pair in task.pairs():
        turns = [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair["chosen"]}]
        rows.append(json.dumps({"messages": turns, "rejected_response": pair["rejected"]}))
    path = task.folder / "swift.jsonl"
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def main() -> None:
    task = Task.of_command_line()
    from swift.callbacks import callbacks_map
    from swift.pipelines import rlhf_main
    from swift.template import TemplateMeta, register_template

    callbacks_map["watch"] = Watch
    register_template(TemplateMeta("task", prefix=[], prompt=["{{QUERY}}"], chat_sep=[], suffix=[["eos_token_id"]]))
    if task.way == "after":
        # swap: before
        # swap: after
        from dpo_fast.integrations import ms_swift

        ms_swift.swap()
        # swap: end
    paths = {"model": task.model, "dataset": write_pairs(task), "output_dir": str(task.folder / "swift")}
    options = {**OPTIONS, **paths, "callbacks": "watch"}
    rlhf_main([text for name, value in options.items() for text in (f"--{name}", str(value))])
    watch = Watch.last
    task.write(**logged(watch), weights=watch.model.state_dict(), measured=watch.measure.measured())


if __name__ == "__main__":
    main()
