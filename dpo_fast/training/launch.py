"""`dpo-fast train`, before training: a YAML file and options -> model, data, `FastDPOTrainer`. `outcome` comes next."""

import dataclasses
import json
import logging
import os
import pickle
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors import SafetensorError

from dpo_fast.report.record import command_line

from . import preflight, recipe
from .config import FastDPOConfig
from .keys import keys_of
from .sources import BadInput, decode_row, load_pairs, may_be_hub_id, one_line
from .trainer import FastDPOTrainer

logger = logging.getLogger("dpo_fast")


@dataclass
class Job:
    """What to train on what. The training itself is described by `FastDPOConfig`."""

    model: str = field(metadata={"help": "Directory or hub id of the model to train."})
    dataset: str = field(metadata={"help": "JSON, JSONL or Parquet file, saved dataset, or hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Like dataset, for evaluation before and after."})
    eval_split: str | None = field(
        default=None,
        metadata={
            "help": "Split to evaluate on, of eval_dataset or dataset; or a share of dataset to hold out, such as 0.1."
        },
    )
    ref_model: str | None = field(
        default=None, metadata={"help": "Reference model; default: the model before training."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA adapter; default: train all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout (see disable_dropout)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the modules that get an adapter."}
    )
    lora_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "More of peft.LoraConfig, as {use_dora: true, modules_to_save: [lm_head]}."}
    )
    samples: int = field(default=4, metadata={"help": "Prompts to answer before and after, for the report."})
    sample_tokens: int = field(default=64, metadata={"help": "Longest sample answer, in tokens."})
    overwrite: bool = field(
        default=False, metadata={"help": "Write into output_dir though it holds a model of somebody else's."}
    )
    given: dict[str, str] = field(init=False, default_factory=dict)  # keys that were set, as text, for the report
    command: str | None = field(init=False, default=None)  # the command line, for the report

    def __post_init__(self):
        for name in ("model", "dataset", "eval_dataset", "ref_model"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        for name, least in (("samples", 0), ("sample_tokens", 1), ("lora_r", 1), ("lora_alpha", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise ValueError(f"{name} must be at least {least}{' and below 2**31' * (value > 0)}, got {value}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, got {self.lora_dropout}")
        if self.held_out is not None:
            if not 0 < self.held_out < 1:
                raise ValueError(f"eval_split must be a name, or a share above 0 and below 1, got {self.eval_split}")
            if self.eval_dataset is not None:
                raise ValueError(
                    f"eval_split: {self.eval_split} holds that share of dataset out, and eval_dataset names other "
                    "data to evaluate on; leave out one of the two"
                )

    @property
    def held_out(self) -> float | None:
        """The share of the training data that is held out, None where eval_split is no number."""
        try:
            return None if self.eval_split is None else float(self.eval_split)
        except ValueError:
            return None


def help_text() -> str:
    """Every key with its help."""
    parser = transformers.HfArgumentParser((Job, FastDPOConfig), prog="dpo-fast train", allow_abbrev=False)
    parser.usage = "dpo-fast train CONFIG.yaml [--key value ...]"
    parser.description = (
        "Keys of the YAML file and options of the command line are the same; options win. --debug without a value "
        "prints the traceback of an error before its sentence; with one it is the key of transformers below."
    )
    return parser.format_help()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_job(options: list[str]) -> tuple[Job, FastDPOConfig]:
    """`[CONFIG.yaml] [--key value ...]`: the file's keys, then the options, typed by the dataclasses.

    Raises BadInput for a file that is missing or not a mapping, for unknown keys (all of them, with what to write
    instead), for values of the wrong type (all of them), and for what `Job` and `FastDPOConfig` refuse.
    """
    config_file = None
    if options and not options[0].startswith("-"):
        config_file, options = Path(options[0]), options[1:]
    command = command_line(["dpo-fast", "train", *([str(config_file)] if config_file else []), *options])
    values, given = recipe.read(config_file, options, keys_of(Job, FastDPOConfig))
    if missing := [name for name in ("model", "dataset") if name not in values]:
        needed = ", ".join(f"--{name}" for name in missing)
        raise BadInput(f"missing: {needed} (or the same in the YAML file, as in `{missing[0]}: ...`)")
    out = str(Path("runs") / (config_file.stem if config_file else "train"))
    given.setdefault("output_dir", out)
    of_job = {field.name for field in dataclasses.fields(Job)} & set(values)
    settings = {"output_dir": out, **{name: value for name, value in values.items() if name not in of_job}}
    try:
        job = Job(**{name: values[name] for name in of_job})
        preflight.check_launcher(settings)
        config = FastDPOConfig(**settings)
    except ImportError as error:
        raise preflight.missing_package(error) from error
    except (ValueError, OSError) as error:
        raise BadInput(one_line(error)) from error
    except TypeError as error:
        if not preflight.is_said(error):
            raise
        raise BadInput(one_line(error)) from error
    job.given, job.command = given, command
    return job, config


# --- making ----------------------------------------------------------------------------------------------------------


def make_trainer(job: Job, config: FastDPOConfig) -> FastDPOTrainer:
    """Load what the job names. Raises BadInput for a model, data or packages that are missing or cannot be used."""
    try:
        preflight.check(job, config)
        for name in ("model", "ref_model"):
            _check_model_path(name, getattr(job, name))
        peft_config = _peft_config(job)
        train_dataset = _load("dataset", job.dataset, job.dataset_config, job.dataset_split)
        eval_dataset = None
        if job.held_out is not None:
            train_dataset, eval_dataset = _hold_out(train_dataset, job.held_out, config.seed)
        elif job.eval_dataset or job.eval_split:
            eval_config = None if job.eval_dataset else job.dataset_config
            eval_split = job.eval_split or "train"
            name = "eval_dataset" if job.eval_dataset else "eval_split"
            eval_dataset = _load(name, job.eval_dataset or job.dataset, eval_config, eval_split)
        trainer = FastDPOTrainer(
            model=job.model,
            ref_model=job.ref_model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
        )
        trainer.data_name = job.dataset
        return trainer
    except ImportError as error:
        raise preflight.missing_package(error) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(_said(error, job)) from error
    except SafetensorError as error:
        raise BadInput(f"weights cannot be read: {one_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise BadInput(
            "weights cannot be read: the file is not one of torch.save, or holds more than tensors"
        ) from error
    except (TypeError, RuntimeError) as error:
        if _is_about_keywords(error, config):
            raise BadInput(f"model_init_kwargs: {one_line(error)}") from error
        if "ignore_mismatched_sizes" in str(error):
            raise BadInput("weights do not have the sizes that the model's config.json says") from error
        of_library = preflight.being_read(error) and not isinstance(error, torch.OutOfMemoryError)
        if not of_library and (isinstance(error, RuntimeError) or not preflight.is_said(error)):
            raise
        raise BadInput(_said(error, job)) from error
    except BadInput:
        raise
    except Exception as error:  # whatever a library raises that reads what the user has named: KeyError, EOFError ...
        if not preflight.being_read(error):
            raise
        raise BadInput(_said(error, job)) from error


def _said(error: Exception, job: Job) -> str:
    """What an exception says, on one line, with the key of the recipe and the file that it is about."""
    whole = {} if job.held_out else {"train": job.dataset, "eval": job.eval_dataset or job.dataset}
    said = preflight.with_row(preflight.sentence(error), error, whole)
    return f"ref_{said}" if job.ref_model != job.model and said.startswith(f"model {job.ref_model!r}") else said


def _load(key: str, source: str, name: str | None, split: str) -> datasets.Dataset:
    """`load_pairs`; what it says, with the key of the recipe."""
    try:
        return load_pairs(source, name, split)
    except BadInput as error:
        raise BadInput(f"{key}: {error}") from error


def _hold_out(dataset: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """(what is trained on, the share that is held out), the same for the same seed; at least one pair each."""
    count, prompts = max(1, round(share * len(dataset))), [_prompt_of(decode_row(row)) for row in dataset]
    pairs = Counter(prompts)
    if count >= len(dataset) or len(pairs) == 1:
        few = f"{len(dataset)} pairs" if len(pairs) > 1 else "pairs that all have the same prompt"
        raise BadInput(f"eval_split: {share:g} of {few} leaves none to train on")
    if len(pairs) == len(dataset):
        parts = dataset.train_test_split(test_size=count, seed=seed)
        return parts["train"], parts["test"]
    held_out, held = set(), 0
    for prompt in random.Random(seed).sample(list(pairs), len(pairs))[:-1]:  # one stays to train on
        if held >= count:
            break
        held_out.add(prompt)
        held += pairs[prompt]
    logger.warning(
        "eval_split: %d pairs have %d prompts; all pairs of a prompt are held out, or none", len(dataset), len(pairs)
    )
    sides = [[index for index, prompt in enumerate(prompts) if (prompt in held_out) is side] for side in (False, True)]
    return dataset.select(sides[0]), dataset.select(sides[1])


def _prompt_of(row: Mapping) -> str:
    """What tells a row's prompt from others'; without a column of it, what is before the last message, or the row."""
    prompt, chosen = row.get("prompt", row.get("prompt_ids")), row.get("chosen")
    if prompt is None and isinstance(chosen, list) and len(chosen) > 1:
        prompt = chosen[:-1]
    return json.dumps(row if prompt is None else prompt, default=str)


def _is_about_keywords(error: Exception, config: FastDPOConfig) -> bool:
    """Whether a model has no such keyword as `model_init_kwargs` holds."""
    return any(f"unexpected keyword argument {name!r}" in str(error) for name in config.model_init_kwargs or {})


def _check_model_path(name: str, model: str | None) -> None:
    if model is None or may_be_hub_id(model) and not Path(model).is_dir():
        return
    if not Path(model).is_dir():
        raise BadInput(f"{name}: there is no directory {model!r} (the examples need `dpo-fast demo` to run first)")
    if not (Path(model) / "config.json").is_file() and not (Path(model) / "adapter_config.json").is_file():
        raise BadInput(f"{name}: {model!r} holds no config.json, so it is no model that transformers can load")


def _peft_config(job: Job):
    if job.lora_r is None:
        unused = [key for key in job.given if key.startswith("lora_")] if "lora_r" not in job.given else []
        if unused:
            raise BadInput(f"{', '.join(unused)}: there is no adapter without lora_r; set it, or leave these out")
        return None
    try:
        import peft
    except ImportError as error:
        raise BadInput("lora_r needs the package peft: pip install peft") from error
    targets = job.lora_target_modules
    own = dict(
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=job.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
    more = job.lora_kwargs or {}
    known = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init}
    if wrong := [name for name in more if name not in known or name in own]:
        raise BadInput(f"lora_kwargs: {', '.join(wrong)} is not of peft.LoraConfig, or has a key of its own (lora_...)")
    try:
        return peft.LoraConfig(**own, **more)
    except (ValueError, TypeError, ImportError) as error:
        raise BadInput(f"lora_kwargs: {one_line(error)}") from error
