"""TRL's preference trainers beside DPOTrainer: where this TRL keeps them, and what their pairs look like as rows."""

import importlib
import sys
from importlib.util import find_spec
from typing import Any

import trl
from torch import Tensor

from ..rows import IGNORED


def trainer_with(name: str, method: str) -> Any:
    """The class of TRL's trainer `name` that defines `method`, which ours replaces. ImportError: this TRL has none.

    It stands at TRL's top level or in trl.experimental; a class that only says that it has moved inherits from it.
    """
    known = getattr(trl, name, None)
    folder = f"trl.experimental.{name.removesuffix('Trainer').lower()}"
    if known is None and find_spec("trl.experimental") and find_spec(folder):
        known = getattr(importlib.import_module(folder), name, None)
    found = next((kind for kind in getattr(known, "__mro__", ()) if method in vars(kind)), None)
    if found is None:
        raise no_seam(name, f"{method} of TRL's {name}")
    return found


def config_of(trainer: type) -> Any:
    """The class of its settings, which stands in its module."""
    return getattr(sys.modules[trainer.__module__], trainer.__name__.replace("Trainer", "Config"))


def no_seam(name: str, looked_for: str) -> ImportError:
    return ImportError(f"dpo_fast.trl.{name} replaces {looked_for}, which TRL {trl.__version__} does not have")


def paired_rows(trainer: Any, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's batch of pairs -> input_ids, attention_mask and labels (2P, T), [chosen, rejected]."""
    rows = trainer.concatenated_inputs(batch, device=trainer.accelerator.device)
    ids, mask, labels = (rows[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    return ids, mask, labels.masked_fill((labels == ignored_by(trainer)) | (mask == 0), IGNORED)


def ignored_by(trainer: Any) -> int:
    """The label of what is not scored; before TRL 0.28 it can be chosen."""
    return getattr(trainer, "label_pad_token_id", IGNORED)


def mean_logits(values: Tensor, scored: Tensor) -> list[Tensor]:
    """values, scored (2P, T - 1) -> the means, (), over the scored tokens of chosen and of rejected rows."""
    halves = zip((values * scored).chunk(2), scored.chunk(2), strict=True)
    return [total.sum() / count.sum() for total, count in halves]
