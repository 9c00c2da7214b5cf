"""For loops that exist: the log-probs of the completions in the rows that a trainer holds already.

completion_logps   a model and rows: each prompt once, no padding, no logits (docs/swap.md)
get_batch_logps    logits of any model, by the name and arguments that the field has used since the first repository
"""

import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .batch import PreferenceBatch
from .copies import base_model_of
from .forward import OwnLogits, TokenScores, attach, check_adapter, detach, is_attached
from .functional import sequence_scores
from .layout import separate_rows
from .ops.checks import FLOATS, INTEGERS, check_flag, check_ignore_index, check_labels, check_tensor, is_number
from .ops.dispatch import readable
from .ops.logits import logits_token_logps, logits_token_stats
from .ops.stats import check_outputs
from .rows import IGNORED, packed_rows, padded_rows, spread, why_no_sequences
from .wrappers import leading_through, path_to_lm

logger = logging.getLogger("dpo_fast")

_MASKS = (torch.bool, torch.uint8, *INTEGERS, *FLOATS)
# Inputs that say where tokens lie: of rows that are packed already, cut for several devices, or begun before
_SP = "sequence parallelism"
# What trainers pass along, and what has no meaning where no logits are made
_FLAGS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states", "logits_to_keep")
_ELSEWHERE = (
    "position_ids",
    "cu_seq_lens_q",
    "cu_seqlens",
    "seq_idx",
    "past_key_values",
    "inputs_embeds",
    "shift_labels",
)


@dataclass(frozen=True)
class CompletionLogps:
    """Log-probs in nats of the completions of B rows. `logps`, `mean_logps` and `token_logps` have gradients."""

    logps: Tensor  # (B,) fp32: sums over the labelled tokens, weighted if ld_alpha was given
    lengths: Tensor  # (B,) int64: labelled tokens
    token_logps: Tensor  # (B, T - 1) fp32: entry t is of labels[:, t + 1]; 0 where unlabelled, as in what follows
    entropy: Tensor | None = None  # (B, T - 1) fp32, in nats; these are None unless asked for, see `TokenStats`
    mean_logits: Tensor | None = None  # (B, T - 1) fp32
    is_top1: Tensor | None = None  # (B, T - 1) bool
    log_sum_sq_probs: Tensor | None = None  # (B, T - 1) fp32
    aux_loss: Tensor | None = None  # () balancing loss, where the model's config asks for output_router_logits

    @property
    def mean_logps(self) -> Tensor:
        """(B,) `logps` per labelled token; NaN for a row without one."""
        return self.logps / self.lengths


def completion_logps(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    outputs: Sequence[str] = (),
    ld_alpha: float | None = None,
    pairs: bool = True,
    **model_inputs,
) -> CompletionLogps:
    """Log-probs of the labelled tokens of each row under `model`, with gradients for its weights.

    Each prompt runs once, padding never, and logits are not built; what `model` cannot run in one row runs as padded
    rows, and a line says why.

    model: a Hugging Face causal LM or a PEFT model, also inside DDP, FSDP, DeepSpeed, torch.compile or a module of a
      framework's own. The first call attaches it (`dpo_fast.attach`); `dpo_fast.detach` undoes that.
    input_ids (B, T) int64: padding before or after each sequence, or none. attention_mask (B, T): one run of ones in
      each row; None: no padding. labels (B, T) int64: the token where it is scored, -100 elsewhere; not shifted. The
      first token of a sequence has nothing to predict it and is not scored.
    outputs: statistics of the logits to return besides, names from STATS.
    ld_alpha: LD-DPO's weight of the tokens beyond the shorter completion of a pair, in [0, 1] (arXiv:2409.06411).
    pairs: rows i and B/2 + i belong together, as in [chosen, rejected], and share what they begin with. False: any
      rows; equal beginnings are found and run once.
    model_inputs: further inputs of the model, such as pixel_values. Such rows run as they come.

    Raises TypeError and ValueError, which name the argument, for what is not as above: a row without a labelled token,
    an odd B with pairs, a mask with holes, an encoder-decoder, a model without an output head.
    """
    return score_rows(
        model,
        input_ids,
        attention_mask,
        labels,
        outputs=outputs,
        ld_alpha=ld_alpha,
        pairs=pairs,
        empty_rows=False,
        **model_inputs,
    )


def score_rows(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    outputs: Sequence[str] = (),
    ld_alpha: float | None = None,
    pairs: bool = True,
    empty_rows: bool = True,
    **model_inputs,
) -> CompletionLogps:
    """`completion_logps`. empty_rows: rows without a labelled token are taken, as truncation may leave them."""
    op = "completion_logps"
    outputs = check_outputs(op, outputs)
    _check_rows(op, input_ids, attention_mask, labels, pairs, ld_alpha)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    path = path_to_lm(op, model)
    inputs = {name: value for name, value in model_inputs.items() if value is not None and name not in _FLAGS}
    routed = inputs.pop("output_router_logits", None)
    if elsewhere := [name for name in _ELSEWHERE if name in inputs]:
        raise TypeError(
            f"{op} takes no {', '.join(elsewhere)}: rows that are packed already, or cut as for {_SP}, cannot be "
            "scored from here; pass whole rows, or score logits by get_batch_logps"
        )
    if inputs:
        _say_once(f"padded rows, not shared prefixes, because the batch has {', '.join(sorted(inputs))}")
        everything = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        batch: PreferenceBatch | str = why_no_sequences(attention_mask, labels) or padded_rows(everything, labels)
    else:
        batch = packed_rows(input_ids, attention_mask, labels, pairs)
    if isinstance(batch, str):
        raise ValueError(f"{op}: {batch}")
    counts = batch.get("host_lengths") or (batch.lengths.tolist() if not empty_rows else ())
    if not empty_rows and 0 in counts:
        raise ValueError(
            f"{op}: labels have no scored token in row {counts.index(0)} (its first token has nothing to predict it)"
        )
    _check_targets(op, path[-1], batch, labels)
    tokens = _token_scores(path, batch, outputs, routed)
    scores = sequence_scores(tokens, batch, ld_alpha)
    return CompletionLogps(
        logps=scores.logps,
        lengths=batch.lengths,
        token_logps=spread(tokens.logps, batch),
        aux_loss=tokens.aux_loss,
        **{name: spread(getattr(tokens, name), batch) for name in outputs},
    )


def _check_rows(op: str, input_ids, attention_mask, labels, pairs, ld_alpha) -> None:
    if isinstance(input_ids, DTensor):
        raise TypeError(f"{op}: input_ids are spread over devices (a DTensor); pass whole rows: {op} is not for {_SP}")
    check_tensor(op, "input_ids", input_ids, ("B", "T"), INTEGERS)
    shape, device = tuple(input_ids.shape), input_ids.device
    if attention_mask is not None:
        check_tensor(op, "attention_mask", attention_mask, shape, _MASKS, device)
    if isinstance(labels, Tensor) and labels.ndim == 3:
        raise ValueError(f"{op}: labels must be token ids, {shape}, got {tuple(labels.shape)}: these may be logits")
    check_tensor(op, "labels", labels, shape, INTEGERS, device)
    if not input_ids.numel():
        raise ValueError(f"{op}: input_ids must have at least one row and one column, got {shape}")
    if check_flag(op, "pairs", pairs) and shape[0] % 2:
        raise ValueError(
            f"{op}: pairs=True takes an even number of rows of input_ids, [chosen, rejected], got {shape[0]}; "
            "pass pairs=False for rows that are no pairs"
        )
    if ld_alpha is not None and not (is_number(ld_alpha) and 0 <= ld_alpha <= 1):
        raise ValueError(f"{op}: ld_alpha must be in [0, 1] or None, got {ld_alpha!r}")
    if ld_alpha is not None and not pairs:
        raise ValueError(f"{op}: ld_alpha weighs a completion by the other one's length: it needs pairs=True")


def _check_targets(op: str, lm: nn.Module, batch: PreferenceBatch, labels: Tensor) -> None:
    """The head would name an index of the packed row."""
    head: Any = base_model_of(lm).get_output_embeddings()  # type: ignore[operator]
    if readable(labels) and hasattr(head, "out_features"):
        scored = torch.zeros_like(labels, dtype=torch.bool)
        scored[:, 1:] = spread(torch.ones_like(batch.places, dtype=torch.bool), batch)
        check_labels(op, labels.masked_fill(~scored, IGNORED), head.out_features, IGNORED)


_OWN_LOGITS: "weakref.WeakKeyDictionary[nn.Module, str]" = weakref.WeakKeyDictionary()  # and why


def _token_scores(
    path: list[nn.Module], batch: PreferenceBatch, outputs: tuple[str, ...], routed: bool | None
) -> TokenScores:
    model, lm = path[0], path[-1]
    base = base_model_of(lm)
    reason = _OWN_LOGITS.get(base) or _why_not_attached(lm)
    if reason is None:
        if routed is None:
            config: Any = base.config
            routed = getattr(config.get_text_config(), "output_router_logits", False)
        try:
            with leading_through(path):
                return model(batch, outputs=outputs, **({"aux_loss": True} if routed else {}))
        except OwnLogits as error:  # the head of a model that is sharded is checked in its first call
            detach(lm)
            reason = str(error)
            _OWN_LOGITS[base] = reason
    _say_once(f"padded rows and {type(base).__name__}'s own logits, because {reason}")
    return _of_own_logits(path, batch, outputs, routed)


def _why_not_attached(lm: nn.Module) -> str | None:
    """None if it is attached, now at the latest."""
    try:
        check_adapter(lm)  # which may come and go
    except OwnLogits as reason:
        return str(reason)
    base = base_model_of(lm)
    try:
        if not is_attached(base):
            attach(lm)
    except OwnLogits as reason:
        _OWN_LOGITS[base] = str(reason)
        return str(reason)
    return None


def _of_own_logits(
    path: list[nn.Module], batch: PreferenceBatch, outputs: tuple[str, ...], routed: bool | None
) -> TokenScores:
    """As the model's own forward has them; those of virtual tokens, which come before a row's, are left out."""
    if batch.layout is not None:
        batch = separate_rows(batch)
    ids = batch.input_ids
    labels = batch.targets.new_full((ids.numel(),), IGNORED)
    labels = labels.index_copy(0, batch.predictors, batch.targets)  # shifted already
    inputs = {"input_ids": ids, "attention_mask": batch.attention_mask, **batch.get("model_inputs", {})}
    inputs |= {} if routed is None else {"output_router_logits": routed}
    with leading_through(path):
        out: Any = path[0](**inputs, use_cache=False)
    logits = out.logits[:, -ids.shape[1] :]
    stats = logits_token_stats(logits, labels.view(ids.shape).to(logits.device), outputs=outputs)
    places = batch.predictors

    def of_tokens(name: str) -> Tensor:
        return getattr(stats, name).flatten().to(places.device)[places]

    return TokenScores(aux_loss=getattr(out, "aux_loss", None), **{k: of_tokens(k) for k in ("logps", *outputs)})


@functools.cache
def _say_once(line: str) -> None:
    logger.warning("completion_logps: %s", line)


@overload
def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = ...,
    label_pad_token_id: int = ...,
    *,
    return_lengths: Literal[False] = ...,
    inplace_backward: bool = ...,
) -> Tensor: ...


@overload
def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = ...,
    label_pad_token_id: int = ...,
    *,
    return_lengths: Literal[True],
    inplace_backward: bool = ...,
) -> tuple[Tensor, Tensor]: ...


def get_batch_logps(
    logits: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    label_pad_token_id: int = -100,
    *,
    return_lengths: bool = False,
    inplace_backward: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of the labels of each row under softmax(logits), with gradients for `logits`, in one pass over them.

    The name and the arguments of the original DPO repository's function: logits (B, T, V) of any model, 16 bits or
    more, of which entry t predicts labels[:, t + 1] (they are shifted here); labels (B, T) integers,
    `label_pad_token_id` where nothing is scored. Neither a softmax nor a shifted copy is stored.

    Returns (B,) fp32 (fp64 for fp64 logits): sums in nats, 0 for a row without labels; or with `average_log_prob` means
    per labelled token, where such a row raises ValueError on the CPU and is NaN elsewhere. With `return_lengths` also
    the numbers of labelled tokens, (B,) int64. inplace_backward: as in `logits_token_logps`, for loops that read their
    logits no more after the backward.

    Raises ValueError for shapes that do not fit, TypeError for dtypes.
    """
    op = "get_batch_logps"
    check_tensor(op, "logits", logits, ("B", "T", "V"), FLOATS)
    check_tensor(op, "labels", labels, tuple(logits.shape[:2]), INTEGERS, logits.device)
    if not labels.shape[1]:
        raise ValueError(f"{op}: labels must have at least one column, got {tuple(labels.shape)}")
    label_pad_token_id = check_ignore_index(op, label_pad_token_id, "label_pad_token_id")
    average = check_flag(op, "average_log_prob", average_log_prob)
    return_lengths = check_flag(op, "return_lengths", return_lengths)
    if readable(labels):  # below, places are those of shifted labels
        first = torch.arange(labels.shape[1]) == 0
        check_labels(op, labels.masked_fill(first, label_pad_token_id), logits.shape[2], label_pad_token_id)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=label_pad_token_id)
    lengths = (shifted != label_pad_token_id).sum(1)
    if average and readable(lengths) and not lengths.all():
        raise ValueError(f"{op}: labels have no scored token in row {int((lengths == 0).int().argmax())}, so no mean")
    token_logps = logits_token_logps(
        logits, shifted, ignore_index=label_pad_token_id, inplace_backward=inplace_backward
    )
    logps = token_logps.sum(1, dtype=torch.float64).to(token_logps.dtype)
    logps = logps / lengths if average else logps
    return (logps, lengths) if return_lengths else logps
