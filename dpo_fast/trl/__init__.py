"""TRL's `DPOTrainer` on shared-prefix rows: change one import, `from dpo_fast.trl import DPOTrainer`.

`DPOConfig`, loading, data, losses and metrics are TRL's own: its code runs as it is, and what changes is how its models
answer it. They pack the batch's pairs into one row, each prompt once (layout.py), run that, score the completions'
tokens without logits, and put the results where TRL expects them. What cannot be packed runs as padded rows, what
cannot be scored as TRL runs it, and a log line says why.

Where TRL can be answered differs with its age. What is there decides, by name and arguments, not the version:

    fused_head      1.15 and newer: TRL asks its models for log-probs, through `add_fused_lm_head`
    full_logits     0.29 to 1.14: `_compute_loss` reads logits of rows [chosen, rejected] with a completion_mask
    concatenated    0.18 to 0.28: `concatenated_forward` builds such rows from prompts and completions

`FastDPO` is a mixin for classes that are built on TRL's: `class Fast(FastDPO, TheirDPOTrainer)`; it comes first.

`padding_free=True` is accepted, and true of every packed batch. `DPOTrainer(..., layout="padded")`, or the environment
variable `DPO_FAST_LAYOUT=padded`, asks for padded rows; "shared_prefix" raises where "auto" would fall back.
`DPO_FAST_IMPL` chooses the head's implementation.
"""

import functools
import importlib

try:
    import trl
    from trl.trainer import dpo_trainer
except ImportError as error:
    raise ImportError("dpo_fast.trl needs TRL 0.18 or newer: pip install 'trl>=0.18'") from error

from .seams import fast_dpo_of

FastDPO = fast_dpo_of(dpo_trainer)

# Modules that are read when they are asked for: TRL keeps these trainers, and settings of two, in trl.experimental
_OTHERS = {"CPOTrainer": "cpo", "ORPOTrainer": "orpo", "KTOTrainer": "kto", "CPOConfig": "cpo", "ORPOConfig": "orpo"}


def __getattr__(name: str):
    """The other trainers of this package, and TRL's other names, which a script's one line imports beside them."""
    if name in _OTHERS:
        return getattr(importlib.import_module(f".{_OTHERS[name]}", __name__), name)
    if name.startswith("__") or not hasattr(trl, name):
        raise AttributeError(f"dpo_fast.trl has no {name}, and TRL {trl.__version__} has none, either")
    return getattr(trl, name)


class DPOTrainer(FastDPO, dpo_trainer.DPOTrainer):  # type: ignore[valid-type, misc]  # one of three classes
    """`trl.DPOTrainer`, faster: the same arguments, the same numbers, the same files.

    Beyond TRL's, adapters on the output head train (TRL refuses them) and `padding_free=True` is not ignored.
    layout: "auto" packs what can be packed, "padded" nothing; "shared_prefix" raises ValueError instead of falling
    back. None: DPO_FAST_LAYOUT, or "auto".

    Raises RuntimeError when TRL does not ask for the forward that is offered to it.
    """

    args: dpo_trainer.DPOConfig

    @functools.wraps(dpo_trainer.DPOTrainer.__init__)  # type: ignore[misc]  # mypy knows no decorated constructor
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
