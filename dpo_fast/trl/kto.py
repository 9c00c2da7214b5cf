"""TRL's KTOTrainer: its rows are packed, and no logits are built.

Three seams, chosen by what is there: `add_fused_lm_head`, which is given the models (TRL 1.15 and later);
`_compute_loss`, which reads logits and their entropies (1.8 to 1.14); `forward`, which returns log-probs and logits of
a batch (0.18 to 1.5).
"""

import contextlib
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from ..completion import CompletionLogps, score_rows
from ..copies import base_model_of
from ..rows import IGNORED
from .installed import Installed, UsesModels
from .others import ignored_by, no_seam, trainer_with
from .scoring import install as answer_with_scores
from .scoring import scored

_TRLs: Any = trainer_with("KTOTrainer", "compute_loss")
_module = sys.modules[_TRLs.__module__]


class _Forward:
    """Over TRL 0.18 to 1.5. Equal beginnings of the rows of a batch run once."""

    model: Any
    ref_model: Any
    calculate_KL: bool
    aux_loss_enabled: bool
    null_ref_context: Any

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


class _FullLogits(UsesModels):
    """Over TRL 1.8 to 1.14."""

    model: Any
    ref_model: Any
    accelerator: Any
    calculate_KL: bool

    def _compute_loss(self, model, inputs, return_outputs=False):
        if return_outputs:  # whoever asks for outputs reads their logits
            return super()._compute_loss(model, inputs, return_outputs)
        self._use_models()
        with scored(_labels_by(inputs["completion_mask"]), ("entropy", "mean_logits")):
            return super()._compute_loss(model, inputs, return_outputs)

    def _compute_kl_logps(self, model, batch):
        if not self.calculate_KL:
            return None
        with scored(_labels_by(batch["KL_completion_mask"])):
            return super()._compute_kl_logps(model, batch)

    def compute_ref_log_probs(self, model, inputs):
        """As TRL's."""

        def labels_of(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            kind = next(kind for kind in ("", "KL_") if input_ids is inputs[f"{kind}input_ids"])
            return _labels_by(inputs[f"{kind}completion_mask"])(input_ids, attention_mask)

        with scored(labels_of):
            return super().compute_ref_log_probs(model, inputs)

    def _use_models(self) -> None:
        if "_installed" not in vars(self):
            models = [self.model, *([] if self.ref_model is None else [self.ref_model])]
            put = functools.partial(answer_with_scores, pairs=False)
            self._installed = [Installed(base_model_of(self.accelerator.unwrap_model(model)), put) for model in models]
        super()._use_models()


def _labels_by(completion_mask: Tensor):
    return lambda input_ids, attention_mask: input_ids.masked_fill(completion_mask == 0, IGNORED)


class _FusedHead(UsesModels):
    """Over TRL 1.15 and later."""

    def __init__(self, *args, **kwargs):
        from .fused_head import install

        self._installed = []

        def add_fused_lm_head(model, outputs=("log_probs",)):
            put = functools.partial(install, outputs=tuple(outputs), pairs=False)
            self._installed.append(Installed(model, put))

        before = _module.add_fused_lm_head
        _module.add_fused_lm_head = add_fused_lm_head
        try:
            super().__init__(*args, **kwargs)
        finally:
            _module.add_fused_lm_head = before


def _seam() -> Any:
    if hasattr(_module, "add_fused_lm_head"):
        return _FusedHead
    if "forward" in vars(_TRLs):
        return _Forward
    reads = {"selective_log_softmax_and_entropy", "entropy_from_logits"} & set(vars(_module))
    if "_compute_loss" in vars(_TRLs) and reads:
        return _FullLogits
    raise no_seam(
        "KTOTrainer",
        f"forward or a _compute_loss with entropies of TRL's KTOTrainer, or add_fused_lm_head in {_module.__name__}",
    )


_Seam: Any = _seam()


class KTOTrainer(_Seam, _TRLs):
    """TRL's, faster: its data, losses and metrics.

    Before TRL 1.9 `logits/chosen` and `logits/rejected` are sums over the tokens of the completions: TRL's count
    prompts and padding, too, whose logits do not exist here.
    """
