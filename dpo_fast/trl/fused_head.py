"""TRL 1.15 and newer: its trainer hands its models to `add_fused_lm_head`, which gives them a forward that answers
`model(..., labels=labels, fused_lm_head=True)` with per-token log-probs of a padded batch. Ours answers the same call.

A model whose head cannot be scored from here is left to TRL's own function, and a log line says that.
"""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl.trainer import utils as trl_utils

from .. import attention, packing, trl_rows
from ..batch import PreferenceBatch
from ..copies import compute_with_own_weights
from ..forward import (
    at_predictors,
    attach,
    attachment,
    backbone_of,
    reasons_against_packed_rows,
    score_hidden,
)
from ..ops.stats import STATS
from ..reference import is_peft_model
from ..router import balancing_loss
from ..rows import packed_rows
from .checks import refuse_or_log
from .installed import Installed, lead
from .mixin import Mixin
from .seams import mismatch

logger = logging.getLogger("dpo_fast")

_PACKED = "_dpo_fast_packed"  # of a batch's labels: what they were packed with, and the packed row


def check_seam() -> None:
    """Raise ImportError unless this TRL has what is returned to it below."""
    fields = getattr(getattr(trl_utils, "FusedCausalLMOutput", None), "__dataclass_fields__", {})
    if lacking := {"loss", "log_probs", "label_mask", "aux_loss", *STATS} - set(fields):
        raise mismatch(f"has no trl.trainer.utils.FusedCausalLMOutput with {', '.join(sorted(lacking))}")


check_seam()


# --- the trainer ---------------------------------------------------------------------------------------------------


class FastDPO(Mixin):
    """`dpo_fast.trl.FastDPO` where TRL has `add_fused_lm_head`. Raises RuntimeError where TRL does not call it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self._layout != "padded" and not self._is_vision_dataset:
            self.data_collator = trl_rows.PackingCollator(self.data_collator)
        self.padding_free = self.args.padding_free

    def _names_in_trl(self) -> dict[str, Any]:
        self._installed = []

        def add_fused_lm_head(model, outputs=("log_probs",)):
            self._installed.append(
                Installed(model, functools.partial(install, outputs=tuple(outputs), layout=self._layout))
            )

        # BaseTunerLayer: TRL's forward would not see an adapter on the head, so it refuses those; ours sees them
        return dict(add_fused_lm_head=add_fused_lm_head, BaseTunerLayer=_Nothing)

    def _take_models(self) -> None:
        if not self._installed:
            raise RuntimeError(str(mismatch("does not call trl.trainer.dpo_trainer.add_fused_lm_head")))

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

    def _prepare_inputs(self, inputs):
        return trl_rows.prepared(inputs, super()._prepare_inputs(inputs))

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As TRL's. By itself it leaves the models as they are in use: a backward may come."""
        with trl_rows.handed_over(inputs):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def compute_ref_log_probs(self, model, inputs):
        """As TRL's."""
        with trl_rows.handed_over(inputs):
            return super().compute_ref_log_probs(model, inputs)


class _Nothing:
    """A class without instances."""


# --- the forward ---------------------------------------------------------------------------------------------------


@dataclass
class _Seam:
    """One installed forward's state, kept on the model by attribute, so that a deep copy of the model has its own."""

    inner: Callable  # the bound forward below
    outputs: tuple[str, ...]  # fields of FusedCausalLMOutput that TRL asks for
    layout: str  # one of LAYOUTS
    pairs: bool  # rows i and B/2 + i belong together

    def answer(self, model: nn.Module, args: tuple, kwargs: dict):
        if not kwargs.pop("fused_lm_head", False):
            return self.inner(*args, **kwargs)
        if args:
            raise TypeError(f"model(..., fused_lm_head=True) takes keyword arguments, got {len(args)} positional ones")
        return _fused_output(model, self, **kwargs)


def install(
    model: nn.Module, outputs: tuple[str, ...] = ("log_probs",), layout: str = "auto", pairs: bool = True
) -> None:
    """What TRL's `add_fused_lm_head` does: let `model`, a causal LM, answer `model(..., fused_lm_head=True)`.

    Any other call goes to the forward that the model had, and `dpo_fast.attach`'s. A model that `attach` refuses gets
    TRL's own, unless an adapter is on its head, which TRL's would not see.
    """
    unknown = set(outputs) - {"log_probs", *STATS}
    if unknown:
        raise RuntimeError(str(mismatch(f"asks for {', '.join(sorted(unknown))} of each token")))
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
    lead(model, _Seam(model.forward, tuple(outputs), layout, pairs))


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
    rows = _rows_of(model, seam, kwargs, labels, shift_labels)
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


def _rows_of(model: nn.Module, seam: _Seam, kwargs: dict, labels, shift_labels) -> _Rows:
    """Packed if nothing speaks against it, else as they come; in that case the reasons are logged, once."""
    if seam.layout != "padded":
        reasons = reasons_against_packed_rows(model) or _reasons_against_batch(kwargs, labels, seam.pairs)
        packed = reasons or _packed_once(kwargs, labels, seam.pairs)
        if isinstance(packed, _Rows):
            return packed
        refuse_or_log(seam.layout, packed)
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


def _reasons_against_batch(kwargs: dict, labels, pairs: bool) -> list[str]:
    """Why a batch is not one of text rows, [chosen, rejected] if they are pairs; what can be said without reading its
    values."""
    others = kwargs.keys() - {"input_ids", "attention_mask", "use_cache", "output_router_logits"}
    if others:
        return [f"the batch has {', '.join(sorted(others))}"]
    if labels is None:
        return ["the labels are shifted, as for sequences that are spread over devices"]
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    if ids is None or mask is None or not ids.shape == mask.shape == labels.shape or pairs and len(ids) % 2:
        return [f"the batch is not {'2P ' if pairs else ''}rows of input_ids, attention_mask and labels"]
    return []


@torch.compiler.disable  # it reads the batch on the host, of which Dynamo would make a graph
def _packed_once(kwargs: dict, labels: Tensor, pairs: bool) -> _Rows | list[str]:
    """The batch as the data loader has packed it; else packed here, for the policy's and the reference's forward: kept
    with its labels, and gone with them."""
    ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
    packed: PreferenceBatch | str | None = trl_rows.handed(ids, mask, labels)
    if packed is None:
        known = getattr(labels, _PACKED, None)
        if known is None or known[0] is not ids or known[1] is not mask:
            known = ids, mask, packed_rows(ids, mask, labels, pairs)
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
