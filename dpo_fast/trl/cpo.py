"""TRL's CPOTrainer, of which SimPO and AlphaPO are losses: its rows are packed, and no logits are built."""

from typing import Any

import torch

from ..completion import score_rows
from ..rows import IGNORED
from .others import config_of, mean_logits, paired_rows, trainer_with

_TRLs: Any = trainer_with("CPOTrainer", "concatenated_forward")
CPOConfig = config_of(_TRLs)


class CPOTrainer(_TRLs):
    """TRL's, faster: its data, losses and metrics.

    `logits/chosen` and `logits/rejected` are means over the tokens of the completions, as DPOTrainer logs them: TRL's
    CPO counts prompts and padding, too, whose logits do not exist here.
    """

    def concatenated_forward(self, model, batch):
        """As TRL's; in place of the logits stand their means, of which TRL takes the mean."""
        if self.is_encoder_decoder:
            return super().concatenated_forward(model, batch)
        ids, mask, labels = paired_rows(self, batch)
        pairs = len(ids) // 2
        found = score_rows(model, ids, mask, labels, outputs=("mean_logits",))
        logps = found.mean_logps if self.loss_type in ("ipo", "simpo") else found.logps
        logits = mean_logits(found.mean_logits, labels[:, 1:] != IGNORED)
        nll_loss = torch.zeros((), device=logps.device)
        if self.cpo_alpha != 0:
            nll_loss = -found.logps[:pairs].sum() / found.lengths[:pairs].sum()
        aux_loss = (found.aux_loss,) if self.aux_loss_enabled else ()
        return (*logps.chunk(2), *logits, nll_loss, *aux_loss)
