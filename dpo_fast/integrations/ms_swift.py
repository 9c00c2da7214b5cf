"""ms-swift's DPO trainer on packed rows.

    from dpo_fast.integrations import ms_swift       # in a file fast.py:
    ms_swift.swap()                                  # swift rlhf --rlhf_type dpo --external_plugins fast.py ...

Its trainer scores a batch in one method, from logits of padded rows, or of one row with `padding_free` or `packing`.
Ours scores the same rows by `completion_logps`, which runs prompts once; losses and metrics stay ms-swift's. What has
more inputs (images, audio), sequence parallelism, a balancing loss and encoder-decoders go the old way, with a line.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..completion import score_rows
from ..rows import IGNORED
from . import Swap, say_once

_TEXT = {"input_ids", "attention_mask", "labels"}
_OF_ONE_ROW = {"position_ids", "text_position_ids"}


def swap() -> Swap:
    """Let ms-swift's DPO trainer score packed rows until `undo()`, or until the end of a `with` block.

    Raises ImportError where its trainer is not the one that this knows.
    """
    from swift.rlhf_trainers import DPOTrainer

    with Swap() as on:
        on.replace(DPOTrainer, "concatenated_forward", _of_pairs)
        return on.pop_all()


def _of_pairs(theirs: Callable) -> Callable:
    def concatenated_forward(self, model, batch, is_ref_model=False):
        if reason := _reason_against(self, batch):
            say_once(f"ms-swift's own forward, because {reason}")
            return theirs(self, model, batch, is_ref_model)
        rows = _unpacked(batch) if self.template.padding_free else {name: batch.get(name) for name in _TEXT}
        ld_alpha = None if is_ref_model else self.args.ld_alpha
        scores = score_rows(model, **rows, outputs=("mean_logits",), ld_alpha=ld_alpha)
        found = {}
        halves = scores.logps.chunk(2), scores.lengths.chunk(2), _half_sums(scores.mean_logits)
        for name, logps, lengths, logits in zip(("chosen", "rejected"), *halves, strict=True):
            found[f"{name}_logps"] = logps
            found[f"{name}_completion_token_counts"] = lengths
            found[f"mean_{name}_logits"] = logits / lengths.sum()
        if not is_ref_model:
            chosen = scores.token_logps.chunk(2)[0].sum()  # not weighted by ld_alpha
            found["nll_loss"] = -chosen / found["chosen_completion_token_counts"].sum()
        return found

    return concatenated_forward


def _reason_against(trainer, batch: dict) -> str:
    if trainer.template.sequence_parallel_size > 1:
        return "its rows are spread over devices"
    if trainer.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if trainer.aux_loss_enabled:
        return "router_aux_loss_coef adds a balancing loss of padded rows"
    known = _TEXT | (_OF_ONE_ROW if trainer.template.padding_free else set())
    others = {name for name, value in batch.items() if value is not None} - known
    return f"the batch has {', '.join(sorted(others))}" if others else ""


def _unpacked(batch: dict) -> dict[str, Tensor]:
    """The sequences of one row, which begin where positions are 0, as padded rows; the host reads where, once."""
    positions = batch.get("text_position_ids")
    positions = (batch["position_ids"] if positions is None else positions).flatten()
    begins = (positions == 0).nonzero().flatten().tolist()
    lengths = [end - begin for begin, end in zip(begins, [*begins[1:], len(positions)], strict=True)]

    def rows_of(values: Tensor, padding: int) -> Tensor:
        return pad_sequence(values.flatten().split(lengths), batch_first=True, padding_value=padding)

    return {
        "input_ids": rows_of(batch["input_ids"], 0),
        "attention_mask": rows_of(torch.ones_like(positions), 0),
        "labels": rows_of(batch["labels"], IGNORED),
    }


def _half_sums(values: Tensor) -> list[Tensor]:
    """(B, T - 1) -> two of (): of the chosen half, and of the rejected one."""
    return [half.sum() for half in values.chunk(2)]
