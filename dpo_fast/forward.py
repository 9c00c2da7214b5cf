"""Stage 3: model + batch -> token log-probs, inside `model.forward`.

`attach(model)` gives a Hugging Face causal language model one more way to be called:

    scores = model(batch)                        # a PreferenceBatch first: TokenScores, no logits anywhere
    scores = model(batch, outputs=("entropy",))  # statistics by name, see `dpo_fast.ops.stats.STATS`
    out = model(batch, objective=Objective("sigmoid"), reference_logps=ref)  # PreferenceScores, with the loss
    model(input_ids=...), model.generate(...)    # anything else: the forward that the model came with

Everything happens inside `model.forward`, so what wrappers hang on it (DDP, FSDP, ZeRO, autocast, PEFT) stays armed,
and the backbone and the head are looked up at each call, because such wrappers replace them. The batch's layout decides
how the backbone runs: padded rows with the model's own attention, or a shared-prefix row with `attention.py`'s.
"""

import contextlib
import copy
import functools
import inspect
import logging
import types
import weakref
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, fields, replace
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import attention, packing
from .batch import PreferenceBatch
from .copies import ATTACHED, OLD_FORWARD, base_model_of, compute_with_own_weights, reached
from .heads import head_tensors
from .hooks import random_numbers_kept
from .layout import SharedPrefixLayout, separate_rows
from .logps import PairLogps
from .objective import Objective
from .ops.call import check_tile_mib
from .ops.checks import INTEGERS, check_tensor, describe
from .ops.dispatch import check_impl, readable
from .ops.linear import linear_token_stats
from .ops.logits import logits_token_stats
from .ops.stats import STATS, TokenStats
from .preference import linear_preference_loss, preference_from_stats
from .quantised import keep_trainable
from .router import balancing_loss, token_weights

logger = logging.getLogger("dpo_fast")

_ROWS = ("input_ids", "attention_mask", "position_ids")  # what the backbone reads of a batch
_NEEDED = ("input_ids", "targets", "sequence_ids", "predictors", "lengths", "layout")
_KNOBS = (
    "outputs",
    "objective",
    "reference_logps",
    "reference_token_logps",
    "mean_chosen_length",
    "aux_loss",
)
_STATE = ATTACHED


class TokenScores(NamedTuple):
    """What `model(batch)` returns: one value per scored token, (N,), None where not asked for.

    A named tuple, because wrappers look for tensors in the outputs they know: tuples, lists and dicts.
    """

    logps: Tensor  # fp32 log-prob of the target, in nats; the only one with a gradient
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    aux_loss: Tensor | None = None  # () with a gradient, where asked for: see `PreferenceScores`


class PreferenceScores(NamedTuple):
    """What `model(batch, objective=...)` returns."""

    mean_loss: Tensor  # () mean over the pairs; see `PreferenceOutput` for what else has a gradient
    losses: Tensor  # (P,)
    pairs: PairLogps
    tokens: TokenScores
    aux_loss: Tensor | None = None  # () a mixture of experts' balancing loss, not multiplied, not in `loss`

    @property
    def loss(self) -> Tensor:
        """`mean_loss`; a copy, because PEFT's AdaLoRA adds its regulariser to it in place. TRL's loss has none."""
        return self.mean_loss.clone()

    @loss.setter
    def loss(self, value: Tensor) -> None:
        pass


# Under which names configs declare a factor of the logits
_FACTORS = (
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
)


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to its head's output: logits = softcap * tanh(scale * head(hidden) / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config) -> "HeadTransform":
        """Read the transform that the config declares, under any of the names that transformers' models use."""
        text = config.get_text_config()
        declared = [getattr(text, name, None) for name in _FACTORS]
        scaling = getattr(text, "logits_scaling", None)
        if scaling is not None:  # a divisor (Granite, MiniCPM3), but a factor in HyperCLOVA X
            declared.append(scaling if text.model_type == "hyperclovax" else 1 / scaling)
        scale = next((value for value in declared if value is not None), 1.0)
        return cls(float(scale), getattr(text, "final_logit_softcapping", None))

    def __call__(self, head_output: Tensor) -> Tensor:
        logits = head_output.to(torch.promote_types(head_output.dtype, torch.float32)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class OwnLogits(Exception):
    """`attach` refuses a model whose own logits can be scored all the same."""


class _UnknownHead(OwnLogits, ValueError):
    """The logits are not a known function of the hidden states."""


class _UnknownAdapter(OwnLogits, TypeError):
    """It works on rows before the model's forward sees them, or past it."""


class _NoBackbone(OwnLogits, TypeError):
    """There is a head, and no module of its own that it is given the output of."""


@dataclass
class _Attachment:
    """State of an attached model. Holds no reference but through `original`, so that a deep copy is attached too."""

    original: Callable  # the forward that the model had
    transform: HeadTransform
    impl: str
    tile_mib: int | None
    checked: bool = False
    backbone: str = ""  # where the module is whose output the head is given; "": base_model
    packs: bool = False  # the probe of packed rows has found nothing in either mode: what compiled code asks
    autocast: Any = None  # the context in which accelerate runs the forward that the model had


def attach(model: nn.Module, *, impl: str = "auto", tile_mib: int | None = None) -> nn.Module:
    """Install the forward on `model` (a causal LM, or a PEFT model around one), in place; returns `model`.

    impl, tile_mib: as `linear_token_logps` takes them. Repeating it only sets these; `detach` undoes it. The head is
    checked once against the model's own logits on four tokens, here or, if the weights are not materialised yet, at the
    first call.

    Raises TypeError for a model without a backbone and an output head, ValueError for one whose logits are not the
    transform of its head's output that its config declares.
    """
    check_impl("attach", impl)
    tile_mib = None if tile_mib is None else check_tile_mib("attach", tile_mib)
    check_adapter(model)
    base = _causal_lm(model)
    keep_trainable(model)
    compute_with_own_weights(base)
    if is_attached(base):
        state = getattr(base, _STATE)
        state.impl, state.tile_mib = impl, tile_mib
        return model
    state = _Attachment(base.forward, HeadTransform.from_config(base.config), impl, tile_mib)
    if "_original_forward" in vars(base):  # prepared before it was attached
        state.autocast = next((value for value in reached(base.forward) if isinstance(value, torch.autocast)), None)
    if packing.is_ready(base):
        check_head(base, state)
    setattr(base, _STATE, state)
    base.forward = types.MethodType(_forward_of(type(base)), base)
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether calling `model` reaches what `attach` has installed: a mark on it survives the loss of its forward."""
    base = base_model_of(model)
    if not hasattr(base, _STATE):
        return False
    ways = (base.forward, vars(base).get(OLD_FORWARD))  # accelerate's hooks call the latter by its name
    found = [value for way in ways for value in reached(way)]
    if any(type(value) is type(base) and value is not base for value in found):
        return False  # what calling it reaches is the model that it was copied from
    return any(map(_is_ours, found))


def _is_ours(value) -> bool:
    return isinstance(value, types.FunctionType) and (value in _FORWARDS or value in LEADING)


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the model has the forward and the attention of before. Returns `model`.

    Accelerate's autocast around the forward goes with it. Raises RuntimeError where somebody else has wrapped it since.
    """
    base = _causal_lm(model)
    state = getattr(base, _STATE, None)
    if state is None:
        return model
    attention.disable(base)
    if is_attached(base):
        if not _on_top(base):
            raise RuntimeError("detach: the model's forward was wrapped again after attach; undo that first")
        if getattr(base.forward, "__func__", None) not in _FORWARDS:
            del base._original_forward
            vars(base).pop("_is_accelerate_prepared", None)  # or whoever prepares it next would leave autocast out
        del base.forward
        if base.forward != state.original:  # it was an instance's own, not its class's
            base.forward = state.original
    delattr(base, _STATE)
    return model


def release(model: nn.Module) -> None:
    """`detach`, as far as that is possible: a forward that others have wrapped stays, and serves them."""
    base = _causal_lm(model)
    attention.disable(base)
    if hasattr(base, _STATE) and _on_top(base):
        detach(model)


def _on_top(base: nn.Module) -> bool:
    return on_top(base.forward, _FORWARDS)


def on_top(forward: Callable, functions: Container[Callable]) -> bool:
    """Whether `forward` is one of the functions, or only accelerate's wrappers are around it."""
    function = getattr(forward, "__func__", forward)
    accelerates = str(getattr(function, "__module__", "")).startswith("accelerate.")
    return any(value in functions for value in (reached(forward) if accelerates else [function]) if callable(value))


def _causal_lm(model: nn.Module) -> nn.Module:
    """The Hugging Face model itself, below a PEFT wrapper if there is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: expected a Hugging Face causal language model, got {describe(model)}")
    base = base_model_of(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None or getattr(base, "base_model", base) is base:
        raise (TypeError if head is None else _NoBackbone)(
            f"attach: expected a Hugging Face causal language model with a backbone (base_model) and an output head "
            f"(get_output_embeddings), got {type(base).__name__}"
        )
    return base


def check_adapter(model: nn.Module) -> None:
    """Raise `OwnLogits` for a PEFT adapter that works on rows before the model's forward sees them, or past it."""
    if not hasattr(model, "get_base_model"):
        return
    active = [config for name, config in model.peft_config.items() if name in model.active_adapters]
    if any(getattr(config, "alora_invocation_tokens", None) for config in active):
        raise _UnknownAdapter("attach: the adapter (aLoRA) looks for its tokens in each row; use LoRA")
    kind = str(getattr(model.active_peft_config, "peft_type", "")).rpartition(".")[2]
    if getattr(model.active_peft_config, "is_prompt_learning", False):
        raise _UnknownAdapter(
            f"attach: the adapter ({kind}) puts tokens before each row, which cannot be scored; use LoRA"
        )
    if "forward" in vars(model.base_model):  # it keeps the forward that the model had when the adapter was made
        raise _UnknownAdapter(f"attach: the adapter ({kind}) does not call the model's forward as it is now; use LoRA")


_FORWARDS: set[Callable] = set()  # what `attach` installs, a function for each class of models
# Functions that find ours on the model itself, where nobody else sees it: the drop-in's, whose copies find their own
LEADING: "weakref.WeakSet[Callable]" = weakref.WeakSet()


@functools.cache
def _forward_of(model_class: type[nn.Module]) -> Callable:
    """The forward for models of this class; wraps the class's own for its signature, which `generate` reads."""

    @functools.wraps(model_class.forward)
    def forward(self, *args, **kwargs):
        batch = args[0] if args else kwargs.get("input_ids")
        if not isinstance(batch, dict):
            return getattr(self, _STATE).original(*args, **kwargs)
        kwargs.pop("input_ids", None)
        knobs = {name: kwargs.pop(name) for name in _KNOBS if name in kwargs}
        unexpected = [name for name, value in kwargs.items() if value is not None]  # PEFT passes its Nones along
        if len(args) > 1 or unexpected:
            raise TypeError(f"model(batch) takes nothing but {', '.join(_KNOBS)}, got {unexpected or args[1:]}")
        autocast = getattr(self, _STATE).autocast
        with contextlib.nullcontext() if autocast is None else copy.copy(autocast):  # an instance is entered once
            return score_batch(self, PreferenceBatch(batch), **knobs)  # FSDP turns subclasses of dict into dicts

    _FORWARDS.add(forward)
    return forward


def attachment(model: nn.Module) -> _Attachment:
    """What `attach` left on a model (the causal LM itself), after its head has been checked."""
    state = getattr(model, _STATE)
    if not state.checked:
        check_head(model, state)
    return state


def score_batch(
    model: nn.Module,
    batch: PreferenceBatch,
    outputs: Sequence[str] = (),
    objective: Objective | None = None,
    aux_loss: bool = False,
    **pair_knobs,
) -> TokenScores | PreferenceScores:
    """Backbone -> hidden states at the scored positions -> head (-> loss). Call `model(batch)`, which ends up here.

    pair_knobs, with an objective: reference_logps (2P,) or reference_token_logps (N,), mean_chosen_length;
    see `linear_preference_loss`. aux_loss: return a mixture of experts' balancing loss as well.
    Of a model that is spread over devices all comes back to the batch's.
    """
    _check_batch(model, batch)
    device = batch.input_ids.device
    state = attachment(model)
    backbone, batch = run_backbone(model, batch, **({"output_router_logits": True} if aux_loss else {}))
    _check_positions(model, backbone[0], batch)
    hidden = at_predictors(model, backbone[0], batch.predictors)
    head = model.get_output_embeddings()
    targets = batch.targets.to(hidden.device)
    aux = _balancing_loss(model, batch, backbone) if aux_loss else None
    if objective is None:
        if any(value is not None for value in pair_knobs.values()):
            raise TypeError(f"model(batch, ...) takes {', '.join(pair_knobs)} only together with objective=")
        scored = _token_scores(score_hidden(head, hidden, targets, state, outputs), outputs, aux)
        return _on(device, scored) if hidden.device != device else scored
    tensors, compiling = _tensors_or_reason(head, hidden), torch.compiler.is_compiling()
    common = dict(
        sequence_ids=batch.sequence_ids.to(hidden.device),
        num_pairs=batch.num_pairs,
        comparisons=batch.get("comparisons"),
        num_sequences=len(batch.lengths),
        loss=objective,
        outputs=outputs,
        impl=state.impl,
        **{name: _on(hidden.device, value) for name, value in pair_knobs.items()},
    )
    if isinstance(tensors, str):
        needed = (*outputs, "log_sum_sq_probs") if objective.use_weighting else outputs
        stats = score_hidden(head, hidden, targets, state, needed)
        out = preference_from_stats(stats, **common)
    else:
        out = linear_preference_loss(
            hidden,
            tensors.weight,
            targets,
            bias=tensors.bias,
            low_rank=tensors.low_rank,
            logit_scale=state.transform.scale,
            logit_softcap=state.transform.softcap,
            # A compiled graph would hold tuples fast, and be made anew for each batch
            sequence_lengths=None if compiling else batch.get("host_lengths"),
            sequence_order=None if compiling or batch.get("layout") is None else batch["layout"].ids,
            tile_mib=state.tile_mib,
            **common,
        )
    scores = PreferenceScores(out.loss, out.losses, out.pairs, _token_scores(out.stats, outputs), aux)
    return _on(device, scores) if hidden.device != device else scores


def _on(device: torch.device, value: Any) -> Any:
    """Tensors, and what holds them, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, PairLogps):
        return replace(value, **{field.name: _on(device, getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, tuple):
        moved = [_on(device, part) for part in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value


def _check_batch(model: nn.Module, batch: PreferenceBatch) -> None:
    """TypeError for what is no batch, ValueError for ids and positions out of range. On accelerators a look would stop
    the stream: there, ids are compared as far as the batch knows them on the host."""
    if missing := [name for name in _NEEDED if name not in batch]:
        raise TypeError(
            f"model(batch): a PreferenceBatch has {', '.join(_NEEDED)}, got a dict without {', '.join(missing)}; "
            "padded_batch and shared_prefix_batch make one"
        )
    if torch.compiler.is_compiling():
        return
    op, ids, predictors = "model(batch)", batch["input_ids"], batch["predictors"]
    check_tensor(op, "input_ids", ids, ("B", "T"), INTEGERS)
    check_tensor(op, "targets", batch["targets"], ("N",), INTEGERS)
    for name in ("predictors", "sequence_ids"):
        check_tensor(op, name, batch[name], tuple(batch["targets"].shape), (torch.int64,))
    check_tensor(op, "lengths", batch["lengths"], ("S",), (torch.int64,))
    for name in ("attention_mask", "position_ids"):
        value = batch.get(name)
        if value is not None and getattr(value, "shape", None) != ids.shape:
            raise ValueError(f"{op}: {name} must be of shape {tuple(ids.shape)} or None, got {describe(value)}")
    if not isinstance(batch["layout"], (SharedPrefixLayout, NoneType)):
        raise TypeError(f"{op}: layout must be a SharedPrefixLayout or None, got {describe(batch['layout'])}")
    largest = batch.get("host_largest_id")
    if ids.numel() and readable(ids):
        largest = ids.max().item()
        if (low := ids.min().item()) < 0:
            raise ValueError(f"model(batch): input_ids are at least 0, got {low}")
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if largest is not None and rows is not None and largest >= rows:
        raise ValueError(
            f"model(batch): input_ids holds the token id {largest}, the model's embedding has {rows} rows; it is "
            "another model's tokenizer, or model.resize_token_embeddings() has not been called"
        )
    if predictors.numel() and readable(predictors):
        low, high = predictors.min().item(), predictors.max().item()
        if low < 0 or high >= ids.numel():
            raise ValueError(
                f"model(batch): predictors must be in [0, {ids.numel()}), positions of input_ids, got {low} to {high}"
            )


def _balancing_loss(model: nn.Module, batch: PreferenceBatch, backbone) -> Tensor:
    return balancing_loss(model, getattr(backbone, "router_logits", None), token_weights(batch))


def _check_positions(model: nn.Module, hidden: Tensor, batch: PreferenceBatch) -> None:
    """A hook may have given the layers a part of each row."""
    if hidden.shape[:2] != batch.input_ids.shape:
        raise ValueError(
            f"{type(model).__name__} gave hidden states of {tuple(hidden.shape[:2])} positions for input_ids "
            f"{tuple(batch.input_ids.shape)}: rows that are spread over devices (sequence parallelism) cannot be scored"
        )


def run_backbone(model: nn.Module, batch: PreferenceBatch, **options) -> tuple:
    """The backbone's outputs, whose first is (B, T, H) hidden states, and the batch whose rows it ran.

    A packed row that the model cannot run, or not now (see packing.py), runs as padded rows, and a line says why.
    """
    if batch.layout is not None:
        reasons = reasons_against_packed_rows(model, batch.input_ids.device)
        if reasons:
            packing.refuse_or_log(model, reasons)
            batch = separate_rows(batch)
    backbone = backbone_of(model)
    rows = {name: batch[name] for name in _ROWS if batch.get(name) is not None} | {"use_cache": False, **options}
    rows |= batch.get("model_inputs", {})
    if batch.layout is not None:
        attention.enable(model)
        packed = attention.model_inputs(batch.layout, batch.input_ids.device)
        return packing.run(model, backbone, rows | packed), batch
    out = packing.run_padded(model, backbone, rows, one_by_one=not options.get("output_router_logits", False))
    return out, batch


def backbone_of(model: nn.Module) -> nn.Module:
    """The module of an attached model whose output the head is given."""
    path = getattr(model, _STATE).backbone
    backbone: Any = model.get_submodule(path) if path else model.base_model
    return backbone


def reasons_against_packed_rows(
    model: nn.Module, device: torch.device | None = None, training: bool | None = None
) -> list[str]:
    """Why an attached model must be given padded rows, not packed ones; empty if packed ones are right.

    The first call runs the probe (probe.py), once per model object.
    """
    base: Any = _causal_lm(model)
    state = attachment(base)  # the head's check finds the backbone
    if torch.compiler.is_compiling():  # hooks are part of what Dynamo traces
        return [] if state.packs else list(_reasons_not_compiled(base, device, training))
    device = base.device if device is None else device
    reasons = packing.reasons_against(base, lambda: backbone_of(base), device, training)
    state.packs = not reasons and packing.runs_in_both_modes(base)
    return reasons


@torch.compiler.disable
def _reasons_not_compiled(model: nn.Module, device, training) -> list[str]:
    return reasons_against_packed_rows(model, device, training)


def is_ready(model: nn.Module, device: torch.device) -> bool:
    """Whether the probe can run now, outside the model's wrappers; else the first packed batch runs it, inside."""
    base = _causal_lm(model)
    return packing.is_ready(base) and base.device.type == torch.device(device).type


def at_predictors(model: nn.Module, hidden: Tensor, predictors: Tensor) -> Tensor:
    """(B, T, H) -> (N, H) hidden states that predict the scored tokens, on the output head's device."""
    # A position may predict two tokens (the first ones of chosen and rejected): its gradient is the sum of two terms,
    # which no order of addition changes, so this is reproducible
    hidden = hidden.flatten(0, 1).index_select(0, predictors.to(hidden.device))
    head = model.get_output_embeddings()
    # FSDP1 may leave none, and accelerate keeps what it offloads on the device meta
    here = next((p.device for p in head.parameters() if not p.is_meta), hidden.device)
    return hidden.to(here)  # a model spread over devices


def score_hidden(
    head: nn.Module, hidden: Tensor, targets: Tensor, state: _Attachment, outputs: Sequence[str]
) -> TokenStats:
    """(N, H) hidden states -> statistics of the N targets, from the head's tensors, or by calling it (see heads.py)."""
    tensors, transform = _tensors_or_reason(head, hidden), state.transform
    if not isinstance(tensors, str):
        return linear_token_stats(
            hidden,
            tensors.weight,
            targets,
            outputs=outputs,
            bias=tensors.bias,
            low_rank=tensors.low_rank,
            logit_softcap=transform.softcap,
            logit_scale=transform.scale,
            tile_mib=state.tile_mib,
            impl=state.impl,
        )
    logits = of_head = head(hidden)  # (N, V)
    if transform.scale != 1.0:
        logits = logits * transform.scale
    return logits_token_stats(
        logits,
        targets,
        outputs=outputs,
        logit_softcap=transform.softcap,
        # A hook may hold what the head returned, and so may its own last operation. Over it, the gradient would save a
        # tensor of its size
        inplace_backward=logits is not of_head,
        impl=state.impl,
    )


def _tensors_or_reason(head: nn.Module, hidden: Tensor):
    tensors = head_tensors(head, hidden)
    if isinstance(tensors, str) and not torch.compiler.is_compiling():  # no graph holds a line; `check_head` says it
        _log_once(tensors)
    return tensors


@functools.cache
def _log_once(reason: str) -> None:
    logger.warning("the logits of the scored positions are built, %s", reason)


def _token_scores(stats: TokenStats, outputs: Sequence[str], aux_loss: Tensor | None = None) -> TokenScores:
    return TokenScores(
        stats.logps, **{name: getattr(stats, name) for name in STATS if name in outputs}, aux_loss=aux_loss
    )


def _takes_tokens(module: nn.Module) -> bool:
    return "input_ids" in inspect.signature(module.forward).parameters


def check_head(model: nn.Module, state: _Attachment) -> None:
    """Compare what `score_hidden` computes with the model's own logits on four tokens, once.

    One pass of the model's own forward suffices: hooks note what leaves the modules that take tokens, of which the
    backbone is one, and what enters and leaves the head. Raises `ValueError` with the name of the model's class.
    """
    name = type(model).__name__
    seen: dict[str, Any] = {}
    left: dict[nn.Module, Any] = {}

    def note(module, _args, out):  # the modules in the order in which they are left
        out = list(out.values()) if isinstance(out, dict) else out
        left[module] = out[0] if isinstance(out, (tuple, list)) and out else out

    hooks = [
        *(m.register_forward_hook(note) for m in model.modules() if _takes_tokens(m)),
        model.get_output_embeddings().register_forward_hook(
            lambda _module, args, out: seen.update(head_input=args[0], head_output=out)
        ),
    ]
    try:
        where = _device_of(model)
        with torch.no_grad(), random_numbers_kept(model, where):
            ids = torch.arange(4, device=where).remainder_(model.config.get_text_config().vocab_size)
            logits = state.original(input_ids=ids.unsqueeze(0), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not logits.isfinite().all():
        one = next((n for n, p in model.named_parameters() if not p.isfinite().all()), None)
        because = f"its weights are not: {one} has NaN or infinity" if one else "though all its weights are"
        raise ValueError(f"attach: {name}'s logits are not finite, {because}")
    if "head_output" not in seen:
        raise _UnknownHead(f"attach: {name} does not call its output head as a module, so it cannot be scored")
    entered = seen["head_input"]
    found = [m for m, x in left.items() if m is not model and isinstance(x, Tensor) and x.shape == entered.shape]
    found = [m for m in found if torch.equal(left[m], entered.to(left[m].device))]
    if not found:
        raise _UnknownHead(f"attach: {name} changes hidden states between backbone and head, in a way unknown here")
    if model.base_model not in found:  # OPT calls a part of it
        state.backbone = next(path for path, module in model.named_modules() if module is found[-1])
    ours = state.transform(seen["head_output"])
    theirs = logits.to(ours.dtype)
    coarse = max(torch.finfo(x.dtype).eps for x in (logits, seen["head_output"]))  # a wrapper may have widened logits
    # At most an eps for each of scale, division, tanh, product and the last cast
    tolerance = 5 * coarse * theirs.abs().max()
    if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= tolerance:
        raise _UnknownHead(
            f"attach: {name} transforms the output of its head in a way that its config does not declare: its logits "
            f"are not {state.transform} of it (maximum {theirs.abs().max():.4g}, expected {ours.abs().max():.4g})"
        )
    hidden, head = seen["head_input"].flatten(0, 1), model.get_output_embeddings()
    tensors = _tensors_or_reason(head, hidden)
    if not isinstance(tensors, str) and tensors.low_rank is None:  # with dropout in an adapter, each call differs
        hidden = hidden.to(tensors.weight.dtype)  # another where autocast's dtype is not the weights'
        with torch.no_grad():  # called here, as the model's forward may be wrapped in autocast
            product, called = nn.functional.linear(hidden, tensors.weight, tensors.bias), head(hidden)
        wide = torch.promote_types(product.dtype, torch.float32)
        difference = (product.to(wide) - called.to(wide)).abs()
        if not (difference <= _rounding_of_product(hidden, tensors.weight, product)).all():
            raise _UnknownHead(
                f"attach: {name}'s output head is not the product with its weight (off {difference.max():.4g})"
            )
    state.checked = True


def _device_of(model: Any) -> torch.device:
    """Where it runs: accelerate keeps what it offloads on the device meta."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    return (
        torch.device(getattr(hook, "execution_device", None) or "cpu") if model.device.type == "meta" else model.device
    )


def _rounding_of_product(hidden: Tensor, weight: Tensor, product: Tensor) -> Tensor:
    """(n, V): by how much two computations of hidden weight^T may differ. Sums of H products in another order (Higham,
    section 3.1) in fp32, or of products that a GPU rounds to TF32; then the result is rounded, once in each."""
    wide = torch.promote_types(product.dtype, torch.float32)
    unit = 2.0**-10 if hidden.is_cuda and hidden.dtype == torch.float32 else torch.finfo(wide).eps * hidden.shape[1]
    norms = (torch.linalg.vector_norm(x.detach(), dim=1, dtype=wide) for x in (hidden, weight))  # no copy in fp32
    return unit * torch.outer(*norms) + torch.finfo(product.dtype).eps * product.to(wide).abs()
