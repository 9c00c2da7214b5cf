"""What a report says of a trainer: its reference, layout, plan and data, each with the reason."""

import statistics
from collections.abc import Callable, Mapping

import datasets
import torch

from dpo_fast import reference
from dpo_fast.ops.dispatch import IMPLS, choose_impl, plan_device, reasons_against
from dpo_fast.ops.plan import plan_head
from dpo_fast.ops.roofline import describe_device

from . import reference_columns
from .data import TOKEN_COLUMNS, Truncation, row_tokens

_LOOKED_AT = 1000  # pairs whose lengths are counted


def of_reference(given: object | None, name: str) -> tuple[str, str]:
    """(what it is, why) of a FastDPOTrainer's reference. name: of the model that was given, "" for none."""
    if given is None:
        return "none", "no loss needs one"
    if name:
        return name, "it was given"
    return {
        reference.FrozenModel: ("a frozen copy of the model as it was before training", "no ref_model was given"),
        reference.InitialPolicy: ("the model with the weights from before training", "no ref_model was given"),
        reference.AdapterOff: ("the model without its adapter", "a new adapter trains, no ref_model was given"),
        reference.FrozenAdapter: ("the model with a copy of its adapter", "a sharded model, no ref_model was given"),
        reference_columns.DataColumns: (
            "log-probs that lie with the data",
            "they came with it, or precompute_ref_log_probs",
        ),
    }.get(type(given), (type(given).__name__, ""))


def of_head(model: torch.nn.Module, objective, args, scored_tokens: float) -> list[tuple[str, str, str]]:
    """Implementation and plan of the head, for batches of that many scored tokens."""
    device, head = args.device, model.get_output_embeddings()
    impl = choose_impl("linear_preference_loss", args.impl, device)
    against = [f"{name}: {'; '.join(reasons)}" for name in IMPLS if (reasons := reasons_against(name, device))]
    asked = f"impl={args.impl!r} asks for it" if args.impl != "auto" else "the first that can run here"
    rows = [("implementation", impl, asked + (f" (not {' and not '.join(against)})" if against else ""))]
    weight = getattr(head, "weight", None)
    if impl != "reference" and isinstance(weight, torch.Tensor) and weight.ndim == 2 and scored_tokens >= 1:
        vocabulary, width = weight.shape
        plan = plan_head(
            round(scored_tokens),
            width,
            vocabulary,
            torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else weight.dtype,
            head_grad=weight.requires_grad,
            separable=not objective.couples_pairs,
            tile_mib=args.tile_mib,
            device_type=plan_device(impl, device),
            device=describe_device(device),
        )
        size = f"{round(scored_tokens):,} scored tokens, width {width:,}, vocabulary {vocabulary:,}"
        rows.append(("head, for a mean batch", plan.describe().rpartition(" (")[0], f"{plan.reason} ({size})"))
    return rows


def of_lengths(dataset, cut: Truncation, limits: str) -> dict | None:
    """Lengths in tokens of the first pairs of a prepared dataset; None for a stream and for other columns."""
    if not isinstance(dataset, datasets.Dataset) or not set(TOKEN_COLUMNS) <= set(dataset.column_names):
        return None
    rows = dataset.select(range(min(len(dataset), _LOOKED_AT))).with_format(None)
    return count_lengths(list(rows), len(dataset), cut, limits)


def count_lengths(rows: list[Mapping], pairs: int, cut: Callable, limits: str) -> dict | None:
    if not rows:
        return None
    lengths = {name.removesuffix("_ids"): [len(row[name]) for row in rows] for name in TOKEN_COLUMNS}
    truncated, scored, tokens = 0, 0, 0
    for row in rows:
        pair = cut(row)
        kept = len(pair.chosen_prompt) + len(pair.chosen), len(pair.rejected_prompt) + len(pair.rejected)
        prompt = len(row["prompt_ids"])
        truncated += kept != (prompt + len(row["chosen_ids"]), prompt + len(row["rejected_ids"]))
        scored += len(pair.chosen) + len(pair.rejected)
        tokens += row_tokens(pair)
    return {
        "pairs": pairs,
        "looked_at": len(rows),
        "parts": {
            name: {"mean": statistics.fmean(found), "median": statistics.median(found), "longest": max(found)}
            for name, found in lengths.items()
        },
        "cut": truncated,
        "limits": limits,
        "scored": min(1.0, scored / tokens),
        "scored_per_pair": scored / len(rows),
    }


def limits_of(args) -> str:
    names = ("max_length", "max_prompt_length", "max_completion_length")
    given = [f"{name} {getattr(args, name)}" for name in names if getattr(args, name, None) is not None]
    return ", ".join(given) or "there are none"
