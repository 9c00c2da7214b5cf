"""OpenRLHF's DPOTrainer and its dataset; its strategy, which wants CUDA, is one of plain torch here.

OpenRLHF imports four functions of flash-attn, which has no build for a CPU: they stand here, and are not called.
"""

import sys
import types

import datasets
import torch
import transformers

from .task import ADAM_EPSILON, BETA, LEARNING_RATE, LONGEST, PAIRS, Measure, Task


def without_flash_attn() -> None:
    def absent(*args, **kwargs):
        raise NotImplementedError("flash-attn is not here")

    for name, functions in {  # not flash_attn itself, which transformers would find
        "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
        "flash_attn.utils.distributed": ("all_gather",),
    }.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(dict.fromkeys(functions, absent))


class Strategy:
    """What the trainer asks of its DeepSpeed strategy, for one process; notes gradients' norms and logs."""

    ring_attn_group, accumulated_gradient = None, 1

    def __init__(self, measure: Measure):
        self.measure, self.norm, self.logs = measure, 0.0, []
        spaces = {
            "model": dict(label_smoothing=0.0, ipo_enable=False, aux_loss_coef=0.0, nll_loss_coef=0.0),
            "ds": dict(packing_samples=False),
            "logger": dict(logging_steps=1, tensorboard_dir=None, wandb=types.SimpleNamespace(key=None)),
            "eval": dict(steps=10**9),
            "ckpt": dict(save_steps=10**9),
            "train": dict(batch_size=PAIRS),
            "data": dict(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected", apply_chat_template=False),
        }
        self.args = types.SimpleNamespace(**{name: types.SimpleNamespace(**space) for name, space in spaces.items()})

    def is_rank_0(self) -> bool:
        return True

    def backward(self, loss, model, optimizer) -> None:
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler) -> None:
        self.norm = float(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()))
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

    def get_grad_norm(self, model) -> float:
        return self.norm

    def all_reduce(self, logs: dict) -> dict:
        """Called once per step, with what is logged."""
        self.logs.append(logs)
        self.measure.step()
        return logs


def main() -> None:
    task = Task.of_command_line()
    without_flash_attn()
    from openrlhf.datasets import RewardDataset
    from openrlhf.models import Actor

    if task.way == "before":
        # swap: before
        from openrlhf.trainer.dpo_trainer import DPOTrainer
        # swap: after
    else:
        from dpo_fast.integrations.openrlhf import DPOTrainer
        # swap: end
    measure = Measure()
    strategy = Strategy(measure)
    tokenizer = transformers.AutoTokenizer.from_pretrained(task.model)
    texts = [{name: f"{pair[name]} " for name in ("prompt", "chosen", "rejected")} for pair in task.pairs()]
    data = RewardDataset(datasets.Dataset.from_list(texts), tokenizer, LONGEST, strategy, is_dpo=True, num_processors=1)
    actors = []
    for _ in range(2):
        actor = Actor(transformers.AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32))
        actor.packing_samples = False  # set where it loads the model itself, in bf16
        actors.append(actor)
    model, ref_model = actors
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPSILON)
    trainer = DPOTrainer(
        model,
        ref_model.requires_grad_(False),
        strategy,
        tokenizer,
        optimizer,
        torch.utils.data.DataLoader(data, batch_size=PAIRS, collate_fn=data.collate_fn),
        None,
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        beta=BETA,
        max_epochs=1,
    )
    with measure:
        trainer.fit(strategy.args)
    curves = {name: [log[name] for log in strategy.logs] for name in strategy.logs[0]}
    names = ("acc", "chosen_reward", "reject_reward")
    task.write(
        curves["loss"],
        curves["grad_norm"],
        {name: curves[name] for name in names},
        weights=model.model.state_dict(),
        measured=measure.measured(),
    )


if __name__ == "__main__":
    main()
