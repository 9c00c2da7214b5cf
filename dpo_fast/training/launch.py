"""`dpo-fast train`, before training: a YAML file and options -> model, data, `FastDPOTrainer`. `outcome` comes next."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
import yaml

from .config import FastDPOConfig
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


class _Parser(transformers.HfArgumentParser):
    """Options from dataclasses; a mistake is raised, not printed with pages of usage."""

    def error(self, message: str):
        raise BadInput(message)


def _parser() -> _Parser:
    return _Parser((Job, FastDPOConfig), prog="dpo-fast train", allow_abbrev=False)


def _keys() -> list[str]:
    return [field.name for data_class in (Job, FastDPOConfig) for field in dataclasses.fields(data_class) if field.init]


def help_text() -> str:
    """Every key with its help."""
    parser = _parser()
    parser.usage = "dpo-fast train CONFIG.yaml [--key value ...]"
    parser.description = "Keys of the YAML file and options of the command line are the same; options win."
    return parser.format_help()


# --- reading ---------------------------------------------------------------------------------------------------------


def read_job(options: list[str]) -> tuple[Job, FastDPOConfig]:
    """`[CONFIG.yaml] [--key value ...]`: the file's keys, then the options, typed by the dataclasses.

    Raises BadInput for a file that is missing or not a mapping, for unknown keys (with the closest known ones), for
    values of the wrong type, and for what `FastDPOConfig` refuses.
    """
    config_file = None
    if options and not options[0].startswith("-"):
        config_file, options = Path(options[0]), options[1:]
    values = {} if config_file is None else _read_yaml(config_file)
    out = Path("runs") / (config_file.stem if config_file else "train")
    arguments = ["--output_dir", str(out), *_as_arguments(values), *options]
    try:
        job, config, rest = _parser().parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except (ValueError, TypeError) as error:
        raise BadInput(one_line(error)) from error
    if rest:
        unknown = [argument for argument in rest if argument.startswith("--")]
        raise BadInput(_unknown_key(unknown[0].lstrip("-").split("=")[0]) if unknown else f"unexpected {rest[0]!r}")
    job.given = _given(arguments)
    return job, config


def _given(arguments: list[str]) -> dict[str, str]:
    """`--key=value` and `--key value ...` as a mapping; the last one counts."""
    given: dict[str, str] = {}
    key = ""
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument[2:].partition("=")
            key = name.replace("-", "_")
            given[key] = value
        else:
            given[key] = f"{given[key]} {argument}".strip()
    return given


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BadInput(f"there is no file {str(path)!r}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise BadInput(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path} must hold keys and values, as in `model: path`, got {type(values).__name__}")
    known = _keys()
    for key in values:
        if key not in known:
            raise BadInput(f"{path}: {_unknown_key(str(key))}")
    return values


def _unknown_key(key: str) -> str:
    close = difflib.get_close_matches(key.replace("-", "_"), _keys(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else "dpo-fast train --help lists all keys"
    return f"unknown key {key!r}; {hint}"


def _as_arguments(values: dict[str, Any]) -> list[str]:
    """YAML values as command-line options: one way to type them, and YAML 1.1 reads 1e-4 as text anyway."""
    arguments = []
    for key, value in values.items():
        if value is None or value == []:
            continue  # as if it were not there
        if isinstance(value, list):
            arguments += [f"--{key}", *map(str, value)]
        else:
            arguments.append(f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}")
    return arguments


# --- making ----------------------------------------------------------------------------------------------------------


def make_trainer(job: Job, config: FastDPOConfig) -> FastDPOTrainer:
    """Load what the job names. Raises BadInput for a model or data that are missing or cannot be used."""
    for name in ("model", "ref_model"):
        _check_model_path(name, getattr(job, name))
    try:
        train_dataset = load_pairs(job.dataset, job.dataset_config, job.dataset_split)
        eval_dataset = None
        if job.eval_dataset or job.eval_split:
            eval_config = None if job.eval_dataset else job.dataset_config
            eval_split = job.eval_split or "train"
            eval_dataset = load_pairs(job.eval_dataset or job.dataset, eval_config, eval_split)
        return FastDPOTrainer(
            model=job.model,
            ref_model=job.ref_model,
            args=config,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            peft_config=_peft_config(job),
        )
    except (ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
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
