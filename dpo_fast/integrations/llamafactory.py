"""LLaMA-Factory's DPO and KTO trainers on packed rows: another command, or a call before its own.

    python -m dpo_fast.integrations.llamafactory train dpo.yaml      # llamafactory-cli train dpo.yaml

    from dpo_fast.integrations import llamafactory
    llamafactory.swap()                                              # before run_exp, or a trainer of one's own

Each trainer scores a batch in one method, from logits of padded rows. Ours scores the same rows by `completion_logps`;
losses, metrics, data and checkpoints stay LLaMA-Factory's. Its `logits/chosen` and `logits/rejected`, means over
padding and prompts, are means over completions, as TRL's are. Images and audio go the old way, and a line says so.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..completion import CompletionLogps, score_rows
from . import Swap, say_once

_ROWS = {"input_ids", "attention_mask", "labels"}
_OTHER_TRAINERS = ("USE_MCA", "USE_RAY", "USE_V1")  # Megatron's, in processes that Ray starts, a rewrite in progress
_MEANS = ("ipo", "orpo", "simpo")  # losses of log-probs per token


def swap() -> Swap:
    """Let LLaMA-Factory's trainers score packed rows until `undo()`, or until the end of a `with` block.

    Raises ImportError where its trainers are not those that this knows, ValueError where its environment variables ask
    for trainers that are not swapped.
    """
    from llamafactory.extras.misc import is_env_enabled
    from llamafactory.train.dpo.trainer import CustomDPOTrainer
    from llamafactory.train.kto.trainer import CustomKTOTrainer

    if asked_for := [name for name in _OTHER_TRAINERS if is_env_enabled(name)]:
        raise ValueError(f"{', '.join(asked_for)}: LLaMA-Factory then trains with code that is not swapped; unset it")
    with Swap() as on:
        on.replace(CustomDPOTrainer, "concatenated_forward", _of_pairs)
        on.replace(CustomKTOTrainer, "forward", _of_rows)
        return on.pop_all()


def _of_pairs(theirs: Callable) -> Callable:
    def concatenated_forward(self, model, batch, is_ref_model=False):
        if not _is_text(batch, _ROWS):
            return theirs(self, model, batch, is_ref_model)
        rows = {name: batch[name] for name in _ROWS}
        scores = _scores(model, rows, ld_alpha=None if is_ref_model else self.ld_alpha)
        logps = scores.mean_logps if self.loss_type in _MEANS else scores.logps
        logits = zip(_logits(scores).chunk(2), scores.lengths.chunk(2), strict=True)
        found: dict[str, Any] = {"chosen_logps_avg": scores.mean_logps.chunk(2)[0]}
        found["chosen_logps"], found["rejected_logps"] = logps.chunk(2)
        # (P,) whose mean is that over tokens
        found["chosen_logits"], found["rejected_logits"] = (sums / lengths.float().mean() for sums, lengths in logits)
        return found

    return concatenated_forward


def _of_rows(theirs: Callable) -> Callable:
    def forward(self, model, batch, prefix=""):
        if not _is_text(batch, {"kto_tags", *_ROWS, *(f"kl_{name}" for name in _ROWS)}):
            return theirs(self, model, batch, prefix)
        scores = _scores(model, {name: batch[prefix + name] for name in _ROWS}, pairs=False)
        return _logits(scores) / scores.lengths, scores.logps, scores.mean_logps

    return forward


def _is_text(batch: dict, known: set[str]) -> bool:
    others = batch.keys() - known
    if others:
        say_once(f"LLaMA-Factory's own forward, because the batch has {', '.join(sorted(others))}")
    return not others


def _scores(model: Any, rows: dict, **options) -> CompletionLogps:
    return score_rows(model, **rows, outputs=("mean_logits",), **options)


def _logits(scores: CompletionLogps) -> Tensor:
    """(B,) sums over a completion's tokens of their mean logits."""
    assert scores.mean_logits is not None
    return scores.mean_logits.sum(1)


def main() -> None:
    """`llamafactory-cli`, swapped, in the processes, too, that it starts for several devices."""
    swap()
    from llamafactory import launcher
    from llamafactory.train.tuner import run_exp

    if "LOCAL_RANK" in os.environ:  # torchrun has started this process
        run_exp()
    elif sys.argv[1:2] != ["train"]:
        raise SystemExit(f"usage: python -m {__spec__.name} train dpo.yaml [...]: the other commands train nothing")
    else:
        launcher.__file__ = f"-m {__spec__.name}"  # what launch() lets torchrun run: else its own file, unswapped
        launcher.launch()


if __name__ == "__main__":
    main()
