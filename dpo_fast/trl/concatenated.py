"""TRL 0.18 to 0.28: `concatenated_forward` joins prompts and completions to rows [chosen, rejected], cuts them, and
reads the logits.

Where that leaves nothing of a prompt, TRL counts the logits of the row's last position among its mean logits: that mean
alone is not TRL's here.
"""

import torch
from torch import Tensor

from ..rows import IGNORED
from .checks import log_once
from .scoring import ScoringMixin, scored


class FastDPO(ScoringMixin):
    """`dpo_fast.trl.FastDPO` where TRL has `concatenated_forward`."""

    truncation_mode: str  # TRL's trainer's

    def _check_models(self, model, ref_model) -> None:
        """These take paths and adapters by any name."""

    def concatenated_forward(self, model, batch, is_ref_model=False):
        """As TRL's."""
        self._use_models()
        widest = max(batch[f"{name}_input_ids"].shape[1] for name in ("chosen", "rejected"))
        cut = self.truncation_mode == "keep_end" and self.max_length is not None and widest >= self.max_length
        if cut and (self.use_weighting or getattr(self.args, "ld_alpha", None) is not None):
            log_once("the model's own logits, because TRL weighs a token of a row without a prompt that none predicts")
            return super().concatenated_forward(model, batch, is_ref_model=is_ref_model)
        with scored(self._labels_of(batch), self._policy_outputs("mean_logits")):  # of the reference, too
            return super().concatenated_forward(model, batch, is_ref_model=is_ref_model)

    def _labels_of(self, batch: dict):
        prompts = batch["prompt_attention_mask"].sum(1).repeat(2)
        completions = torch.cat([batch[f"{name}_attention_mask"].sum(1) for name in ("chosen", "rejected")])

        def labels_of(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            """TRL has moved the rows to the left, and cut them at one end or the other."""
            lengths = attention_mask.sum(1)
            begins = prompts if self.truncation_mode == "keep_start" else lengths - completions
            columns = torch.arange(input_ids.shape[1], device=input_ids.device)
            inside = (columns >= begins[:, None]) & (columns < lengths[:, None])
            return input_ids.masked_fill(~inside, IGNORED)

        return labels_of
