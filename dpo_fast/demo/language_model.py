"""Step 1 of the demo: a small Llama learns to continue text. Plain PyTorch; DPO comes later."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_fast.demo.corpus import Document


@dataclass(frozen=True)
class ModelSize:
    """Shape of the demo's Llama."""

    hidden: int = 96
    layers: int = 3
    heads: int = 4
    intermediate: int = 264


def new_model(tokenizer: PreTrainedTokenizerFast, size: ModelSize) -> LlamaForCausalLM:
    """A Llama with random weights (torch's global seed) and the tokenizer's special tokens."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=128,
        initializer_range=size.hidden**-0.5,  # transformers' 0.02 is made for wide models; attention would start flat
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode_documents(documents: list[Document], tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """Each document as BOS, prompt, completion, EOS. Prompt and completion are encoded apart, as DPO will see them."""
    prompts = tokenizer([document.prompt for document in documents])["input_ids"]
    completions = tokenizer([document.completion for document in documents], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    return [torch.tensor(prompt + completion + end) for prompt, completion in zip(prompts, completions, strict=True)]


def train_language_model(
    model: LlamaForCausalLM,
    rows: list[Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> list[tuple[int, float]]:
    """Next-token training with AdamW, warm-up and cosine decay; `on_step(step, steps, loss)` after each step.

    Returns (step, mean loss in nats per token) for every step.
    """
    pad = model.config.pad_token_id
    steps = epochs * (len(rows) // batch_size)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98), fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=max(steps, 2), pct_start=0.1, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    history: list[tuple[int, float]] = []
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            batch = [rows[index] for index in order[start : start + batch_size]]
            input_ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=pad)
            hidden = model.model(input_ids=input_ids[:, :-1]).last_hidden_state  # padding is right of all that is read
            targets = input_ids[:, 1:]
            read = targets != pad
            loss = F.cross_entropy(model.lm_head(hidden[read]), targets[read])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            history.append((len(history) + 1, loss.item()))
            on_step(len(history), steps, history[-1][1])
    model.eval()
    return history
