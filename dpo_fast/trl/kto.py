"""TRL's KTOTrainer: its rows are packed, and no logits are built.

Two seams, chosen by what is there: `add_fused_lm_head`, which is given the models (TRL 1.15 and later), and `forward`,
which returns log-probs and logits of a batch (0.18 to 1.3). Between those the logits are built amid TRL's loss.
"""

import contextlib
import sys
from typing import Any

import torch

from ..completion import CompletionLogps, score_rows
from ..rows import IGNORED
from .others import ignored_by, no_seam, trainer_with

_KTOTrainer = trainer_with("KTOTrainer", "compute_loss")
_module = sys.modules[_KTOTrainer.__module__]


class _Forward:
    """Over TRL 0.18 to 1.3. Equal beginnings of the rows of a batch run once."""

    def forward(self, model, batch):
        """As TRL's; in place of logits stand their sums over the completions, (rows,), of which TRL takes the sum."""
        if self._is_left_to_trl():
            return super().forward(model, batch)
        kl_logps = self._compute_kl_logps(model, batch)
        found = self._scored(model, batch, outputs=("mean_logits",))
        sums = found.mean_logits.sum(1) * self.model.config.get_text_config().vocab_size
        desirable = torch.as_tensor(batch["label"], dtype=torch.bool, device=sums.device)
        rows = [which.nonzero().squeeze(1) for which in (desirable, ~desirable)]
        aux_loss = (found.aux_loss,) if self.aux_loss_enabled else ()
        return (*(found.logps[i] for i in rows), *(sums[i] for i in rows), kl_logps, *aux_loss)

    def compute_reference_log_probs(self, padded_batch):
        """As TRL's."""
        if self._is_left_to_trl():
            return super().compute_reference_log_probs(padded_batch)
        with torch.no_grad(), self.null_ref_context() if self.ref_model is None else contextlib.nullcontext():
            model = self.model if self.ref_model is None else self.ref_model
            return self._scored(model, padded_batch).logps, self._compute_kl_logps(model, padded_batch)

    def _compute_kl_logps(self, model, batch):
        if self._is_left_to_trl():
            return super()._compute_kl_logps(model, batch)
        if not self.calculate_KL:
            return None
        with torch.no_grad():
            return self._scored(model, batch, "KL_").logps

    def _scored(self, model, batch: dict, kind: str = "", outputs: tuple[str, ...] = ()) -> CompletionLogps:
        ids, mask, labels = (batch[f"{kind}completion_{name}"] for name in ("input_ids", "attention_mask", "labels"))
        labels = labels.masked_fill((labels == ignored_by(self)) | (mask == 0), IGNORED)
        return score_rows(model, ids, mask, labels, outputs=outputs, pairs=False)

    def _is_left_to_trl(self) -> bool:
        return getattr(self, "is_encoder_decoder", False)


class _FusedHead:
    """Over TRL 1.15 and later."""

    def __init__(self, *args, **kwargs):
        from .fused_head import install

        before = _module.add_fused_lm_head
        _module.add_fused_lm_head = install
        try:
            super().__init__(*args, **kwargs)
        finally:
            _module.add_fused_lm_head = before


def _seam() -> Any:
    if hasattr(_module, "add_fused_lm_head"):
        return _FusedHead
    if "forward" in vars(_KTOTrainer):
        return _Forward
    raise no_seam("KTOTrainer", f"forward of TRL's KTOTrainer or add_fused_lm_head in {_module.__name__}")


class KTOTrainer(_seam(), _KTOTrainer):
    """TRL's, faster: its data, losses and metrics.

    Before TRL 1.4 `logits/chosen` and `logits/rejected` are sums over the tokens of the completions: TRL's count
    prompts and padding, too, whose logits do not exist here.
    """
