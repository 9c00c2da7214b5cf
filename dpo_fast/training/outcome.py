"""`dpo-fast train`, from training on: the trained model, its numbers and the report."""

import dataclasses
import itertools
import json
import logging
from pathlib import Path

import datasets
import torch
import transformers

import dpo_fast

from .charts import can_draw_png, draw_png, training_curves
from .files import write_text
from .launch import Job
from .models import limits
from .report import DPO_LOSS, Page, text_table
from .sources import BadInput
from .trainer import FastDPOTrainer

logger = logging.getLogger("dpo_fast")


def train(trainer: FastDPOTrainer, job: Job) -> dict:
    """Train, save the model, results.json, report.html and PNGs in `output_dir`; returns the results.

    Raises BadInput for a metric_for_best_model that evaluation does not give and for no step, and what the training
    raises.
    """
    if _length(trainer.train_dataset) is not None:
        _check_steps(trainer, len(trainer.get_train_dataloader()))
    evaluates = trainer.eval_dataset is not None
    before = trainer.evaluate() if evaluates else {}
    _check_metric(trainer.args.metric_for_best_model, before)
    prompts = _sample_prompts(trainer, job.samples)
    texts_before = _answers(trainer, prompts, job.sample_tokens)
    trainer.add_callback(_LogEnds())
    outcome = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint or None)
    _check_steps(trainer, trainer.state.global_step)
    after = trainer.evaluate() if evaluates else {}
    texts_after = _answers(trainer, prompts, job.sample_tokens)
    trainer.save_model()
    results = {
        "versions": {
            "dpo_fast": dpo_fast.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        },
        "job": dataclasses.asdict(job),
        "device": str(trainer.args.device),
        "pairs": _length(trainer.train_dataset),
        "steps": trainer.state.global_step,
        "seconds": outcome.metrics["train_runtime"],
        "before": before,
        "after": after,
        "log": trainer.state.log_history,
        "samples": [
            {"prompt": trainer.processing_class.decode(prompt, skip_special_tokens=True), "before": old, "after": new}
            for prompt, old, new in zip(prompts, texts_before, texts_after, strict=True)
        ],
        "png": [],
    }  # fmt: skip
    out = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        charts = training_curves(results["log"])
        if charts and can_draw_png():
            results["png"] = [str(draw_png(charts, out / "training.png"))]
        write_text(out / "results.json", json.dumps(results, indent=1, default=str) + "\n")
        write_text(out / "report.html", report(results))
    return results


def _check_steps(trainer: FastDPOTrainer, count: int) -> None:
    """Whether there are batches to train on, or steps that were trained."""
    if count == 0:
        raise BadInput(
            f"no step was trained: {_length(trainer.train_dataset)} pairs make no batch of per_device_train_batch_size="
            f"{trainer.args.per_device_train_batch_size} with dataloader_drop_last={trainer.args.dataloader_drop_last}"
        )


def _check_metric(name: str | None, metrics: dict) -> None:
    """Trainer would look for it after the first evaluation of the training."""
    if metrics and name is not None and name.removeprefix("eval_") not in (known := _without_prefix(metrics)):
        raise BadInput(f"metric_for_best_model must be one of {', '.join(known)}, got {name!r}")


def _without_prefix(metrics: dict) -> list[str]:
    return [name.removeprefix("eval_") for name in metrics]


class _LogEnds(transformers.TrainerCallback):
    """The first step and the last are in the log, however few there are."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step in (1, state.max_steps):
            control.should_log = True
        return control


def _length(dataset) -> int | None:
    return len(dataset) if isinstance(dataset, datasets.Dataset) else None


def _sample_prompts(trainer: FastDPOTrainer, count: int) -> list[list[int]]:
    """Token ids of the first different prompts of the evaluation data, or of the training data."""
    dataset = trainer.eval_dataset if trainer.eval_dataset is not None else trainer.train_dataset
    prompts = {tuple(row["prompt_ids"]): None for row in itertools.islice(dataset, 16 * count)} if count > 0 else {}
    positions = limits(trainer.model).positions
    fitting = [list(prompt) for prompt in prompts if prompt and (positions is None or len(prompt) < positions)]
    if len(fitting) < sum(map(bool, prompts)):
        logger.warning("samples: prompts of %d tokens or more are left out, as long as the model allows", positions)
    return fitting[:count]


@torch.no_grad()
def _answers(trainer: FastDPOTrainer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """The model's greedy answers, within the positions that it has."""
    positions = limits(trainer.model).positions
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    training = model.training
    model.eval()
    texts = []
    for prompt in prompts:
        room = max_new_tokens if positions is None else min(max_new_tokens, positions - len(prompt))
        input_ids = torch.tensor([prompt], device=trainer.args.device)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=room,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    model.train(training)
    return texts


# --- reporting -------------------------------------------------------------------------------------------------------

_SHOWN = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")


def _rows(results: dict) -> list[tuple[str, str, str]]:
    """(metric, before, after): on the evaluation data, or the first and the last of what training logged."""
    if results["before"]:
        first, last, prefix = results["before"], results["after"], "eval_"
    else:
        logged = [logs for logs in results["log"] if "loss" in logs] or [{}]
        first, last, prefix = logged[0], logged[-1], ""
    names = [name for name in _SHOWN if prefix + name in first]
    return [(name, f"{float(first[prefix + name]):.4f}", f"{float(last[prefix + name]):.4f}") for name in names]


def _header(results: dict) -> tuple[str, str, str]:
    if results["before"]:
        return "evaluation data", "before", "after"
    return "training data", "first logged", "last logged"


def summary(results: dict) -> str:
    """The table that ends the command."""
    return text_table(_header(results), _rows(results))


def report(results: dict) -> str:
    """The report as HTML."""
    job = results["job"]
    page = Page(
        f"DPO on {Path(job['dataset']).name}",
        f"{job['model']} after {results['steps']} steps"
        + (f" on {results['pairs']:,} pairs" if results["pairs"] else "")
        + f", {results['seconds']:.0f} seconds on {results['device']}.",
        footer="dpo-fast train. " + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + ". All numbers are in results.json beside this file.",
    )  # fmt: skip
    page.table(_header(results), _rows(results))
    page.heading("Training")
    page.prose(
        "DPO raises the probability of the chosen answer over that of the rejected one, each relative to the "
        "reference. The rewards below are β times the log of policy over reference; both are 0 before the first "
        "step, where the sigmoid loss is log 2."
    )
    page.equation(DPO_LOSS)
    page.curves(training_curves(results["log"]))
    if results["samples"]:
        page.heading("What the model writes")
        page.prose("Greedy answers to the first prompts of the data.")
        page.samples((sample["prompt"], sample["before"], sample["after"]) for sample in results["samples"])
    page.heading("Settings")
    page.prose("The keys that were set; all others have their defaults.")
    page.table(["key", "value"], sorted(job["given"].items()))
    return page.html()
