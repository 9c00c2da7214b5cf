"""Stage 2: attention over a shared-prefix row (layout.py), for stock transformers models.

`enable(model)` switches a model to an attention implementation registered with transformers' `AttentionInterface`. It
is named after the one that the model came with, "dpo_fast_over_sdpa" for instance: without a layout among its keyword
arguments it is that implementation, mask included, so `generate` and plain calls are unchanged. A layout travels as the
keyword argument `pair_layout` of the model's forward, through the layers, to the attention function.

    flash_attn_3, varlen, flash_attn_2
              CUDA: one call of variable-length flash attention (flash.py), from whichever package has it
    flex      CUDA: FlexAttention with a block mask (flex.py), where flash attention cannot run: sinks, fp32, a soft-cap
              without one of the packages, values narrower than queries
    eager     CPU and anything else: a call per sequence, its own tokens against the whole of it; no mask over the row
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import flash, flex
from .block_mask import block_mask
from .layout import ForLayers, SharedPrefixLayout
from .scores import Scores

PREFIX = "dpo_fast_over_"
IMPLEMENTATIONS = (*flash.NAMES, "flex", "eager")  # in the order of choice
# Asked here: Dynamo before torch 2.13 cannot trace the question
_AUTOCAST = {kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "xla") if torch.amp.is_autocast_available(kind)}


# --- on transformers' side -----------------------------------------------------------------------------------------


def enable(model: nn.Module) -> None:
    """Let `model` (a transformers model) take `pair_layout`; calls without one are unchanged. Idempotent."""
    ahead = [config for config in _configs(model) if not (config._attn_implementation or PREFIX).startswith(PREFIX)]
    if not ahead:  # as in each step but the first, which compiled code sees alone: no import for Dynamo to trace
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for config in ahead:
        original = config._attn_implementation
        name = PREFIX + original
        AttentionInterface.register(name, functools.partial(_attention, original=original))
        if original in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
        # Not through set_attn_implementation, which refuses on models that only lack the flag for it
        config._attn_implementation_internal = name


def disable(model: nn.Module) -> None:
    """Undo `enable`."""
    for config in _configs(model):
        name = config._attn_implementation
        if name is not None and name.startswith(PREFIX):
            config._attn_implementation_internal = name.removeprefix(PREFIX)


def _configs(model: nn.Module) -> list:
    """Every config that a module of the model reads, each once."""
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "sub_configs")}
    return list(found.values())


def model_inputs(layout: SharedPrefixLayout, device: torch.device) -> dict:
    """Keyword arguments for a model's forward besides input_ids and position_ids.

    A mask of four dimensions is taken as prepared and handed through: that is how no mask over the row is made. Nothing
    reads it, and what did would compute NaN.
    """
    return {"attention_mask": torch.full((1, 1, 1, 1), torch.nan, device=device), "pair_layout": layout}


def _attention(module, query, key, value, attention_mask, *args, original, pair_layout=None, **kwargs):
    """The registered function: query (B, heads, S, D), key and value (B, kv heads, S, D) -> (B, S, heads, D), None."""
    if pair_layout is None:
        if _is_stand_in(attention_mask, query):
            raise LayoutLost(f"a layer above {type(module).__name__} does not hand the layout of a packed row on")
        out = _original(module, original)(module, query, key, value, attention_mask, *args, **kwargs)
        return out if _OBSERVER is None else _OBSERVER(module, out, kwargs)
    if not torch.compiler.is_compiling():  # the probe has run uncompiled, see packing.py
        pair_layout.called.modules.add(module)
    dropout = kwargs.get("dropout") or 0.0
    if dropout and module.training:
        raise ValueError(f"attention dropout must be 0 over a shared-prefix row, got {dropout}; use disable_dropout")
    scaling = kwargs.get("scaling")
    knobs = dict(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return shared_prefix_attention(query, key, value, pair_layout, **knobs), None


class LayoutLost(RuntimeError):
    """A packed row reached an attention layer without its layout."""


# Is shown every call without a layout, and gives the result: (module, (output, weights), keywords) -> the same.
# None but while probe.py looks.
_OBSERVER = None


@contextlib.contextmanager
def observed(observer) -> Iterator[None]:
    """Show `observer` the calls of attention layers without a layout."""
    global _OBSERVER
    before, _OBSERVER = _OBSERVER, observer
    try:
        yield
    finally:
        _OBSERVER = before


def _is_stand_in(mask: Tensor | None, query: Tensor) -> bool:
    """Whether it is the mask of `model_inputs`. A real mask has a column for every key: of one row with one column
    there is one query."""
    return isinstance(mask, Tensor) and tuple(mask.shape) == (1, 1, 1, 1) and query.shape[-2] > 1


def _original(module: nn.Module, name: str):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name == "eager":  # each modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def reasons_against(model: nn.Module) -> list[str]:
    """Why a model cannot run shared-prefix rows; empty if it can.

    Read off its configuration and its modules, without running it.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    reasons = []
    if getattr(config, "is_encoder_decoder", False):
        reasons.append(f"{name} is an encoder-decoder")
    if not getattr(model, "_supports_attention_backend", False) and not getattr(model, "_supports_sdpa", False):
        reasons.append(f"{name} does not take its attention from transformers' AttentionInterface")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        reasons.append(f"{name} has layers of the kinds {', '.join(sorted(kinds))}, which mix tokens in another way")
    classes = sorted({type(m).__name__ for m in model.modules() if _mixes_tokens_otherwise(m)})
    if classes:
        reasons.append(f"{name} mixes tokens by {', '.join(classes)}")
    if any("alora" in type(variant).__name__.lower() for variant in _lora_variants(model)):
        reasons.append(f"{name} has an activated LoRA adapter, which starts at a token of each row")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        reasons.append(f"{name} attends to later tokens")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", "absolute") == "alibi":
        reasons.append(f"{name} derives positions from the order of the row")
    if model.config is not config and getattr(model.config, "vision_config", None) is not None:
        reasons.append(f"{name} may attend across image tokens")
    if not reasons and not _hands_keywords_through(model):
        reasons.append(f"{name} does not hand keyword arguments through to its attention")
    return reasons


def _mixes_tokens_otherwise(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    kinds = ("mamba", "rwkv", "deltanet", "linearattention", "lightning", "retention", "shortconv", "rglru")
    return isinstance(module, nn.Conv1d) or any(kind in name for kind in kinds)


def _lora_variants(model: nn.Module) -> list:
    """What PEFT's LoRA layers compute other than plain LoRA."""
    return [variant for m in model.modules() for variant in dict(getattr(m, "lora_variant", {})).values()]


def _hands_keywords_through(model: nn.Module) -> bool:
    backbone = getattr(model, "base_model", model)
    parameters = inspect.signature(type(backbone).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


# --- the mathematics -----------------------------------------------------------------------------------------------


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPrefixLayout,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Attention of a packed row: query (1, heads, S, D), key (1, kv heads, S, D), value (1, kv heads, S, Dv) ->
    (1, S, heads, Dv).

    window: a query sees keys less than `window` positions back. softcap: scores become cap tanh(score / cap). sinks:
    (heads,) one more logit in each softmax (gpt-oss). implementation: one of IMPLEMENTATIONS; None: by the rule of
    `choose_implementation`. Under autocast all three are cast to its dtype, and the result has it. Where they differ
    without it (rotary embeddings in fp32), value's dtype is taken.

    Raises `ValueError` for an implementation that cannot run, with every reason.
    """
    if query.shape[0] != 1 or query.shape[2] != layout.length:
        raise ValueError(f"the layout is of one row of {layout.length} tokens, the query of {tuple(query.shape)}")
    query, key, value = _in_one_dtype(query, key, value)
    if window is not None and window >= layout.longest[1]:
        window = None  # it hides nothing, and layers of both kinds share their masks
    scores = Scores(scaling, window, softcap, sinks)
    implementation = choose_implementation(query, scores, key, value, implementation)
    layout = layout.on(query.device)
    if implementation == "eager" and torch.compiler.is_compiling():
        return _eager_op(query, key, value, layout.host, *scores)
    attend = {"eager": _eager, "varlen": _varlen, "flex": _flex}.get(implementation)
    if attend is None:
        return flash.attend(implementation, query, key, value, layout, scores)
    return attend(query, key, value, layout, scores)


def _in_one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In autocast's dtype, by the rule that SDPA has there; else in value's, which is what the layers compute in.

    Rotary embeddings and norms of queries and keys may leave those in fp32; no kernel takes two dtypes.
    """
    device_type = query.device.type
    if device_type in _AUTOCAST and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    return query.to(value.dtype), key.to(value.dtype), value


def choose_implementation(
    query: Tensor,
    scores: Scores = Scores(),  # noqa: B008
    key: Tensor | None = None,
    value: Tensor | None = None,
    implementation: str | None = None,
) -> str:
    """On CUDA the first of IMPLEMENTATIONS that can run, elsewhere eager. A rule (flash.py), not a measurement.

    key, value: None: shaped like query. `implementation`, or else DPO_FAST_ATTENTION, is an explicit choice: it never
    falls back, and raises `ValueError` where it cannot run, with every reason.
    """
    explicit, source = implementation, "implementation"
    if explicit is None:
        explicit, source = os.environ.get("DPO_FAST_ATTENTION"), "DPO_FAST_ATTENTION"
    if explicit:
        if explicit not in IMPLEMENTATIONS:
            raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}, got {explicit!r}")
        reasons = reasons_against_implementation(explicit, query, scores, key, value)
        if reasons:
            raise ValueError(f"{source}={explicit!r} cannot run: {'; '.join(reasons)}")
        return explicit
    if _on_gpu(query):
        for candidate in IMPLEMENTATIONS:
            if not reasons_against_implementation(candidate, query, scores, key, value):
                return candidate
    return "eager"


def reasons_against_implementation(
    implementation: str,
    query: Tensor,
    scores: Scores = Scores(),  # noqa: B008
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> list[str]:
    """Every reason why `implementation` cannot run such tensors; an empty list means that it can. eager always can."""
    if implementation == "eager":
        return []
    key, value = query if key is None else key, query if value is None else value
    reasons = []
    if not query.dtype == key.dtype == value.dtype:
        dtypes = ", ".join(str(x.dtype)[6:] for x in (query, key, value))
        reasons.append(f"query, key and value must have one dtype, got {dtypes}")
    gpu = _capability(query.device) if _on_gpu(query) else None
    if implementation == "flex":
        return reasons + flex.reasons_against(query, value, scores, gpu)
    return reasons + flash.reasons_against(implementation, query, value, scores, gpu)


def _on_gpu(query: Tensor) -> bool:
    """Whether the kernels for CUDA are asked: an empty row starts none. A test answers for a GPU that is not there."""
    return not (query.device.type != "cuda" or query.numel() == 0)


def _capability(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; Hopper's where there is no GPU to ask, so that its code can be run without one."""
    if not torch.cuda.is_available():
        return 9, 0
    return torch.cuda.get_device_capability(device if device.type == "cuda" else None)


def _eager(query, key, value, layout, scores: Scores) -> Tensor:
    # One split, whose gradient is one cat: that of a slice of the row is a row of zeros
    own = layout.own
    queries, keys, values = (x.split(own, 2) for x in (query, key, value))

    def whole(x: tuple[Tensor, ...], sequence: int) -> Tensor:
        shared = [x[piece][:, :, :taken] for piece, taken in layout.paths[sequence]]
        return torch.cat([*shared, x[sequence]], 2) if shared else x[sequence]

    outputs = [_causal(queries[s], whole(keys, s), whole(values, s), layout, scores) for s in range(len(own)) if own[s]]
    if not outputs:
        return value.new_zeros((1, 0, query.shape[1], value.shape[-1]))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _causal(query, key, value, layout, scores: Scores) -> Tensor:
    """Causal attention whose last query sees the last key: (1, heads, n, D) over (1, kv heads, m, D), n <= m."""
    n, m = query.shape[2], key.shape[2]
    window = scores.window if scores.window is not None and scores.window < m else None
    if scores.softcap is None and scores.sinks is None:
        mask = None if n == m and window is None else _mask(layout, n, m, window, query.device)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scores.scaling, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    score = (query @ key.transpose(2, 3)) * scores.scaling
    if scores.softcap is not None:
        score = scores.softcap * torch.tanh(score / scores.softcap)
    score = score.masked_fill(~_mask(layout, n, m, window, query.device), torch.finfo(score.dtype).min)
    if scores.sinks is not None:
        score = torch.cat([score, scores.sinks.to(score.dtype).view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
    weights = torch.softmax(score, -1, dtype=torch.float32).to(query.dtype)
    return weights[..., :m] @ value


def _mask(layout, n: int, m: int, window: int | None, device) -> Tensor:
    """(n, m) bool, True where a query sees a key; kept for the other layers."""
    if torch.compiler.is_compiling():  # the compiler sees that they are one; in a checkpoint it breaks at what is kept
        return _new_mask(n, m, window, device)
    masks = layout.kept.masks
    if (n, m, window) not in masks:
        masks[n, m, window] = _new_mask(n, m, window, device)
    return masks[n, m, window]


def _new_mask(n: int, m: int, window: int | None, device) -> Tensor:
    mask = torch.ones((n, m), dtype=torch.bool, device=device).tril_(m - n)
    return mask if window is None else mask.triu_(m - n - window + 1)


# --- eager in a compiled graph: an operator, which takes the lengths of sequences as a tensor. Else each number of
# sequences would have a graph of its own, with calls for each sequence in it


@torch.library.custom_op("dpo_fast::eager_attention", mutates_args=())
def _eager_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    host: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    layout = _layout_of(host)
    return _eager(query, key, value, layout, Scores(scaling, window, softcap, sinks))


def _layout_of(host: Tensor) -> SharedPrefixLayout:
    """The layout with these lengths, on the host; its masks are this call's alone."""
    return dataclasses.replace(_made(*map(tuple, host.tolist())), kept=ForLayers())


_made = functools.lru_cache(maxsize=2)(SharedPrefixLayout.make)  # once for the layers of a step


@_eager_op.register_fake
def _(query, key, value, *_):
    return value.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


@torch.library.custom_op("dpo_fast::eager_attention_backward", mutates_args=())
def _eager_backward_op(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    host: Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> list[Tensor]:
    """Gradients of query, key, value and of sinks, if there are any. The forward is run once more: what it keeps for
    its backward cannot leave the operator."""
    layout = _layout_of(host)

    def attend(query, key, value, *sinks):
        return _eager(query, key, value, layout, Scores(scaling, window, softcap, *sinks))

    # Autograd proper is off inside an operator
    gradients = torch.func.vjp(attend, query, key, value, *([] if sinks is None else [sinks]))[1]
    return [x.contiguous() for x in gradients(d_out)]


@_eager_backward_op.register_fake
def _(d_out, query, key, value, host, scaling, window, softcap, sinks):
    return [x.new_empty(x.shape) for x in (query, key, value, *([] if sinks is None else [sinks]))]


def _save(ctx, inputs, output):
    query, key, value, host, ctx.scaling, ctx.window, ctx.softcap, sinks = inputs
    ctx.save_for_backward(query, key, value, host, sinks)


def _eager_backward(ctx, d_out):
    *tensors, sinks = ctx.saved_tensors
    found = _eager_backward_op(d_out, *tensors, ctx.scaling, ctx.window, ctx.softcap, sinks)
    return *found[:3], None, None, None, None, (found[3] if sinks is not None else None)


_eager_op.register_autograd(_eager_backward, setup_context=_save)


def _varlen(query, key, value, layout, scores: Scores) -> Tensor:
    return flash.attend("varlen", query, key, value, layout, scores)


def _flex(query, key, value, layout, scores: Scores) -> Tensor:
    return flex.attend(query, key, value, layout, scores, _block_mask(layout, scores.window))


def _block_mask(layout, window: int | None):
    """FlexAttention's; kept for the other layers, but by the compiler, as above."""
    if torch.compiler.is_compiling():
        return block_mask(layout, window)
    masks = layout.kept.block_masks
    if window not in masks:
        masks[window] = block_mask(layout, window)
    return masks[window]
