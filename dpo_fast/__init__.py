"""dpo_fast: Direct Preference Optimization, exact and fast.

    tokenised pairs
      1  batch.py       -> PreferenceBatch: rows for the model, one-dimensional scored tokens; layout.py packs them,
                           each prompt once
      2  attention.py      attention over a shared-prefix row; block_mask.py: what FlexAttention needs for it
      3  forward.py     -> hidden states at the scored positions -> token log-probs, inside model.forward
      4  logps.py       -> sequence log-probs, PairLogps
      5  losses.py      -> loss per pair; objective.py combines and checks
      6  metrics.py     -> metrics as device scalars

`functional.py` composes 2 to 6 and is the file to read first. Importing this package needs torch alone: triton,
transformers, TRL and peft are imported by the names that use them.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names, for type checkers and editors
    from .batch import PreferenceBatch as PreferenceBatch
    from .completion import CompletionLogps as CompletionLogps
    from .completion import completion_logps as completion_logps
    from .completion import get_batch_logps as get_batch_logps
    from .forward import attach as attach
    from .forward import detach as detach
    from .logps import PairLogps as PairLogps
    from .losses import LOSSES as LOSSES
    from .objective import Objective as Objective
    from .objective import preference_loss as preference_loss
    from .ops.linear import linear_token_logps as linear_token_logps
    from .ops.linear import linear_token_stats as linear_token_stats
    from .ops.logits import logits_token_logps as logits_token_logps
    from .ops.logits import logits_token_stats as logits_token_stats
    from .ops.sequence import sequence_logps as sequence_logps
    from .ops.stats import TokenStats as TokenStats
    from .preference import PreferenceOutput as PreferenceOutput
    from .preference import linear_preference_loss as linear_preference_loss
    from .training.config import FastDPOConfig as FastDPOConfig
    from .training.trainer import FastDPOTrainer as FastDPOTrainer

__version__ = "0.1.0"

# public name -> the module that defines it; imported on first use, so that `import dpo_fast` stays light
_PUBLIC = {
    "logits_token_logps": "dpo_fast.ops.logits",
    "logits_token_stats": "dpo_fast.ops.logits",
    "linear_token_logps": "dpo_fast.ops.linear",
    "linear_token_stats": "dpo_fast.ops.linear",
    "linear_preference_loss": "dpo_fast.preference",
    "PreferenceOutput": "dpo_fast.preference",
    "TokenStats": "dpo_fast.ops.stats",
    "sequence_logps": "dpo_fast.ops.sequence",
    "PairLogps": "dpo_fast.logps",
    "preference_loss": "dpo_fast.objective",
    "Objective": "dpo_fast.objective",
    "LOSSES": "dpo_fast.losses",
    "PreferenceBatch": "dpo_fast.batch",
    "attach": "dpo_fast.forward",
    "detach": "dpo_fast.forward",
    "completion_logps": "dpo_fast.completion",
    "CompletionLogps": "dpo_fast.completion",
    "get_batch_logps": "dpo_fast.completion",
    "FastDPOTrainer": "dpo_fast.training.trainer",
    "FastDPOConfig": "dpo_fast.training.config",
}

__all__ = [*sorted(_PUBLIC), "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dpo_fast' has no attribute {name!r}; public names: {', '.join(sorted(_PUBLIC))}")
    try:
        module = importlib.import_module(_PUBLIC[name])
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "dpo_fast"):
            raise
        raise ImportError(f"dpo_fast.{name} needs {package}, which is not installed: pip install {package}") from error
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(_PUBLIC))
