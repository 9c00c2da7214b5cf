"""`dpo-fast train`, from training on: the trained model, its numbers and the report."""

import dataclasses
import itertools
import logging
import math
import sys
from pathlib import Path

import datasets
import torch
import transformers

from dpo_fast.prepared import prepare_early
from dpo_fast.reference import is_peft_model
from dpo_fast.report import ReportCallback, record
from dpo_fast.report.charts import training_curves
from dpo_fast.report.png import can_draw_png, draw_png

from . import checkpoints, folder
from .launch import Job
from .models import limits
from .sources import BadInput, one_line
from .trainer import FastDPOTrainer

logger = logging.getLogger("dpo_fast")


COMMAND = "dpo-fast train"


class Diverged(Exception):
    """The training ended with numbers that are not finite; the message is one sentence."""


class Finished(Exception):
    """A run that is to be taken up again has nothing left to do; the message is one sentence."""


def train(trainer: FastDPOTrainer, job: Job) -> dict:
    """Train, save results.json, report.html, PNGs and the model in `output_dir`; returns the record of the run.

    Raises Finished where a run is taken up again that was finished, BadInput for a checkpoint that does not fit, for a
    metric_for_best_model that evaluation does not give and for no step, Diverged where the end is not finite (the model
    is not saved then), OSError for what cannot be written, and what the training raises.
    """
    if _length(trainer.train_dataset) is not None:
        _check_steps(trainer, len(trainer.get_train_dataloader()))
    out = Path(trainer.args.output_dir)
    asked = trainer.args.resume_from_checkpoint or None
    marker = folder.read(out)
    trainer.run_id = (marker.run if marker else folder.UNMARKED) if asked else ""
    try:
        checkpoint = trainer.checkpoint_to_resume(asked)
        if checkpoint is None and asked and marker and marker.source:  # the run has none of its own yet
            checkpoint = trainer.checkpoint_to_resume(marker.source)
    except checkpoints.Unfit as error:
        raise BadInput(one_line(error)) from error
    if asked and marker and marker.finished:
        _check_unfinished(trainer, marker, checkpoint)
    if trainer.is_world_process_zero():
        newest = checkpoints.newest(out, trainer.run_id) if isinstance(asked, str) else checkpoint
        other = checkpoint is not None and (newest is None or not newest.samefile(checkpoint))
        goes_on = dict(
            resumes=asked is not None, source=checkpoint if other else None, settings=_settings(trainer, job)
        )
        trainer.run_id = folder.begin(out, COMMAND, job.command, **goes_on)
    prompts = _sample_prompts(trainer, job.samples)
    texts_before = _answers(trainer, prompts, job.sample_tokens)
    report = ReportCallback(f"DPO on {Path(job.dataset).name}")
    report.more = {"job": record.plain(dataclasses.asdict(job)), "command": job.command}
    trainer.add_callback(_CheckMetric())
    trainer.add_callback(report)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except checkpoints.Unfit as error:
        raise BadInput(one_line(error)) from error
    diverged = _diverged(trainer)
    texts_after = [""] * len(prompts) if diverged else _answers(trainer, prompts, job.sample_tokens)
    report.run["samples"] = [
        {"prompt": trainer.processing_class.decode(prompt, skip_special_tokens=True), "before": old, "after": new}
        for prompt, old, new in zip(prompts, texts_before, texts_after, strict=True)
    ]
    report.run["png"] = []
    if trainer.is_world_process_zero():  # the numbers first: they are small, and a disk may be full
        charts = training_curves(report.run["log"])
        if charts and can_draw_png():
            report.run["png"] = [str(draw_png(charts, out / "training.png"))]
        report.write(out)
    if diverged:
        raise Diverged(f"{diverged}; the model is not saved, {out} holds the report and the numbers")
    with checkpoints.writing("the model", out):
        trainer.save_model()
    if trainer.is_world_process_zero():
        if all(
            place is None or not Path(place).exists() or not out.samefile(place) for place in (job.model, job.ref_model)
        ):
            _remove_others(out, is_peft_model(trainer.model))
        folder.finish(out, trainer.state.global_step)
    return report.run


def _check_unfinished(trainer: FastDPOTrainer, marker: folder.Marker, checkpoint: Path | None) -> None:
    """Raise Finished unless a finished run is to be trained further than it was, or again from an earlier step."""
    was, total = f"the run in {trainer.args.output_dir} was finished", trainer.steps_in_all()
    if checkpoint is None:
        raise Finished(f"{was}, and has left no checkpoint to go on from; nothing was trained")
    named = isinstance(trainer.args.resume_from_checkpoint, str)
    done = checkpoints.step_of(checkpoint) if named else max(marker.steps, checkpoints.step_of(checkpoint))
    if done >= total:
        raise Finished(f"{was}, at step {done} of {total}; nothing was trained")


def _settings(trainer: FastDPOTrainer, job: Job) -> dict[str, str]:
    """What decides about a run, as text without secrets."""
    found = {**record.settings(trainer.args), **record.plain(dataclasses.asdict(job))}
    return {name: str(value) for name, value in found.items() if name not in ("given", "command")}


def _remove_others(out: Path, of_adapter: bool) -> None:
    """Weights of the other kind, which a run that this one replaces has left beside: whoever loads the folder would
    put the adapter on the model."""
    names = ("model*.safetensors*", "pytorch_model*.bin*", "config.json", "generation_config.json")
    for name in names if of_adapter else ("adapter_model.*", "adapter_config.json"):
        for path in out.glob(name):
            path.unlink()


def _diverged(trainer: FastDPOTrainer) -> str | None:
    """What is not finite at the end: weights, or the last loss that was logged."""
    since = f", since step {trainer.first_bad_step}" if trainer.first_bad_step else ""
    losses = [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]
    if not trainer.is_finite():
        what = "weights are not finite"
    elif losses and not math.isfinite(losses[-1]):
        what = f"the loss is {losses[-1]}"
    else:
        return None
    kept = checkpoints.newest(Path(trainer.args.output_dir), trainer.run_id)
    return f"the training has diverged: {what}{since}" + (f"; {kept} was written before that" if kept and since else "")


def interrupted(trainer: FastDPOTrainer | None, job: Job | None) -> str:
    """What Ctrl-C leaves: how far training was, and how it goes on."""
    if trainer is None or job is None or not trainer.run_id:
        return "interrupted, before training had begun"
    said = f"interrupted at step {trainer.state.global_step} of {trainer.state.max_steps}"
    checkpoint = checkpoints.newest(Path(trainer.args.output_dir), trainer.run_id)
    if checkpoint is None:
        return f"{said}; there is no checkpoint yet (save_steps is {trainer.args.save_steps:g})"
    command = job.command or COMMAND
    option = "--resume_from_checkpoint"
    return f"{said}; {command if option in command else f'{command} {option}'} goes on from {checkpoint.name}"


class _CheckMetric(transformers.TrainerCallback):
    """The first evaluation, which is before training, shows whether there is such a metric."""

    def on_evaluate(self, args, state, control, metrics=None, **_):
        _check_metric(args.metric_for_best_model, metrics or {})


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
        print(file=sys.stderr)  # a progress bar may stand on the line
        raise BadInput(f"metric_for_best_model must be one of {', '.join(known)}, got {name!r}")


def _without_prefix(metrics: dict) -> list[str]:
    return [name.removeprefix("eval_") for name in metrics]


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
    if prompts:
        prepare_early(trainer)
    positions = limits(trainer.model).positions
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    training = model.training
    model.eval()
    texts: list[str] = []
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
