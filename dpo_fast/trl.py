"""TRL's `DPOTrainer` on shared-prefix rows: change one import, `from dpo_fast.trl import DPOTrainer`.

`DPOConfig`, loading, data, losses and metrics are TRL's own. TRL's trainer hands its models to `add_fused_lm_head`,
which gives them a forward that answers `model(..., labels=labels, fused_lm_head=True)` with per-token log-probs of a
padded batch. Ours answers the same call: it packs the batch's pairs into one row, each prompt once (layout.py), runs
that, and puts the results where TRL expects them. What cannot be packed runs as padded rows, and a log line says why.
A model whose head cannot be scored from here is left to TRL's own function, and a log line says that.

`padding_free=True` is accepted, and true of every packed batch. `DPOTrainer(..., layout="padded")`, or the environment
variable `DPO_FAST_LAYOUT=padded`, asks for padded rows; "shared_prefix" raises where "auto" would fall back.
`DPO_FAST_IMPL` chooses the head's implementation.
"""

import contextlib
import functools
import inspect
import logging
import os
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import attention, packing, trl_rows
from .batch import PreferenceBatch
from .copies import ATTACHED, compute_with_own_weights
from .drift import AdapterWatch
from .forward import (
    LEADING,
    at_predictors,
    attach,
    attachment,
    backbone_of,
    is_ready,
    on_top,
    reasons_against_packed_rows,
    score_hidden,
)
from .hooks import NEFTUNE
from .objective import Objective
from .ops.stats import STATS, TokenStats
from .preference import preference_from_stats
from .prepared import check_ranks, let_reentrant_checkpoints_run, prepare_anew, prepare_early
from .reference import is_peft_model
from .report.callback import reporting
from .report.pairs import PairEvaluation
from .router import balancing_loss
from .rows import packed_rows
from .training import checkpoints

try:
    import trl
    from trl.trainer import dpo_trainer
    from trl.trainer import utils as trl_utils
except ImportError as error:
    raise ImportError(
        "dpo_fast.trl needs TRL 1.15 or newer, and that Python 3.11 or newer: pip install 'trl>=1.15'"
    ) from error

logger = logging.getLogger("dpo_fast")

LAYOUTS = ("auto", "shared_prefix", "padded")
_SEAMS = "_dpo_fast_trl"  # of a model: the forwards that are installed on it
_PACKED = "_dpo_fast_packed"  # of a batch's labels: what they were packed with, and the packed row
_CONSTRUCTING = threading.RLock()


def check_seam() -> None:
    """Raise ImportError unless this TRL has what `DPOTrainer` below replaces and returns."""
    missing = []
    seam = getattr(dpo_trainer, "add_fused_lm_head", None)
    if seam is None:
        missing.append("trl.trainer.dpo_trainer.add_fused_lm_head")
    elif not {"model", "outputs"} <= set(inspect.signature(seam).parameters):
        missing.append("the arguments model and outputs of add_fused_lm_head")
    fields = set(getattr(getattr(trl_utils, "FusedCausalLMOutput", None), "__dataclass_fields__", ()))
    lacking = {"loss", "log_probs", "label_mask", "aux_loss", *STATS} - fields
    if lacking:
        missing.append(f"trl.trainer.utils.FusedCausalLMOutput with {', '.join(sorted(lacking))}")
    if missing:
        raise ImportError(_mismatch(f"has no {' and no '.join(missing)}"))


def _mismatch(what: str) -> str:
    return f"dpo_fast.trl is tested with TRL 1.15 and 1.16; TRL {trl.__version__} is installed, which {what}"


check_seam()


def __getattr__(name: str):
    """TRL's other names, which a script's one line imports beside `DPOTrainer`."""
    if name.startswith("__") or not hasattr(trl, name):
        raise AttributeError(f"dpo_fast.trl has no {name}, and TRL {trl.__version__} has none, either")
    return getattr(trl, name)


# --- the trainer ---------------------------------------------------------------------------------------------------


class DPOTrainer(PairEvaluation, dpo_trainer.DPOTrainer):
    """`trl.DPOTrainer`, faster: the same arguments, the same numbers, the same files.

    Beyond TRL's, adapters on the output head train (TRL refuses them) and `padding_free=True` is not ignored.
    layout: "auto" packs what can be packed, "padded" nothing; "shared_prefix" raises ValueError instead of falling
    back. None: DPO_FAST_LAYOUT, or "auto".

    Raises RuntimeError when TRL does not ask for the forward that is offered to it.
    """

    args: dpo_trainer.DPOConfig

    @functools.wraps(dpo_trainer.DPOTrainer.__init__)  # type: ignore[misc]  # mypy knows no decorated constructor
    def __init__(self, *args, layout: str | None = None, **kwargs):
        layout = _layout_asked_for(layout)
        _check_keywords(kwargs, set(inspect.signature(super().__init__).parameters))
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        config, watch = given.get("args"), AdapterWatch.of(given.get("model"))
        if config is not None:
            if not isinstance(config, dpo_trainer.DPOConfig):
                raise TypeError(f"args must be a trl.DPOConfig, got {type(config).__name__}")
            check_ranks(config.world_size)
            _take_old_dtype(config)
            let_reentrant_checkpoints_run(config)
        _check_models(given.get("model"), given.get("ref_model"))
        if layout != "padded" and getattr(config, "neftune_noise_alpha", None) is not None:
            _refuse_or_log(layout, [NEFTUNE])
            layout = "padded"
        noting = watch.noting(getattr(dpo_trainer, "get_peft_model", None))  # not there without PEFT
        installed = []

        def add_fused_lm_head(model, outputs=("log_probs",)):
            installed.append(_Installed(model, tuple(outputs), layout))

        # BaseTunerLayer: TRL's forward would not see an adapter on the head, so it refuses those; ours sees them
        ours = dict(add_fused_lm_head=add_fused_lm_head, BaseTunerLayer=_Nothing, get_peft_model=noting)
        with _in_trl(**ours), _padding_free_unseen(config):
            super().__init__(*args, **kwargs)
        if not installed:
            raise RuntimeError(_mismatch("does not call trl.trainer.dpo_trainer.add_fused_lm_head"))
        for model in (there.model for there in installed):  # proven before the first batch where they can run already
            packs = _SEAMS in vars(model) and layout != "padded"
            reasons = reasons_against_packed_rows(model) if packs and is_ready(model, self.args.device) else []
            if reasons:
                _refuse_or_log(layout, reasons)
            attention.disable(model)
        if not torch.accelerator.is_available():  # there is nothing to pin memory for, of which torch would warn
            self.args.dataloader_pin_memory = False
        if layout != "padded" and not self._is_vision_dataset:
            self.data_collator = trl_rows.PackingCollator(self.data_collator)
        self._installed, self._uses = installed, 0
        try:
            self._check_trains()
        except ValueError as error:  # it may be here to be evaluated
            logger.warning("dpo_fast.trl: %s", error)
        self.padding_free, self._layout = self.args.padding_free, layout
        if is_peft_model(self.model) and self.ref_model is None and (reasons := watch.reasons(self.model)):
            logger.warning(
                "dpo_fast.trl: TRL's reference is not the model before training, because %s. Pass ref_model; or use "
                "dpo_fast.FastDPOTrainer, which keeps the model from before training as the reference",
                "; ".join(reasons),
            )

    def train(self, *args, **kwargs):
        """As TRL's; ValueError for a model of which nothing trains."""
        self._check_trains()
        with self._models_in_use(), reporting(self):
            prepare_anew(self)
            return super().train(*args, **kwargs)

    def _check_trains(self) -> None:
        from .training.models import check_trains

        check_trains(self.model)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """As TRL's, which leaves out weights that are saved under other names, as experts are."""
        model = self.model if model is None else model
        if not checkpoints.loads_renamed(self, Path(resume_from_checkpoint), model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if not checkpoints.loads_renamed(self, Path(self.state.best_model_checkpoint), self.model):
            super()._load_best_model()

    def evaluate(self, *args, **kwargs):
        """As TRL's."""
        with self._models_in_use():
            return super().evaluate(*args, **kwargs)

    def predict(self, test_dataset, *args, **kwargs):
        """As TRL's, of what `evaluate` takes."""
        with self._models_in_use():
            if not self._is_vision_dataset:
                test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test")
                if self.precompute_ref_logps and "ref_chosen_logps" not in (test_dataset.column_names or ()):
                    test_dataset = self._with_reference_logps(test_dataset)
            return super().predict(test_dataset, *args, **kwargs)

    def _with_reference_logps(self, dataset):
        if self.ref_model is None and not is_peft_model(self.model) and self.state.global_step > 0:
            raise ValueError(
                "precompute_ref_log_probs=True keeps no reference model after training has begun: pass the data as "
                "eval_dataset when the trainer is built, or pass ref_model"
            )
        size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        return self._precompute_ref_logps(dataset, "test", size)

    def evaluation_loop(self, *args, **kwargs):
        """As TRL's."""
        prepare_early(self)
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        """As TRL's."""
        if self._of_pairs is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        outputs: list = []
        models = [m for m in (self.model, self.ref_model) if m is not None]
        hooks = [m.register_forward_hook(lambda _, __, output: outputs.append(output)) for m in models]
        try:
            inputs = self._prepare_inputs(inputs)
            found = super().prediction_step(model, inputs, *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        self._note_pairs(self._rewards_and_lengths(inputs, *outputs[:2]))
        return found

    def _rewards_and_lengths(self, inputs: dict, policy, reference=None) -> Tensor:
        """(4, P): rewards of chosen and rejected, their scored tokens. policy, reference: what the models gave."""
        scored = inputs["completion_mask"][:, 1:].bool()
        given = ("ref_chosen_logps", "ref_rejected_logps")
        if self.precompute_ref_logps:
            references = dict(reference_logps=torch.cat([inputs[name] for name in given]))
        else:
            references = dict(reference_token_logps=reference.log_probs[:, -scored.shape[1] :][scored])
        stats = TokenStats(policy.log_probs[:, -scored.shape[1] :][scored])
        objective = Objective(beta=self.beta, ld_alpha=self.ld_alpha)
        out = preference_from_stats(stats, scored.nonzero()[:, 0], len(scored) // 2, loss=objective, **references)
        found = out.chosen_rewards, out.rejected_rewards, out.pairs.chosen_lengths, out.pairs.rejected_lengths
        return torch.stack([x.to(out.loss) for x in found])

    def _prepare_inputs(self, inputs):
        return trl_rows.prepared(inputs, super()._prepare_inputs(inputs))

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As TRL's. By itself it leaves the models as they are in use: a backward may come."""
        self._use_models()
        with trl_rows.handed_over(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        """As TRL's."""
        self._use_models()
        with trl_rows.handed_over(inputs):
            return super().compute_ref_log_probs(model, inputs)

    def report_facts(self) -> dict:
        """What `dpo_fast.report` shows of this trainer, each choice with its reason."""
        from .training import facts  # not needed to train
        from .training.data import Truncation

        cut = Truncation(self.args.max_length, mode=self.args.truncation_mode)
        if self.ref_model is not None:
            reference = ("another model, which stays as it is", "ref_model was given, or TRL loaded a copy")
        elif self.precompute_ref_logps:
            reference = ("log-probs that lie with the data", "precompute_ref_log_probs")
        else:
            reference = ("the model without its adapter", "TRL's choice for a model with an adapter")
        with self._models_in_use():
            layout = self._layout_and_why()
        return {
            "how": [("reference", *reference), ("layout", *layout)],
            "lengths": facts.of_lengths(self.train_dataset, cut, facts.limits_of(self.args)),
            "notes": [],
        }

    def _layout_and_why(self) -> tuple[str, str]:
        if self._layout == "padded":
            return "padded", "asked for, or the embeddings get noise"
        models = [there.model for there in self._installed]
        if any(_SEAMS not in vars(model) for model in models):
            return "padded", "a model runs with TRL's own head"
        if not all(is_ready(model, self.args.device) for model in models):
            return "shared_prefix", "if the first batch shows that the models run it right"
        reasons = [reason for model in models for reason in reasons_against_packed_rows(model)]
        if reasons:
            return "padded", "; ".join(dict.fromkeys(reasons))
        return "shared_prefix", "each prompt runs once; a probe shows that the models run it right"

    @contextlib.contextmanager
    def _models_in_use(self) -> Iterator[None]:
        """After the outermost use the models are called as before this trainer was made, and pickles of them and of
        their configs load without us."""
        self._use_models()
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                for there in self._installed:
                    there.leave()

    def _use_models(self) -> None:
        for there in getattr(self, "_installed", ()):  # TRL's constructor calls methods, too
            there.enter()


def _layout_asked_for(layout: str | None) -> str:
    source, layout = ("layout", layout) if layout else ("DPO_FAST_LAYOUT", os.environ.get("DPO_FAST_LAYOUT") or "auto")
    if layout not in LAYOUTS:
        raise ValueError(f"{source} must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout


# Arguments of other trainers, and of TRL's before 1.0 -> what to do instead
_NOT_TAKEN = {
    "tokenizer": "it is called processing_class",
    "model_init": "give the model, and build a trainer for each trial of a search",
    "preprocess_logits_for_metrics": "compute_metrics gets the logits",
    "model_adapter_name": "the adapter that trains is called default",
    "ref_adapter_name": "the reference is the adapter as it is before training",
}


def _check_keywords(given: dict, known: set[str]) -> None:
    fields = dpo_trainer.DPOConfig.__dataclass_fields__
    for name in given.keys() - known:
        hint = "put it into DPOConfig" if name in fields else _NOT_TAKEN.get(name, "TRL's DPOTrainer has none")
        raise TypeError(f"DPOTrainer takes no argument {name}: {hint}")


def _take_old_dtype(config) -> None:
    """The name that dtype had before transformers 4.56: TRL would load float32 without a word."""
    options = config.model_init_kwargs
    if isinstance(options, dict) and "torch_dtype" in options:
        dtype = options["torch_dtype"]
        dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, str) else dtype
        logger.warning("dpo_fast.trl: torch_dtype in model_init_kwargs is called dtype now; it is taken as that")
        config.model_init_kwargs = {"dtype": dtype, **{k: v for k, v in options.items() if k != "torch_dtype"}}


def _check_models(model, ref_model) -> None:
    """Raise for what TRL cannot take, before it says so with a KeyError or an AttributeError: paths of adapters or of a
    reference, and names of adapters."""
    if isinstance(ref_model, str):
        raise TypeError(
            "ref_model must be a model: load it (AutoModelForCausalLM.from_pretrained), or leave it out, and TRL loads "
            "the model's own path a second time"
        )
    if isinstance(model, str):
        if (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"{model!r} holds an adapter, which TRL does not load: pass "
                "peft.AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=True) to train it further"
            )
        return
    if not is_peft_model(model) or ref_model is not None:
        return
    names = ", ".join(model.peft_config)
    if "default" not in model.peft_config and hasattr(model, "active_peft_config"):
        raise ValueError(
            f"TRL trains the adapter called default, the model has {names}: load it under that name, pass ref_model, "
            "or use dpo_fast.FastDPOTrainer, which takes any"
        )
    if "ref" in model.peft_config:
        raise ValueError(
            f"TRL keeps its reference as an adapter called ref, and the model has one already ({names}): "
            "model.delete_adapter('ref'), pass ref_model, or use dpo_fast.FastDPOTrainer, which needs no name"
        )


class _Nothing:
    """A class without instances."""


@contextlib.contextmanager
def _in_trl(**replacements) -> Iterator[None]:
    """Replace names of `trl.trainer.dpo_trainer`; one that it does not have (BaseTunerLayer without PEFT) is left out.

    One thread at a time; nested uses unwind in order.
    """
    with _CONSTRUCTING:
        originals = {name: vars(dpo_trainer)[name] for name in replacements if name in vars(dpo_trainer)}
        vars(dpo_trainer).update({name: replacements[name] for name in originals})
        try:
            yield
        finally:
            vars(dpo_trainer).update(originals)


@contextlib.contextmanager
def _padding_free_unseen(config) -> Iterator[None]:
    """Hide `padding_free` from TRL, which would warn that it ignores it."""
    asked = getattr(config, "padding_free", False)
    if asked:
        config.padding_free = False
    try:
        yield
    finally:
        if asked:
            config.padding_free = True


# --- the forward ---------------------------------------------------------------------------------------------------


@dataclass
class _Seam:
    """One installed forward's state, kept on the model by attribute, so that a deep copy of the model has its own."""

    inner: Callable  # the bound forward below
    outputs: tuple[str, ...]  # fields of FusedCausalLMOutput that TRL asks for
    layout: str  # one of LAYOUTS


class _Installed:
    """A model with the forward below, from its construction on; `leave` takes that off again, `enter` puts it back."""

    def __init__(self, model: nn.Module, outputs: tuple[str, ...], layout: str):
        self.model, self.outputs, self.layout = model, outputs, layout
        self.in_use: dict | None = None
        self._install()

    def _install(self) -> None:
        compute_with_own_weights(self.model)  # or a forward that works on another model would come back
        self.before = _way_of(self.model)
        install(self.model, self.outputs, self.layout)
        self.ours = getattr(self.model.forward, "__func__", self.model.forward)

    def enter(self) -> None:
        if self.in_use is None:
            return
        if _way_of(self.model) == self.before:
            _set_way(self.model, self.in_use)
        else:  # it was wrapped in the meantime
            self._install()
        self.in_use = None

    def leave(self) -> None:
        """Keeps a forward that somebody has wrapped, unless it was accelerate, whose wrapper comes back with ours."""
        attention.disable(self.model)
        if self.in_use is None and on_top(self.model.forward, [self.ours]):
            self.in_use = _way_of(self.model)
            _set_way(self.model, self.before)


_WAY = ("forward", "_original_forward", "_is_accelerate_prepared", ATTACHED, _SEAMS)


def _way_of(model: nn.Module) -> dict:
    """The attributes that say what calling a model runs, of its own, not of its class."""
    own = {name: vars(model)[name] for name in _WAY if name in vars(model)}
    return {name: list(value) if isinstance(value, list) else value for name, value in own.items()}


def _set_way(model: nn.Module, way: dict) -> None:
    for name in _WAY:
        vars(model).pop(name, None)
    vars(model).update(way)


def install(model: nn.Module, outputs: tuple[str, ...] = ("log_probs",), layout: str = "auto") -> None:
    """What TRL's `add_fused_lm_head` does: let `model`, a causal LM, answer `model(..., fused_lm_head=True)`.

    Any other call goes to the forward that the model had, and `dpo_fast.attach`'s. A model that `attach` refuses gets
    TRL's own, unless an adapter is on its head, which TRL's would not see.
    """
    unknown = set(outputs) - {"log_probs", *STATS}
    if unknown:
        raise RuntimeError(_mismatch(f"asks for {', '.join(sorted(unknown))} of each token"))
    compute_with_own_weights(model)
    try:
        attach(model)
    except (TypeError, ValueError) as error:
        head = model.get_output_embeddings()
        if layout == "shared_prefix" or hasattr(head, "base_layer"):
            raise
        own = vars(model).get("forward")
        trl_utils.add_fused_lm_head(model, outputs=tuple(outputs))
        if not _trls_head_is_right(model):
            del model.forward
            if own is not None:
                model.forward = own
            raise
        logger.warning("dpo_fast.trl: %s runs with TRL's own head and padded rows: %s", type(model).__name__, error)
        return
    seams = vars(model).setdefault(_SEAMS, [])  # a model may go through several trainers, as with TRL's
    level = len(seams)
    seams.append(_Seam(model.forward, tuple(outputs), layout))

    @functools.wraps(type(model).forward)  # `generate` reads its signature
    def forward(self, *args, fused_lm_head=False, **kwargs):
        seam = vars(self)[_SEAMS][level]
        if not fused_lm_head:
            return seam.inner(*args, **kwargs)
        if args:
            raise TypeError(f"model(..., fused_lm_head=True) takes keyword arguments, got {len(args)} positional ones")
        return _fused_output(self, seam, **kwargs)

    LEADING.add(forward)
    model.forward = types.MethodType(forward, model)


@torch.no_grad()
def _trls_head_is_right(model: nn.Module) -> bool:
    """Whether TRL's head gives the log-probs of the model's own logits on four tokens; True where it cannot run yet."""
    if not packing.is_ready(model):
        return True
    where: Any = model.device
    ids = torch.arange(1, 5, device=where).unsqueeze(0)
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True).log_probs
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, :-1]
    true = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    # Of a logit: five roundings, as in forward.py's check, and the sum of its products in another order, which errs by
    # the root of their number (Higham, section 2.8). A log-prob is a difference of two, after exp, sum and log in fp32
    fine, width = torch.finfo(torch.float32).eps, model.config.get_text_config().hidden_size
    of_logits = (5 * torch.finfo(logits.dtype).eps + width**0.5 * fine) * logits.abs().max()
    return bool((found - true).abs().max() <= 2 * of_logits + 4 * fine * true.abs().max())


def _fused_output(model, seam: _Seam, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
    """labels (B, T), or shift_labels, which are shifted already -> FusedCausalLMOutput with fields (B, T - 1)."""
    state, config = attachment(model), model.config.get_text_config()
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes its Nones along
    kwargs["use_cache"] = False
    routed = kwargs.setdefault("output_router_logits", getattr(config, "output_router_logits", False))
    if not routed:
        del kwargs["output_router_logits"]
    rows = _rows_of(model, seam.layout, kwargs, labels, shift_labels)
    if "pair_layout" in rows.inputs:
        attention.enable(model)
        out = packing.run(model, backbone_of(model), rows.inputs)
    else:
        out = packing.run_padded(model, backbone_of(model), rows.inputs, one_by_one=not routed)
    hidden = at_predictors(model, out[0], rows.predictors)
    targets, places = rows.targets.to(hidden.device), rows.places
    wanted = [name for name in seam.outputs if name != "log_probs"]
    stats = score_hidden(model.get_output_embeddings(), hidden, targets, state, wanted)

    def spread(values: Tensor) -> Tensor:
        values = values.to(places.device)  # of a model that is spread over devices
        return values.new_zeros(rows.shape.numel()).index_copy(0, places, values).view(rows.shape)

    loss = -stats.logps.sum() / (max(places.numel(), 1) if num_items_in_batch is None else num_items_in_batch)
    aux_loss = balancing_loss(model, getattr(out, "router_logits", None), rows.token_weights()) if routed else None
    if aux_loss is not None:
        aux_loss = aux_loss.to(loss.device)
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return trl_utils.FusedCausalLMOutput(
        loss=loss.to(places.device),
        log_probs=spread(stats.logps),
        label_mask=spread(torch.ones_like(places, dtype=torch.bool)),
        aux_loss=None if aux_loss is None else aux_loss.to(places.device),
        **{name: spread(getattr(stats, name)) for name in wanted},
    )


# --- TRL's batch as rows for the model -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    inputs: dict  # keyword arguments of the backbone
    shape: torch.Size  # of TRL's fields, (B, T - 1)
    predictors: Tensor  # (N,) int64 positions of the backbone's flattened rows
    targets: Tensor  # (N,) int64
    places: Tensor  # (N,) int64 positions of TRL's flattened fields

    def token_weights(self) -> Tensor | None:
        """(B, T) of the backbone's rows: how many of TRL's tokens each stands for."""
        if "pair_layout" in self.inputs:
            return self.inputs["pair_layout"].sequences_per_token().unsqueeze(0)
        return self.inputs.get("attention_mask")


def _rows_of(model: nn.Module, layout: str, kwargs: dict, labels, shift_labels) -> _Rows:
    """Packed if nothing speaks against it, else as they come; in that case the reasons are logged, once."""
    if layout != "padded":
        reasons = reasons_against_packed_rows(model) or _reasons_against_batch(kwargs, labels)
        packed = reasons or _packed_once(kwargs, labels)
        if isinstance(packed, _Rows):
            return packed
        _refuse_or_log(layout, packed)
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    places = (targets != -100).flatten().nonzero().squeeze(1)
    row_ends = 0 if shift_labels is not None else places // max(targets.shape[1], 1)  # each row has one more position
    return _Rows(
        inputs=kwargs,
        shape=targets.shape,
        predictors=places + row_ends,
        targets=targets.flatten()[places],
        places=places,
    )


def _refuse_or_log(layout: str, reasons: list[str]) -> None:
    if layout == "shared_prefix":
        raise ValueError(f"layout='shared_prefix' cannot run: {'; '.join(reasons)}; use layout='padded' or 'auto'")
    _log_once("; ".join(reasons))


@functools.cache
def _log_once(reasons: str) -> None:
    logger.warning("dpo_fast.trl: padded rows, not shared prefixes, because %s", reasons)


def _reasons_against_batch(kwargs: dict, labels) -> list[str]:
    """Why a batch is not one of text pairs in rows [chosen, rejected]; what can be said without reading its values."""
    others = kwargs.keys() - {"input_ids", "attention_mask", "use_cache", "output_router_logits"}
    if others:
        return [f"the batch has {', '.join(sorted(others))}"]
    if labels is None:
        return ["the labels are shifted, as for sequences that are spread over devices"]
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is None or mask is None or not (ids.shape == mask.shape == labels.shape and len(ids) % 2 == 0):
        return ["the batch is not 2P rows of input_ids, attention_mask and labels"]
    return []


@torch.compiler.disable  # it reads the batch on the host, of which Dynamo would make a graph
def _packed_once(kwargs: dict, labels: Tensor) -> _Rows | list[str]:
    """The batch as the data loader has packed it; else packed here, for the policy's and the reference's forward: kept
    with its labels, and gone with them."""
    ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
    packed: PreferenceBatch | str | None = trl_rows.handed(ids, mask, labels)
    if packed is None:
        known = getattr(labels, _PACKED, None)
        if known is None or known[0] is not ids or known[1] is not mask:
            known = ids, mask, packed_rows(ids, mask, labels)
            setattr(labels, _PACKED, known)
        packed = known[2]
    if isinstance(packed, str):
        return [packed]
    row = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    return _Rows(
        inputs={**kwargs, **row, **attention.model_inputs(packed.layout, labels.device)},
        shape=torch.Size(packed.field_shape),
        predictors=packed.predictors,
        targets=packed.targets,
        places=packed.places,
    )
