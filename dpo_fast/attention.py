"""Stage 2: attention over a shared-prefix row (layout.py), for stock transformers models.

`enable(model)` switches a model to an attention implementation registered with transformers' `AttentionInterface`. It
is named after the one that the model came with, "dpo_fast_over_sdpa" for instance: without a layout among its keyword
arguments it is that implementation, mask included, so `generate` and plain calls are unchanged. A layout travels as the
keyword argument `pair_layout` of the model's forward, through the layers, to the attention function.

    eager     CPU and anything else: two calls a pair, prefix + chosen (plainly causal) and rejected against its prefix
              and itself; no mask over the row
    varlen    CUDA: one variable-length flash attention call; the rejected branch's keys are its prefix's once more
    flex      CUDA: FlexAttention with a block mask, where a soft-cap or sinks rule flash attention out
"""

import functools
import inspect
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layout import SharedPrefixLayout

PREFIX = "dpo_fast_over_"
IMPLEMENTATIONS = ("eager", "varlen", "flex")


# --- on transformers' side -----------------------------------------------------------------------------------------


def enable(model: nn.Module) -> None:
    """Let `model` (a transformers model) take `pair_layout`; calls without one are unchanged. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    for config in _configs(model):
        original = config._attn_implementation
        if original is None or original.startswith(PREFIX):
            continue
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

    A mask of four dimensions is taken as prepared and handed through: that is how no mask over the row is made.
    """
    return {"attention_mask": torch.empty((1, 1, 1, 1), device=device), "pair_layout": layout}


def _attention(module, query, key, value, attention_mask, *args, original, pair_layout=None, **kwargs):
    """The registered function: query (B, heads, S, D), key and value (B, kv heads, S, D) -> (B, S, heads, D), None."""
    if pair_layout is None:
        return _original(module, original)(module, query, key, value, attention_mask, *args, **kwargs)
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


def has_dropout(model: nn.Module) -> bool:
    """Whether the model drops out attention weights in training, which no implementation here does."""
    rates = [getattr(m, name, 0.0) for m in model.modules() for name in ("attention_dropout", "attn_dropout")]
    return any((rate.p if isinstance(rate, nn.Dropout) else rate) for rate in rates if rate is not None)


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
    """Attention of a packed row: query (1, heads, S, D), key, value (1, kv heads, S, D) -> (1, S, heads, D).

    window: a query sees keys less than `window` positions back. softcap: scores become cap tanh(score / cap). sinks:
    (heads,) one more logit in each softmax (gpt-oss). implementation: one of IMPLEMENTATIONS; None: by the rule of
    `choose_implementation`; DPO_FAST_ATTENTION overrides it.
    """
    if query.shape[0] != 1 or query.shape[2] != layout.length:
        raise ValueError(f"the layout is of one row of {layout.length} tokens, the query of {tuple(query.shape)}")
    implementation = implementation or choose_implementation(query, softcap, sinks)
    attend = {"eager": _eager, "varlen": _varlen, "flex": _flex}[implementation]
    return attend(query, key, value, layout.on(query.device), scaling, window, softcap, sinks)


def choose_implementation(query: Tensor, softcap: float | None, sinks: Tensor | None) -> str:
    """varlen on CUDA in 16 bits, flex there otherwise, eager elsewhere and with sinks. A rule, not a measurement."""
    forced = os.environ.get("DPO_FAST_ATTENTION")
    if forced:
        if forced not in IMPLEMENTATIONS:
            raise ValueError(f"DPO_FAST_ATTENTION must be one of {', '.join(IMPLEMENTATIONS)}, got {forced!r}")
        return forced
    if query.device.type != "cuda" or sinks is not None:
        return "eager"
    half = query.dtype in (torch.float16, torch.bfloat16)
    return "varlen" if softcap is None and half and _varlen_attn() is not None else "flex"


def _eager(query, key, value, layout, scaling, window, softcap, sinks) -> Tensor:
    # Splits, whose gradient is one cat: that of a slice is a row of zeros, and a row has three slices or more a pair
    whole = [sum(pair) for pair in layout.pairs]
    outputs = []
    for (p, c, r), *row in zip(layout.pairs, *(x.split(whole, 2) for x in (query, key, value)), strict=True):
        (query_run, query_branch), (keys, key_branch), (values, value_branch) = (x.split([p + c, r], 2) for x in row)
        if p:
            key_branch = torch.cat([keys[:, :, :p], key_branch], 2)
            value_branch = torch.cat([values[:, :, :p], value_branch], 2)
        for q, k, v in ((query_run, keys, values), (query_branch, key_branch, value_branch)):
            if q.shape[2]:
                outputs.append(_causal(q, k, v, layout, scaling, window, softcap, sinks))
    return torch.cat(outputs, 2).transpose(1, 2).contiguous()


def _causal(query, key, value, layout, scaling, window, softcap, sinks) -> Tensor:
    """Causal attention whose last query sees the last key: (1, heads, n, D) over (1, kv heads, m, D), n <= m."""
    n, m = query.shape[2], key.shape[2]
    window = window if window is not None and window < m else None
    if softcap is None and sinks is None:
        mask = None if n == m and window is None else _mask(layout, n, m, window, query.device)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (key, value))
    scores = (query @ key.transpose(2, 3)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_mask(layout, n, m, window, query.device), torch.finfo(scores.dtype).min)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(1, -1, n, 1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return weights[..., :m] @ value


def _mask(layout, n: int, m: int, window: int | None, device) -> Tensor:
    """(n, m) bool, True where a query sees a key; kept for the other layers."""
    if (n, m, window) not in layout.cache:
        mask = torch.ones((n, m), dtype=torch.bool, device=device).tril_(m - n)
        layout.cache[n, m, window] = mask if window is None else mask.triu_(m - n - window + 1)
    return layout.cache[n, m, window]


@functools.cache
def _varlen_attn():
    """torch's variable-length flash attention; None where it does not take windows and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "scale", "enable_gqa"} <= set(known) else None


def _varlen(query, key, value, layout, scaling, window, softcap, sinks) -> Tensor:
    """Flash attention aligns causality bottom-right, which is what a branch behind its prefix needs."""
    if softcap is not None or sinks is not None:
        raise ValueError("variable-length attention takes neither a soft-cap nor sinks; use 'flex' or 'eager'")
    attend = _varlen_attn()
    if attend is None:
        raise ValueError("this torch has no variable-length attention with windows and grouped queries")
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # (S, heads, D)
    keys, values = (x.index_select(0, layout.key_index) for x in rows[1:])
    longest_query, longest_key = layout.longest
    out = attend(
        rows[0],
        keys,
        values,
        layout.query_ends,
        layout.key_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.unsqueeze(0)


def _flex(query, key, value, layout, scaling, window, softcap, sinks) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if sinks is not None:
        raise ValueError("FlexAttention has no sinks here; use 'eager'")

    def cap(score, *_):
        return softcap * torch.tanh(score / softcap)

    attend = _compiled_flex() if query.device.type == "cuda" else flex_attention
    out = attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=_block_mask(layout, window, query.device),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _block_mask(layout, window: int | None, device):
    from torch.nn.attention.flex_attention import create_block_mask

    if ("block", window) not in layout.cache:
        pair_ids, branches, positions = layout.pair_ids, layout.branches, layout.positions

        def sees(_batch, _head, q, k):
            seen = (pair_ids[q] == pair_ids[k]) & (k <= q) & ((branches[k] == 0) | (branches[k] == branches[q]))
            return seen if window is None else seen & (positions[q] - positions[k] < window)

        layout.cache["block", window] = create_block_mask(sees, None, None, layout.length, layout.length, device=device)
    return layout.cache["block", window]
