"""TRL 0.29 to 1.14: `_compute_loss` and `compute_ref_log_probs` read the logits of padded rows [chosen, rejected]."""

from torch import Tensor

from ..rows import IGNORED
from .checks import log_once
from .scoring import ScoringMixin, scored


class FastDPO(ScoringMixin):
    """`dpo_fast.trl.FastDPO` where TRL has `_compute_loss`, which reads logits."""

    def _compute_loss(self, model, inputs, return_outputs=False):
        self._use_models()
        if return_outputs:  # whoever asks for outputs reads their logits
            log_once("the model's own logits, not scores of tokens, because compute_metrics or a caller asks for them")
            return super()._compute_loss(model, inputs, return_outputs)
        with scored(self._labels_of(inputs), self._policy_outputs("entropy", "mean_logits", "is_top1")):
            return super()._compute_loss(model, inputs, return_outputs)

    def compute_ref_log_probs(self, *args, **kwargs):
        """As TRL's, of (inputs) or (model, inputs)."""
        with scored(self._labels_of(kwargs["inputs"] if "inputs" in kwargs else args[-1])):
            return super().compute_ref_log_probs(*args, **kwargs)

    def _labels_of(self, inputs):
        def labels_of(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            completion = inputs["completion_mask"]
            if hasattr(self, "_truncate_inputs"):  # else the collator has
                completion = self._truncate_inputs(inputs["input_ids"], inputs["attention_mask"], completion)[2]
            return input_ids.masked_fill(completion == 0, IGNORED)

        return labels_of
