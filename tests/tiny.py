"""Tiny models, tokenizers and preference data for the tests, built from a config in milliseconds. No download."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from dpo_fast.batch import TokenPair

VOCAB = 320
_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_GPT2 = dict(
    vocab_size=VOCAB,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=256,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
)


def tiny_config(kind: str = "llama", **overrides) -> transformers.PretrainedConfig:
    """`kind` is a transformers model type: llama, gpt2, gemma2, granite, cohere, qwen3, ...

    Skips the test where the installed transformers is too old to know it.
    """
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} knows no {kind}")
    sizes = _GPT2 if kind == "gpt2" else _SIZES
    if kind in ("gemma2", "gemma3_text", "qwen3"):
        sizes = {**sizes, "head_dim": 8}
    return transformers.AutoConfig.for_model(kind, **{**sizes, **overrides})


def tiny_model(kind: str = "llama", seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A randomly initialised fp32 causal language model, in eval mode."""
    config = tiny_config(kind, **overrides)
    skip_without_experts(config)
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def why_not_nemotron() -> str:
    """What speaks against packed rows for Nemotron, whose attention transformers has moved to its common interface."""
    from transformers.models.nemotron import modeling_nemotron

    if hasattr(modeling_nemotron, "ALL_ATTENTION_FUNCTIONS"):
        return "does not hand the layout"
    return "does not take its attention from transformers' AttentionInterface"


# A trainer's settings: on CPU, nothing shown, reported or saved, each step logged
QUIET = dict(use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1)


def skip_without_experts(config) -> None:
    """Skip the test where the model has experts and torch cannot run them on CPU."""
    experts = {"num_experts", "num_local_experts", "n_routed_experts"} & set(config.to_dict())
    if experts and not torch._C._dispatch_has_computed_kernel_for_dispatch_key("aten::_grouped_mm", "CPU"):
        pytest.skip(f"torch {torch.__version__} cannot run transformers' experts on CPU: no grouped_mm there")


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_WORDS = "the a cat dog bird sees likes eats finds red blue green small big fish house tree river on under near".split()


def tiny_tokenizer(bos: bool = False, chat_template: str | None = CHAT_TEMPLATE):
    """Byte-level BPE with <pad>=0, <s>=1, </s>=2; `bos=True` puts <s> in front of every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(_WORDS)] * 3, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
    )


def tiny_rows(n: int = 8, seed: int = 0) -> list[dict]:
    """n preference pairs as text: prompt, chosen, rejected of different lengths."""
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(low, high)))

    return [
        {"prompt": words(3, 8), "chosen": f" {words(2, 6)} yes", "rejected": f" {words(2, 9)} no"} for _ in range(n)
    ]


def save_inputs(folder: Path, pairs: int = 0, model: transformers.PreTrainedModel | None = None) -> None:
    """folder/model: a tiny model, or `model`, with its tokenizer; with `pairs`, so many rows in folder/pairs.jsonl."""
    (tiny_model() if model is None else model).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    if pairs:
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(pairs)))


def tiny_chat_rows(n: int = 8, seed: int = 0) -> list[dict]:
    """The same as chat messages."""
    return [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
        }
        for row in tiny_rows(n, seed)
    ]


def tiny_pairs(n: int = 3, seed: int = 0, longest: int = 9) -> list[TokenPair]:
    """n pairs of random token ids; prompts and completions have 1 to `longest` tokens."""
    rng = random.Random(seed)

    def ids() -> list[int]:
        return [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, longest))]

    pairs = []
    for _ in range(n):
        prompt = ids()
        pairs.append(TokenPair(prompt, ids(), prompt, ids()))
    return pairs
