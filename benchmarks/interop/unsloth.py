"""TRL's DPOTrainer with a model that Unsloth has loaded, on its CPU backend: LoRA, as its guides train.

On a GPU Unsloth puts attention of its own into the model and patches TRL's trainer; here it does neither.
"""

import unsloth  # noqa: I001  first, as it asks to be

import datasets
import torch

from .task import ADAM_EPSILON, DPO_SETTINGS, LEARNING_RATE, LONGEST, SEED, Measure, Task, logged


def main() -> None:
    task = Task.of_command_line()
    if task.way == "before":
        # swap: before
        from trl import DPOConfig, DPOTrainer
        # swap: after
    else:
        from dpo_fast.trl import DPOConfig, DPOTrainer
        # swap: end
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        task.model, max_seq_length=2 * LONGEST, dtype=torch.float32, load_in_4bit=False
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=names, use_gradient_checkpointing=False, random_state=SEED
    )
    for_lora = dict(learning_rate=100 * LEARNING_RATE, adam_epsilon=10 * ADAM_EPSILON)
    measure = Measure()
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(task.folder / "unsloth"), **{**DPO_SETTINGS, **for_lora}),
        train_dataset=datasets.Dataset.from_list(
            [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in task.pairs()]
        ),
        processing_class=tokenizer,
        callbacks=[measure.callback()],
    )
    with measure:
        trainer.train()
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    task.write(**logged(trainer), weights=weights, measured=measure.measured())


if __name__ == "__main__":
    main()
