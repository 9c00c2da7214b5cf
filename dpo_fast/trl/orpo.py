"""TRL's ORPOTrainer: its rows are packed, and no logits are built."""

from typing import Any

import torch

from ..completion import score_rows
from ..rows import IGNORED
from .others import config_of, mean_logits, paired_rows, trainer_with

_TRLs: Any = trainer_with("ORPOTrainer", "concatenated_forward")
ORPOConfig = config_of(_TRLs)


class ORPOTrainer(_TRLs):
    """TRL's, faster: its data, losses and metrics.

    `logits/chosen` and `logits/rejected` are means over the tokens of the completions, as DPOTrainer logs them: TRL's
    ORPO counts prompts and padding, too, whose logits do not exist here.
    """

    def concatenated_forward(self, model, batch):
        """As TRL's; in place of the logits stand their means, of which TRL takes the mean."""
        if self.is_encoder_decoder:
            return super().concatenated_forward(model, batch)
        ids, mask, labels = paired_rows(self, batch)
        pairs, in_completion = len(ids) // 2, labels[:, 1:] != IGNORED
        whole = ids.masked_fill(mask == 0, IGNORED)  # ORPO's likelihood is of the prompt, too
        found = score_rows(model, ids, mask, torch.cat([whole[:pairs], labels[pairs:]]), outputs=("mean_logits",))
        logps = (found.token_logps * in_completion).sum(1) / in_completion.sum(1)
        logits = mean_logits(found.mean_logits, in_completion)
        nll_loss = -found.logps[:pairs].sum() / found.lengths[:pairs].sum()
        aux_loss = (found.aux_loss,) if self.aux_loss_enabled else ()
        return (*logps.chunk(2), *logits, nll_loss, *aux_loss)
