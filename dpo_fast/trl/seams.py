"""Which of the seams a TRL has. Nothing here depends on its version number, which is only named in messages."""

import importlib
import inspect
from types import ModuleType
from typing import Any

import trl

# A module beside this one; where it meets TRL's code, a function of TRL's module or a method of its trainer; with which
# arguments; what else TRL's module has there. Newer TRLs keep names of older ones, so the first counts
_SEAMS = (
    ("fused_head", "add_fused_lm_head", ("model", "outputs"), ()),
    ("full_logits", "DPOTrainer._compute_loss", ("model", "inputs", "return_outputs"), ("selective_log_softmax",)),
    (
        "concatenated",
        "DPOTrainer.concatenated_forward",
        ("model", "batch", "is_ref_model"),
        ("selective_log_softmax",),
    ),
)


def fast_dpo_of(dpo_trainer: ModuleType) -> type:
    """The mixin for `dpo_trainer.DPOTrainer`; ImportError, in one sentence, for a TRL that has none of the seams."""
    if not hasattr(dpo_trainer, "DPOTrainer"):
        raise mismatch("has no trl.trainer.dpo_trainer.DPOTrainer")
    for module, name, arguments, besides in _SEAMS:
        seam = _get(dpo_trainer, name)
        if seam is None:
            continue
        lacking = set(arguments) - set(inspect.signature(seam).parameters)
        if lacking:
            raise mismatch(f"has a {name} without {', '.join(sorted(lacking))}")
        if not all(hasattr(dpo_trainer, needed) for needed in besides):
            raise mismatch(f"has a {name} that does not use {', '.join(besides)}")
        found = importlib.import_module(f"{__package__}.{module}")
        return found.FastDPO
    raise mismatch(f"has, in trl.trainer.dpo_trainer, none of {', '.join(name for _, name, *_ in _SEAMS)}")


def _get(module: ModuleType, name: str):
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def mismatch(what: str) -> ImportError:
    return ImportError(
        f"dpo_fast.trl is tested with TRL 0.18 to 1.16; TRL {trl.__version__} is installed, which {what}"
    )
