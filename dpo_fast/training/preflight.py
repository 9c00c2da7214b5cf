"""`dpo-fast train`, before anything is loaded: packages, optimizer, schedule, data and folders that a recipe needs."""

import importlib.metadata
import importlib.util
import os
import re
import traceback
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from datasets.exceptions import DatasetsError
from transformers.integrations import integration_utils

from dpo_fast.ops.dispatch import choose_impl
from dpo_fast.report.files import read_json

from . import folder
from .config import FastDPOConfig
from .models import loading_options
from .sources import BadInput, causes, one_line


def check(job, config: FastDPOConfig) -> None:
    """Raise BadInput for what would end the run later."""
    _check_loggers(config)
    _check_optimizer(config)
    _check_schedule(config)
    if config.impl != "auto":
        choose_impl("this machine", config.impl, config.device)
    _check_loading(job, config)
    if config.use_liger_kernel:
        if importlib.util.find_spec("liger_kernel") is None:
            raise BadInput("use_liger_kernel needs the package liger-kernel: pip install liger-kernel")
        if config.device.type == "cpu":
            raise BadInput("use_liger_kernel needs an accelerator: its kernels do not run on the CPU; leave it out")
    if not (job.eval_dataset or job.eval_split):
        wants = {"eval_strategy": config.eval_strategy != "no", "eval_on_start": config.eval_on_start}
        for name in (name for name, wanted in wants.items() if wanted):
            raise BadInput(
                f"{name} needs data to evaluate on: set eval_dataset (or eval_split, a split of dataset), or leave "
                f"{name} out"
            )
    out = Path(config.output_dir)
    reads = {name: getattr(job, name) for name in ("model", "ref_model", "dataset", "eval_dataset")}
    reads |= {f"the base of {name}": _base_of(reads[name]) for name in ("model", "ref_model")}
    resumes = bool(config.resume_from_checkpoint)
    folder.check(out, reads=reads, overwrite=job.overwrite, by="dpo-fast train", resumes=resumes)
    _check_resume(config.resume_from_checkpoint, out)


def _base_of(model: str | None) -> str | None:
    """Where the model of an adapter lies."""
    config = read_json(Path(model or "") / "adapter_config.json")
    return config.get("base_model_name_or_path") if isinstance(config, dict) else None


def check_launcher(settings: dict) -> None:
    """Raise BadInput for DeepSpeed in a process that no launcher has started: it looks for MPI then."""
    if settings.get("deepspeed") and importlib.util.find_spec("deepspeed") and "RANK" not in os.environ:
        raise BadInput("deepspeed needs a launcher, also for one process: torchrun or accelerate launch starts it")


def _check_resume(resume: str | bool | None, out: Path) -> None:
    if resume is True and not out.is_dir():
        raise BadInput(f"resume_from_checkpoint: there is no run to go on with, as there is no folder {str(out)!r}")
    if isinstance(resume, str) and not (Path(resume) / "trainer_state.json").is_file():
        raise BadInput(
            f"resume_from_checkpoint must be a folder with a trainer_state.json, or true for the last one of "
            f"output_dir, got {resume!r}"
        )


def _check_loading(job, config: FastDPOConfig) -> None:
    try:
        options = loading_options(config)
    except ImportError as error:
        raise missing_package(error) from error
    except ValueError as error:
        raise BadInput(one_line(error)) from error
    bits = options.get("quantization_config")
    if isinstance(bits, transformers.BitsAndBytesConfig) and importlib.util.find_spec("bitsandbytes") is None:
        raise BadInput("quantization_config needs the package bitsandbytes: pip install bitsandbytes")
    is_adapter = (Path(job.model) / "adapter_config.json").is_file()
    if bits is not None and job.lora_r is None and not is_adapter:
        raise BadInput(
            "quantization_config: a quantised model trains an adapter, not its own weights; set lora_r, as lora_r: 16"
        )


def is_said(error: BaseException) -> bool:
    """Whether a `raise` has made it, with a message. What an operation has made is a bug, and keeps its trace."""
    return (traceback.extract_tb(error.__traceback__)[-1].line or "").startswith("raise ")


# Functions, of ours and of `Trainer`, in which a library reads what the user has named -> what that is, with the
# function's own variables
_READING = {
    "load_model": "model {model!r}",
    "load_tokenizer": "the tokenizer in {path!r}",
    "_load": "{key} {source!r}",
    "_columns": "{name} dataset",
    "init_hf_repo": "push_to_hub",
    "create_accelerator_and_postprocess": "accelerator_config",
    "_answers": "samples, with the model's generation_config.json",
}


def being_read(error: BaseException) -> str | None:
    """What a library was reading when it raised; None where it was not, or where a function of ours has raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1].f_globals.get("__name__", "").startswith("dpo_fast"):
        return None
    for frame in frames:
        module = frame.f_globals.get("__name__", "")
        known = module.startswith("dpo_fast.") or module == "transformers.trainer"
        if known and (what := _READING.get(frame.f_code.co_name)):
            return what.format_map(defaultdict(str, frame.f_locals))
    return None


def sentence(error: BaseException) -> str:
    """What a library says, on one line, with what it was reading; its class where the message alone is no sentence."""
    last = causes(error)[-1] if isinstance(error, DatasetsError) else error
    said = one_line(last)
    what = being_read(error) or ""
    if what and not isinstance(last, (ValueError, OSError, RuntimeError, DatasetsError)):
        said = f"{type(last).__name__}: {said}"
    path = re.search("'(.+)'", what)
    return said if not what or path and "/" in path[1] and path[1] in said else f"{what}: {said}"


def with_row(message: str, error: BaseException, sources: dict[str, str]) -> str:
    """What is said of a row, with the data that it is of: name of a data set -> the file, "" for a part of one."""
    row = re.match(r"row (\d+)(?=: )", message)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [frame.f_locals.get("name") for frame in frames if frame.f_code.co_name == "prepare_dataset"]
    if not row or not found:
        return message
    where = sources.get(found[0]) or f"{found[0]} dataset"
    return f"{where}: row {row[1]} (the first is 0){message[row.end() :]}"


def missing_package(error: ImportError) -> BadInput:
    """What names the package. A module of ours that cannot be imported is a bug, and raised as it is."""
    if (error.name or "").split(".")[0] == "dpo_fast":
        raise error
    if isinstance(error, importlib.metadata.PackageNotFoundError):  # a module that has no name, but a requirement
        package = re.search(r"[\w.-]+(?=[<>=!~' ]|$)", error.name.removeprefix("The "))[0]
    elif isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0].replace("_", "-")
    else:  # of a library, which says what it needs
        return BadInput(one_line(error))
    return BadInput(f"the package {package} is missing: pip install {package}")


def _check_loggers(config: FastDPOConfig) -> None:
    here = integration_utils.get_available_reporting_integrations()
    for name in config.report_to:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise BadInput(f"report_to must be none, all, or of {known}, got {name!r}")
        if name not in here and name != "flyte":  # which transformers does not list
            raise BadInput(f"report_to: {name} needs a package that is not here: pip install {name.replace('_', '-')}")


def _value(choice) -> str:
    """Of a member of one of transformers' enumerations."""
    return choice.value


def _check_optimizer(config: FastDPOConfig) -> None:
    if any("=" not in item for item in (config.optim_args or "x=").split(",")):
        raise BadInput(f"optim_args must be as in 'momentum=0.9, nesterov=true', got {config.optim_args!r}")
    try:
        kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(config)
        if kind.__module__.startswith("torch.optim"):  # which look at their numbers when they are made
            kind([torch.nn.Parameter(torch.zeros(1))], **options)
    except ImportError as error:
        raise BadInput(f"optim={_value(config.optim)}: {one_line(error)}") from error
    except ValueError as error:  # without a model, some say that they need one
        if isinstance(error.__context__, ImportError) or not re.search(r"\bmodel\b", str(error)):
            raise BadInput(f"optim={_value(config.optim)}: {one_line(error)}") from error


def _check_schedule(config: FastDPOConfig) -> None:
    steps = config.max_steps if config.max_steps > 0 else 1000
    try:
        transformers.get_scheduler(
            config.lr_scheduler_type,
            torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate),
            num_warmup_steps=config.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise BadInput(
            f"lr_scheduler_type={_value(config.lr_scheduler_type)} with lr_scheduler_kwargs="
            f"{config.lr_scheduler_kwargs or {}}: {one_line(error)}"
        ) from error
