"""What an evaluation finds of single pairs, for both trainers."""

from typing import Any

import torch
from accelerate.utils import gather_object

from .record import KEPT_PAIRS

_COLUMNS = ("chosen_rewards", "rejected_rewards", "chosen_tokens", "rejected_tokens")


class PairEvaluation:
    """Part of a Trainer: its `prediction_step` calls `_note_pairs` where `_of_pairs` is a list."""

    accelerator: Any  # the Trainer's
    evaluate: Any  # the Trainer's
    _of_pairs: list[torch.Tensor] | None = None

    def evaluate_pairs(self, eval_dataset=None) -> tuple[dict[str, float], dict]:
        """`evaluate`'s metrics; and of the single pairs `total`, how many there are, and lists of `chosen_rewards`,
        `rejected_rewards`, `chosen_tokens` and `rejected_tokens` of the first of them. On every rank."""
        self._of_pairs = []
        try:
            metrics = self.evaluate(eval_dataset)
            found = gather_object(torch.cat(self._of_pairs, dim=1).T.tolist() if self._of_pairs else [])
        finally:
            self._of_pairs = None
        columns = zip(*found[:KEPT_PAIRS], strict=True) if found else [()] * len(_COLUMNS)
        return metrics, {"total": len(found), **dict(zip(_COLUMNS, map(list, columns), strict=True))}

    def _note_pairs(self, rows: torch.Tensor) -> None:
        """rows: (4, P), rewards and scored tokens of a batch's pairs, in the order of the columns."""
        self._of_pairs.append(rows[:, : self.pairs_that_count(rows.shape[1])])

    def pairs_that_count(self, pairs: int) -> int | None:
        """How many of this rank's pairs of an evaluation batch are not repeats (None: all): where the last pairs do not
        suffice for all ranks, accelerate hands out the first ones again."""
        data = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not data.end_of_dataloader or data.remainder <= 0:
            return None
        return min(pairs, max(0, data.remainder - self.accelerator.process_index * pairs))
