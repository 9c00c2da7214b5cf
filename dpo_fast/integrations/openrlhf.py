"""OpenRLHF's `DPOTrainer` on packed rows, each prompt once: `from dpo_fast.integrations.openrlhf import DPOTrainer` in
place of `from openrlhf.trainer.dpo_trainer import DPOTrainer`, in a copy of openrlhf/cli/train_dpo.py."""

import torch
from openrlhf.trainer import dpo_trainer
from torch import Tensor, nn

from ..completion import completion_logps
from ..rows import IGNORED


class DPOTrainer(dpo_trainer.DPOTrainer):
    """OpenRLHF's trainer, whose data, losses, metrics and checkpoints it keeps.

    Rows are packed here, with `--ds.packing_samples` or without. Raises ValueError for rows that are spread over
    devices (`--ds.ring_attn_size` above 1) and for actors with a temperature.
    """

    def __init__(self, model, ref_model, strategy, *args, **kwargs):
        if strategy.ring_attn_group is not None:
            raise ValueError(
                "dpo_fast: ring_attn_size spreads a row over devices, where it cannot be packed: leave it at 1, or use "
                "openrlhf.trainer.dpo_trainer.DPOTrainer"
            )
        for actor in (model, ref_model):
            if (temperature := getattr(actor, "temperature", 1.0)) != 1.0:
                raise ValueError(f"dpo_fast: an actor's temperature must be 1 where it is trained, got {temperature}")
        super().__init__(model, ref_model, strategy, *args, **kwargs)

    def concatenated_forward(
        self,
        model: nn.Module,
        chosen_ids: Tensor,
        c_mask: Tensor,
        reject_ids: Tensor,
        r_mask: Tensor,
        prompt_id_lens: list[int],
    ):
        """(chosen (P,), rejected (P,) log-probs, balancing loss or [], mean NLL of a chosen token ())."""
        ids, mask, prompts = self.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
        columns = torch.arange(ids.shape[1], device=ids.device)
        in_completion = (columns >= torch.tensor(prompts, device=ids.device).unsqueeze(1)) & mask.bool()
        out = completion_logps(model, ids, mask, ids.masked_fill(~in_completion, IGNORED))
        chosen, rejected = out.logps.chunk(2)
        aux_loss: Tensor | list = [] if out.aux_loss is None else out.aux_loss
        return chosen, rejected, aux_loss, -out.mean_logps.chunk(2)[0].mean()
