"""What every provider of `benchmarks.train_step` gets: the same model files, tokenizer and pairs.

Nothing is downloaded. Models are built from a config at random; a word of the text is a token, so that every trainer's
own tokenisation arrives at the same ids. Chosen and rejected prefer different halves of the vocabulary: there is
something to learn, and the curves move.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

EOS = "</s>"
SPECIAL = ("<pad>", "<s>", EOS)


@dataclass(frozen=True)
class Mix:
    """Lengths in tokens: log-normal, independent of each other, about as spread as UltraFeedback's."""

    prompt_median: int
    completion_median: int
    prompt_sigma: float = 1.0
    completion_sigma: float = 0.7

    def lengths(self, rng: random.Random, longest: int) -> tuple[int, int, int]:
        """(prompt, chosen, rejected) of one pair, EOS included; prompt + completion is at most `longest`."""

        def draw(median: int, sigma: float, most: int) -> int:
            return min(max(round(median * math.exp(rng.gauss(0.0, sigma))), 2), most)

        prompt = draw(self.prompt_median, self.prompt_sigma, 3 * longest // 4)
        chosen, rejected = (draw(self.completion_median, self.completion_sigma, longest - prompt) for _ in range(2))
        return prompt, chosen, rejected


MIXES = {
    "chat": Mix(150, 200),
    "long": Mix(700, 200, prompt_sigma=0.4),  # documents: narrower, and few reach the limit
    "short": Mix(40, 200),
    "tiny": Mix(8, 10),
}


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model."""

    layers: int
    width: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False

    def config(self, positions: int) -> transformers.PretrainedConfig:
        return transformers.LlamaConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=positions,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )


SHAPES = {
    "cpu-bar": Shape(6, 512, 1536, 8, 8, 32_000),
    "tiny": Shape(2, 32, 48, 4, 2, 300),
    "1b": Shape(16, 2048, 8192, 32, 8, 128_256, tied=True),
    "8b": Shape(32, 4096, 14_336, 32, 8, 128_256),
}


def write_inputs(folder: Path, shape: Shape, mix: Mix, pairs: int, longest: int, dtype: torch.dtype, seed: int) -> dict:
    """Model and tokenizer to folder/model, pairs to folder/pairs.jsonl; returns what they are, for the result file.

    A line of pairs.jsonl has the texts `prompt`, `chosen`, `rejected` and the ids that they must become, EOS included.
    """
    write_model(folder / "model", shape, longest, dtype, seed)
    rows = make_pairs(mix, pairs, longest, shape.vocab, seed)
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    lengths = [tuple(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in rows]
    return {"pairs": pairs, "lengths": lengths}


def write_model(path: Path, shape: Shape, positions: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(shape.config(positions), dtype=dtype)
    model.save_pretrained(path)
    word_tokenizer(shape.vocab).save_pretrained(path)


def word_tokenizer(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """One token a word: "t17" is token 17."""
    words = {**{name: i for i, name in enumerate(SPECIAL)}, **{f"t{i}": i for i in range(len(SPECIAL), vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=EOS
    )


def make_pairs(mix: Mix, pairs: int, longest: int, vocab: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    first, middle = len(SPECIAL), vocab // 2

    def ids(count: int, low_share: float) -> list[int]:
        """`count` tokens, that share of them from the lower half of the vocabulary."""
        return [
            rng.randrange(first, middle) if rng.random() < low_share else rng.randrange(middle, vocab)
            for _ in range(count)
        ]

    rows = []
    for _ in range(pairs):
        prompt, chosen, rejected = mix.lengths(rng, longest)
        row = {
            "prompt_ids": ids(prompt, 0.5),
            "chosen_ids": ids(chosen - 1, 0.8),
            "rejected_ids": ids(rejected - 1, 0.2),
        }
        for name in ("prompt", "chosen", "rejected"):
            row[name] = " ".join(f"t{i}" for i in row[f"{name}_ids"])
        for name in ("chosen", "rejected"):
            row[name] = f" {row[name]}"
            row[f"{name}_ids"].append(SPECIAL.index(EOS))
        rows.append(row)
    return rows


def real_tokens(lengths: list[tuple[int, int, int]]) -> int:
    """Tokens of the sequences without padding, the prompt counted for both of them."""
    return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths)


def padded_tokens(lengths: list[tuple[int, int, int]]) -> int:
    """Positions of one batch as 2P padded rows."""
    return 2 * len(lengths) * max(prompt + max(chosen, rejected) for prompt, chosen, rejected in lengths)


def packed_tokens(lengths: list[tuple[int, int, int]]) -> int:
    """Positions of one batch as a shared-prefix row."""
    return sum(map(sum, lengths))
