"""torchtune's LoRA DPO recipe, from its file as `tune cp` copies it, and that file with two lines changed."""

import json
import sys
import types
from pathlib import Path

import torch

from .page import SWAP as MARKED
from .task import ADAM_EPSILON, BETA, LEARNING_RATE, LONGEST, PAIRS, SEED, SHAPE, STEPS, Measure, Task

RECIPE = "lora_dpo_single_device.py"
SWAP = """
# swap: before
from torchtune import config, modules, rlhf, training, utils
# swap: after
from torchtune import config, modules, rlhf, training, utils
from dpo_fast.integrations.torchtune import completion_logps
# swap: end
# swap: before
        with self.activations_handling_ctx:
            all_logits = model(concatenated_input_ids)

        all_log_probs = rlhf.get_batch_log_probs(all_logits, concatenated_labels)
# swap: after
        with self.activations_handling_ctx:
            all_log_probs, all_logits = completion_logps(model, concatenated_input_ids, concatenated_labels)
# swap: end
"""
NOTED: dict = {}  # the configuration names what it builds by its path


class Tokenizer:
    pad_id = 0


class Pairs(torch.utils.data.Dataset):
    def __init__(self, tokenizer, path: str):
        self.pairs = json.loads(Path(path).read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pair, found = self.pairs[index], {}
        for side in ("chosen", "rejected"):
            found[f"{side}_input_ids"] = pair["prompt_ids"] + pair[f"{side}_ids"]
            found[f"{side}_labels"] = [-100] * len(pair["prompt_ids"]) + pair[f"{side}_ids"]
        return found


class Logger:
    def __init__(self):
        NOTED["logger"] = self
        self.logs: list[dict] = []

    def log_config(self, config) -> None:
        pass

    def log_dict(self, payload: dict, step: int) -> None:
        self.logs.append({name: float(value) for name, value in payload.items()})

    def close(self) -> None:
        pass


def config_of(task: Task) -> dict:
    here = f"{__package__}.torchtune"
    sizes = dict(
        vocab_size=SHAPE.vocab,
        num_layers=SHAPE.layers,
        num_heads=SHAPE.heads,
        num_kv_heads=SHAPE.kv_heads,
        embed_dim=SHAPE.width,
        intermediate_dim=SHAPE.intermediate,
        max_seq_len=2 * LONGEST,
        norm_eps=1e-6,
        rope_base=10_000,
    )
    where = dict(lora_attn_modules=["q_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True)
    lora = dict(**where, lora_rank=8, lora_alpha=16)
    return dict(
        output_dir=str(task.folder / "torchtune"),
        model=dict(_component_="torchtune.models.llama3.lora_llama3", **sizes, **lora),
        tokenizer=dict(_component_=f"{here}.Tokenizer"),
        checkpointer=dict(
            _component_="torchtune.training.FullModelHFCheckpointer",
            checkpoint_dir=task.model,
            checkpoint_files=["model.safetensors"],
            recipe_checkpoint=None,
            output_dir=str(task.folder / "torchtune"),
            model_type="LLAMA3",
        ),
        resume_from_checkpoint=False,
        save_adapter_weights_only=True,
        dataset=dict(_component_=f"{here}.Pairs", path=str(task.folder / "pairs.json")),
        seed=SEED,
        shuffle=False,
        batch_size=PAIRS,
        optimizer=dict(_component_="torch.optim.AdamW", lr=100 * LEARNING_RATE, eps=ADAM_EPSILON),
        loss=dict(_component_="torchtune.rlhf.loss.DPOLoss", beta=BETA),
        epochs=1,
        max_steps_per_epoch=STEPS,
        gradient_accumulation_steps=1,
        compile=False,
        metric_logger=dict(_component_=f"{here}.Logger"),
        log_every_n_steps=1,
        log_peak_memory_stats=False,
        device="cpu",
        dtype="fp32",
        enable_activation_checkpointing=False,
        enable_activation_offloading=False,
    )


def recipe_of(swap: str):
    """The recipe's class, of its source with what `swap` marks replaced."""
    import torchtune

    source = (Path(torchtune.__file__).parents[1] / "recipes" / RECIPE).read_text(encoding="utf-8")
    for before, after in MARKED.findall(swap):
        if source.count(before) != 1:
            raise SystemExit(f"torchtune {torchtune.__version__}'s {RECIPE} does not have once:\n{before}")
        source = source.replace(before, after)
    module = sys.modules["recipe"] = types.ModuleType("recipe")
    exec(compile(source, RECIPE, "exec"), vars(module))
    return module.LoRADPORecipeSingleDevice


def main(swap: str = SWAP) -> None:
    task = Task.of_command_line()
    from omegaconf import OmegaConf

    from . import torchtune as noted  # the copy that the configuration finds

    config = OmegaConf.create(config_of(task))
    recipe = recipe_of(swap if task.way == "after" else "")(config)
    recipe.setup(config)
    recipe.save_checkpoint = lambda epoch: None
    measure, norms = Measure(), []
    trained = [p for p in recipe._model.parameters() if p.requires_grad]

    def before_step(*_) -> None:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in trained])))

    recipe._optimizer.register_step_pre_hook(before_step)
    recipe._optimizer.register_step_post_hook(lambda *_: measure.step())
    with measure:
        recipe.train()
    logs = noted.NOTED["logger"].logs
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "log_probs/chosen", "log_probs/rejected")
    names += ("logits/chosen", "logits/rejected")
    task.write(
        [log["loss"] for log in logs],
        norms,
        {name: [log[name] for log in logs] for name in names},
        weights={name: p for name, p in recipe._model.named_parameters() if p.requires_grad},
        measured=measure.measured(),
    )


if __name__ == "__main__":
    main()
