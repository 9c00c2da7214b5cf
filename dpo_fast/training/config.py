"""`FastDPOConfig`: every knob of `FastDPOTrainer`, declared once. Names are TRL's where TRL has the same one."""

import functools
import json
import logging
import math
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any

import torch
import transformers
from accelerate.utils import GradientAccumulationPlugin
from packaging.version import Version
from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils import is_torch_bf16_gpu_available

from dpo_fast.functional import EXTRA_METRICS
from dpo_fast.losses import LOSSES, LossParams, knob
from dpo_fast.objective import Objective
from dpo_fast.ops.dispatch import IMPLS
from dpo_fast.report.record import plain

from . import settings
from .data import LAYOUTS, TRUNCATION_MODES, Truncation

logger = logging.getLogger("dpo_fast")

OLDEST_TRANSFORMERS = "5.6"  # before, Trainer divides gradients by the number of accumulated batches twice


def check_transformers(version: str) -> None:
    """Raise ImportError for one whose Trainer `FastDPOTrainer` cannot be built on."""
    if Version(version) < Version(OLDEST_TRANSFORMERS):
        raise ImportError(
            f"FastDPOTrainer needs transformers {OLDEST_TRANSFORMERS} or newer, and {version} is installed: pip "
            "install -U transformers, or stay, with dpo_fast.trl.DPOTrainer or dpo_fast.completion_logps"
        )


check_transformers(transformers.__version__)


def _option(default, help: str, **metadata):
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return knob(default, help, **metadata)


def _mapping(name: str, value) -> dict | None:
    """A dict as it is, or as JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name} must be a mapping, or one as JSON, got {value!r}: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping or None, got {value!r}")
    return value


def _length(value: int | str | None) -> int | None:
    """TRL's three ways to write a `pad_to_multiple_of`; its "auto" pads on a device that there is no code for here."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("auto", "none", "null"):
        return None
    if not value.strip().isdecimal():
        raise ValueError(f"pad_to_multiple_of must be a whole number, 'auto' or None, got {value!r}")
    return int(value)


def _names_what_is_unknown(config: type) -> type:
    """The dataclass, whose constructor names all arguments that it has not, with what they are called here."""
    made: Any = config
    init = made.__init__
    known = [field.name for field in fields(config) if field.init]

    @functools.wraps(init)
    def checked(self, *args, **arguments):
        if unknown := {name: value for name, value in arguments.items() if name not in known}:
            from .recipe import hint_of

            each = [f"{name} ({hint_of(name, value, known) or 'unknown'})" for name, value in unknown.items()]
            raise TypeError(f"{config.__name__} got unexpected keyword arguments: {', '.join(each)}")
        init(self, *args, **arguments)

    made.__init__ = checked
    return config


@_names_what_is_unknown
@dataclass
class FastDPOConfig(LossParams, TrainingArguments):
    """`transformers.TrainingArguments` and what DPO needs on top; the losses' knobs are those of `LossParams`.

    What differs from TRL is one table in docs/guide.md. Defaults that differ from transformers': learning_rate 1e-6,
    logging_steps 10, remove_unused_columns False (the trainer keeps only its own columns anyway; True is taken, and is
    False afterwards), logging_nan_inf_filter False (it waits for the device in each micro-step, and hides a diverging
    run). And by device, where they are not set:

        default                  CPU      accelerator                   TRL
        bf16 (autocast)          False    True where the device has it  True
        gradient_checkpointing   False    True                          True
        tf32                     None     None: torch's setting         None
        weights from a path      float32  float32                       float32
        non_blocking copies      False    True on CUDA                  False: accelerator_config

    Raises ValueError for values out of range and combinations that do not fit, before any model is loaded.
    """

    learning_rate: float = _option(1e-6, "Initial learning rate.")
    logging_steps: float = _option(10, "Log every that many steps; below 1, that share of all steps.")
    remove_unused_columns: bool = _option(False, "Changes nothing: the trainer keeps only the columns it needs.")
    logging_nan_inf_filter: bool = _option(False, "Leave NaN and infinite losses out of the logs, at a sync per step.")
    bf16: bool | None = _option(  # type: ignore[assignment]  # a bool again after __post_init__
        None,
        "Autocast to bfloat16. Default: on an accelerator that has it, unless fp16 is set; not on CPU.",
        nargs="?",
        const=True,
    )
    gradient_checkpointing: bool | None = _option(
        None,
        "Recompute activations in the backward, for memory. Default: on an accelerator, not on CPU.",
        nargs="?",
        const=True,
    )

    # the objective
    loss_type: list[str] = _option(["sigmoid"], f"One loss or several to add up: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = _option(None, "One weight per loss; 1 where not given.")
    ld_alpha: float | None = _option(None, "LD-DPO: weight of the tokens beyond the shorter completion's length.")
    use_weighting: bool = _option(False, "WPO: weigh each pair by how likely the policy is to produce it.")
    router_aux_loss_coef: float | None = _option(
        None, "Mixtures of experts: weight of the router's load-balancing loss. None: the model's own; 0: without."
    )

    # the data
    max_length: int | None = _option(1024, "Longest prompt + completion, in tokens; None: no limit.")
    max_prompt_length: int | None = _option(None, "Longest prompt; its end is kept. None: no limit of its own.")
    max_completion_length: int | None = _option(None, "Longest completion; its start is kept. None: no limit.")
    truncation_mode: str = _option(
        "keep_start", "Which part of prompt + completion max_length keeps.", choices=list(TRUNCATION_MODES)
    )
    layout: str = _option(
        "auto",
        "shared_prefix: one packed row, each prompt once, no padding; padded: two rows per pair; auto: the first, "
        "where the model can run it.",
        choices=list(LAYOUTS),
    )
    tokens_per_batch: int | None = _option(
        None, "Fill each training batch with pairs up to that many tokens, instead of per_device_train_batch_size."
    )
    pad_to_multiple_of: int | str | None = _option(  # an int or None after __post_init__
        None, "Pad padded rows to a multiple of this length. 'auto', TRL's default: to none."
    )
    chat_template_kwargs: dict[str, Any] | str | None = _option(
        None,
        "Variables of the chat template (or JSON), such as enable_thinking, for all rows; a row's own go first.",
    )
    dataset_num_proc: int | None = _option(None, "Processes that tokenise.")
    print_example: bool = _option(False, "Print the first pair as the model sees it.")

    # the models
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keywords (or JSON) for from_pretrained, where a model is given as a path; dtype is float32 if not in it."
    )
    trust_remote_code: bool = _option(False, "Allow models and tokenizers that come with code of their own.")
    disable_dropout: bool = _option(True, "No dropout in the policy; the reference never has any.")
    precompute_ref_log_probs: bool = _option(
        False,
        "Score each token of the data with the reference before training, then free it. Recomputed at each start, "
        "never stale: columns ref_chosen_logps and ref_rejected_logps of the data are replaced.",
    )
    precompute_ref_batch_size: int | None = _option(None, "Pairs per batch while precomputing; None: as in training.")
    impl: str = _option("auto", "Implementation of the kernels; see dpo-fast env.", choices=["auto", *IMPLS])
    tile_mib: int | None = _option(
        None, "Budget for a tile of logits in MiB. Default: 2,048 tokens on an accelerator with the memory, 256 on CPU."
    )
    extra_metrics: list[str] = _option([], f"Metrics that cost extra passes: {', '.join(EXTRA_METRICS)}.")

    def __post_init__(self):
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        for name in ("model_init_kwargs", "chat_template_kwargs"):
            setattr(self, name, _mapping(name, getattr(self, name)))
        self.pad_to_multiple_of = _length(self.pad_to_multiple_of)
        self.remove_unused_columns = False  # Trainer's way of removing them would take ours
        settings.check(self, FastDPOConfig)
        if "pretrained_model_name_or_path" in (self.model_init_kwargs or {}):
            raise ValueError("model_init_kwargs must not hold pretrained_model_name_or_path, which is the model")
        self._check()
        self._choose_by_device()
        TrainingArguments.__post_init__(self)

    def _choose_by_device(self) -> None:
        """What is not set and depends on where training runs; the table above."""
        accelerated = torch.accelerator.is_available() and not self.use_cpu
        if self.bf16 is None:
            self.bf16 = accelerated and not self.fp16 and is_torch_bf16_gpu_available()
            if accelerated and not self.fp16 and not self.bf16:
                logger.warning("bf16: this device has none, so training is in float32; fp16=True takes 16 bits")
        if not accelerated or torch.backends.mps.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin memory for, of which torch would warn
        elif self.dataloader_pin_memory and isinstance(self.accelerator_config, (dict, NoneType)):
            self.accelerator_config = {"non_blocking": True, **(self.accelerator_config or {})}
        # transformers calls it activation_checkpointing as well since 5.23
        name = "activation_checkpointing" if hasattr(self, "activation_checkpointing") else "gradient_checkpointing"
        if self.gradient_checkpointing is None and getattr(self, name) is None:
            setattr(self, name, accelerated)

    def _check(self) -> None:
        self._check_losses()
        self.truncation()
        if self.max_steps == 0:
            raise ValueError("max_steps must be at least 1, or -1 to train num_train_epochs, got 0")
        for what in ("eval", "save"):
            if getattr(self, f"{what}_steps") == 0:
                raise ValueError(f"{what}_steps must be above 0, got 0; {what}_strategy='no' is for never")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is of another loss and has no effect here; set label_smoothing")
        if not self.dataloader_num_workers:
            for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
                if getattr(self, name, None):
                    raise ValueError(f"{name} needs dataloader_num_workers of at least 1, got 0")
        if isinstance(self.accelerator_config, dict):
            settings.check_mapping("accelerator_config", self.accelerator_config, AcceleratorConfig)
            more = self.accelerator_config.get("gradient_accumulation_kwargs") or {}
            name = "accelerator_config: gradient_accumulation_kwargs"
            settings.check_mapping(name, more, GradientAccumulationPlugin)
        self._check_compiler()
        if self.max_steps <= 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs must be a finite number above 0, got {self.num_train_epochs}")
        settings.check_names("extra_metrics", self.extra_metrics, EXTRA_METRICS)

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, what loggers get; without secrets in mappings."""
        found = super().to_dict()
        return {name: plain(value) if isinstance(value, dict) else value for name, value in found.items()}

    def _check_losses(self) -> None:
        try:
            self.objective()
        except ValueError as error:  # with what is called otherwise there
            names = {"loss must be": "loss_type", "loss weights must be": "loss_weights"}
            name = next((name for said, name in names.items() if str(error).startswith(said)), None)
            if name is None:
                raise
            raise ValueError(f"{name}: {error}") from error

    def _check_compiler(self) -> None:
        backend, mode = self.torch_compile_backend, self.torch_compile_mode
        if backend is not None and backend.lower() not in (known := torch.compiler.list_backends(exclude_tags=())):
            raise ValueError(f"torch_compile_backend must be one of {', '.join(known)}, got {backend!r}")
        if mode is not None and mode not in (known := ["default", *torch._inductor.list_mode_options()]):
            raise ValueError(f"torch_compile_mode must be one of {', '.join(dict.fromkeys(known))}, got {mode!r}")
        old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)
        checkpoints = self.gradient_checkpointing or getattr(self, "activation_checkpointing", None)
        if old and self.torch_compile and checkpoints:
            logger.warning(
                "torch_compile with gradient_checkpointing: before torch 2.13 each batch of packed rows is compiled "
                "anew, and after eight none is; use a newer torch, or one of the two"
            )

    def objective(self) -> Objective:
        """The checked combination of losses that these arguments ask for."""
        return Objective(
            self.loss_type,
            weights=self.loss_weights,
            use_weighting=self.use_weighting,
            ld_alpha=self.ld_alpha,
            **{option.name: getattr(self, option.name) for option in fields(LossParams)},
        )

    def truncation(self) -> Truncation:
        return Truncation(self.max_length, self.max_prompt_length, self.max_completion_length, self.truncation_mode)
