"""torchtune's DPO recipes without logits: its decoder's hidden states and output weight, scored where a label is.

In a recipe of one's own (`tune cp lora_dpo_single_device lora_dpo.py`), two lines of `concatenated_forward` become

    with self.activations_handling_ctx:
        all_log_probs, all_logits = completion_logps(model, concatenated_input_ids, concatenated_labels)
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops.checks import INTEGERS, check_tensor
from ..ops.linear import linear_token_logps
from ..ops.sequence import sequence_logps
from ..rows import padded_rows


def completion_logps(model: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of each row's labelled tokens under a torchtune `TransformerDecoder`, with gradients; no (B, T, V).

    tokens, labels: (B, T) integers of `padded_collate_dpo`, padded on the right, -100 where nothing is scored, not
    shifted. Rows run as they are. On a GPU the host waits, to know how many tokens are scored.

    Returns (B,) sums in nats, what `rlhf.get_batch_log_probs` returns of logits, and (B, V) logits averaged over each
    row's T positions, detached: their mean is that of all logits, which the recipes log.

    Raises TypeError for a model without `norm`, `output` and `unembed`, or whose output is no linear layer, LoRA layer
    or `TiedLinear`; ValueError for shapes.
    """
    op = "integrations.torchtune.completion_logps"
    check_tensor(op, "tokens", tokens, ("B", "T"), INTEGERS)
    check_tensor(op, "labels", labels, tuple(tokens.shape), INTEGERS, tokens.device)
    if absent := [name for name in ("norm", "output", "unembed") if not hasattr(model, name)]:
        raise TypeError(
            f"{op}: model must be a torchtune TransformerDecoder, {type(model).__name__} has no {', '.join(absent)}; "
            "dpo_fast.get_batch_logps scores the logits of any model"
        )
    batch, decoder = padded_rows({"input_ids": tokens}, labels), cast(Any, model)

    def unembed(hidden: Tensor) -> tuple[Tensor, Tensor]:  # inside forward, where sharded weights are whole
        hidden = decoder.norm(hidden)
        scored = hidden.flatten(0, 1).index_select(0, batch.predictors)
        token_logps = linear_token_logps(scored, labels=batch.targets, **_head(op, decoder.output, scored))
        with torch.no_grad():
            mean_logits = decoder.output(hidden.mean(1))
        return token_logps, mean_logits

    with _unembedding(decoder, unembed):
        token_logps, mean_logits = model(tokens)
    return sequence_logps(token_logps, batch.sequence_ids, len(tokens)), mean_logits


def _head(op: str, output: Any, hidden: Tensor) -> dict:
    """What `linear_token_logps` takes of the decoder's output layer."""
    if type(output) is nn.Linear:
        return {"weight": output.weight, "bias": output.bias}
    if type(output).__name__ == "TiedLinear":
        return {"weight": output.tied_module.weight}
    if type(output).__name__ == "LoRALinear" and not output._quantize_base:
        head = {"weight": output.weight, "bias": output.bias}
        if not output.disabled:
            down = output.lora_a(output.dropout(hidden)) * (output.alpha / output.rank)
            head["low_rank"] = down, output.lora_b.weight
        return head
    raise TypeError(
        f"{op}: the model's output is a {type(output).__name__}, which cannot be read; dpo_fast.get_batch_logps scores "
        "the logits of any model"
    )


@contextlib.contextmanager
def _unembedding(decoder: nn.Module, unembed) -> Iterator[None]:
    """Inside, what the decoder makes of its last hidden states; its own function comes back."""
    own = vars(decoder).get("unembed")
    vars(decoder)["unembed"] = unembed
    try:
        yield
    finally:
        del vars(decoder)["unembed"]
        if own is not None:
            vars(decoder)["unembed"] = own
