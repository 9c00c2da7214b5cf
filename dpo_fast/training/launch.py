"""`dpo-fast train`, before training: a YAML file and options -> model, data, `FastDPOTrainer`. `outcome` comes next."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import torch
import transformers

from .config import FastDPOConfig
from .recipe import convert, read_values, types_of
from .sources import BadInput, load_pairs, may_be_hub_id, one_line
from .trainer import FastDPOTrainer


@dataclass
class Job:
    """What to train on what. The training itself is described by `FastDPOConfig`."""

    model: str = field(metadata={"help": "Directory or hub id of the model to train."})
    dataset: str = field(metadata={"help": "JSON, JSONL or Parquet file, saved dataset, or hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Like dataset, for evaluation before and after."})
    eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on, of eval_dataset or dataset."})
    ref_model: str | None = field(
        default=None, metadata={"help": "Reference model; default: the model before training."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA adapter; default: train all weights."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA's scale."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA's dropout (see disable_dropout)."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the modules that get an adapter."}
    )
    samples: int = field(default=4, metadata={"help": "Prompts to answer before and after, for the report."})
    sample_tokens: int = field(default=64, metadata={"help": "Longest sample answer, in tokens."})
    given: dict[str, str] = field(init=False, default_factory=dict)  # keys that were set, as text, for the report

    def __post_init__(self):
        for name, least in (("samples", 0), ("sample_tokens", 1), ("lora_r", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def help_text() -> str:
    """Every key with its help."""
    parser = transformers.HfArgumentParser((Job, FastDPOConfig), prog="dpo-fast train", allow_abbrev=False)
    parser.usage = "dpo-fast train CONFIG.yaml [--key value ...]"
    parser.description = "Keys of the YAML file and options of the command line are the same; options win."
    return parser.format_help()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_job(options: list[str]) -> tuple[Job, FastDPOConfig]:
    """`[CONFIG.yaml] [--key value ...]`: the file's keys, then the options, typed by the dataclasses.

    Raises BadInput for a file that is missing or not a mapping, for unknown keys (all of them, with what they are
    called here), for values of the wrong type, for what `FastDPOConfig` refuses and for packages that are missing.
    """
    kinds = types_of(Job, FastDPOConfig)
    values, file = read_values(options, kinds)
    values.setdefault("output_dir", str(Path("runs") / (file.stem if file else "train")))
    fields = {field.name: field for data_class in (Job, FastDPOConfig) for field in dataclasses.fields(data_class)}
    typed = {}
    for key, value in values.items():
        field = fields[key]
        optional = field.default is None
        typed[key] = convert(key, value, kinds[key], field.metadata.get("choices"), optional)
    if missing := [field.name for field in dataclasses.fields(Job) if _is_needed(field) and field.name not in typed]:
        raise BadInput(f"missing: {', '.join(f'--{name}' for name in missing)}")
    own = {field.name for field in dataclasses.fields(Job)}
    try:
        job = Job(**{key: value for key, value in typed.items() if key in own})
        config = FastDPOConfig(**{key: value for key, value in typed.items() if key not in own})
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise BadInput(one_line(error)) from error
    job.given = {key: _as_text(value) for key, value in values.items() if value is not None}
    return job, config


def _as_text(value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _is_needed(field) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def check_packages(config: FastDPOConfig) -> None:
    """Raise BadInput for what the recipe needs and is not here, or is not complete: loggers, optimizer, schedule."""
    loggers = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    here = transformers.integrations.get_available_reporting_integrations()
    if missing := [name for name in loggers if name not in ("none", "all", *here)]:
        raise BadInput(
            f"report_to: {', '.join(missing)} needs a package of its own (pip install it), or is unknown; there is "
            f"{', '.join(here) or 'none'}"
        )
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        transformers.get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([parameter], lr=0.0),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError, ImportError) as error:
        raise BadInput(f"lr_scheduler_type={config.lr_scheduler_type.value}: {one_line(error)}") from error


# --- making ----------------------------------------------------------------------------------------------------------


def make_trainer(job: Job, config: FastDPOConfig) -> FastDPOTrainer:
    """Load what the job names. Raises BadInput for a model, data or packages that are missing or cannot be used."""
    check_packages(config)
    for name in ("model", "ref_model"):
        _check_model_path(name, getattr(job, name))
    try:
        train_dataset = load_pairs(job.dataset, job.dataset_config, job.dataset_split)
        eval_dataset = None
        if job.eval_dataset or job.eval_split:
            eval_config = None if job.eval_dataset else job.dataset_config
            eval_split = job.eval_split or "train"
            eval_dataset = load_pairs(job.eval_dataset or job.dataset, eval_config, eval_split)
        trainer = FastDPOTrainer(
            model=job.model,
            ref_model=job.ref_model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=_peft_config(job),
        )
        trainer.get_optimizer_cls_and_kwargs(config, trainer.model)  # says which package it needs
        return trainer
    except (ValueError, TypeError, OSError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise BadInput(one_line(error)) from error


def _check_model_path(name: str, model: str | None) -> None:
    if model is None or may_be_hub_id(model) and not Path(model).is_dir():
        return
    if not Path(model).is_dir():
        raise BadInput(f"{name}: there is no directory {model!r} (the examples need `dpo-fast demo` to run first)")
    if not (Path(model) / "config.json").is_file() and not (Path(model) / "adapter_config.json").is_file():
        raise BadInput(f"{name}: {model!r} holds no config.json, so it is no model that transformers can load")


def _peft_config(job: Job):
    if job.lora_r is None:
        return None
    try:
        import peft
    except ImportError as error:
        raise BadInput("lora_r needs the package peft: pip install peft") from error
    targets = job.lora_target_modules
    return peft.LoraConfig(
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=job.lora_dropout,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
        task_type="CAUSAL_LM",
    )
