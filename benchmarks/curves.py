"""Curves of TRL's DPOTrainer, `FastDPOTrainer` and `dpo_fast.trl.DPOTrainer` from the same tiny model and data.

python -m benchmarks.curves                          all families, three modes each: some minutes
python -m benchmarks.curves llama gemma2 --modes base

Three AdamW steps in fp32 on a CPU, without checkpointing and with both kinds of it. A row says which layout ran and,
for each of ours, the largest difference of a loss and of a gradient norm (a norm above 1 by its size) from TRL's;
"moved" is by how much TRL's own loss has changed. Status 1 where a difference is above 5e-7, or above the wider limit
of a family that names the reason. Nothing is timed.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import tokenizers
import torch
import transformers
import trl
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo_fast import FastDPOConfig, FastDPOTrainer
from dpo_fast.trl import DPOTrainer

from .record import table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import scan  # tiny configs of all model types

LIMIT = 5e-7
VOCAB = 96  # scan's


class Family(NamedTuple):
    """kind: transformers' model type. options: of its config. limit: how far from TRL it may be, with the reason."""

    kind: str
    options: dict[str, Any] = {}
    limit: float = LIMIT
    reason: str = ""


FAMILIES = {
    "llama": Family("llama"),
    "llama-tied": Family("llama", {"tie_word_embeddings": True}),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "mistral": Family("mistral", {"sliding_window": 5}),
    "gemma2": Family("gemma2"),
    "gemma3": Family("gemma3_text"),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2"),
    "gpt-neox": Family("gpt_neox"),
    "olmo2": Family("olmo2"),
    "olmo3": Family("olmo3"),
    "deepseek-v2": Family("deepseek_v2"),
    "deepseek-v3": Family("deepseek_v3"),
    "glm4-moe": Family("glm4_moe"),
    "granite": Family("granite"),
    "cohere2": Family("cohere2"),
    "smollm3": Family("smollm3"),
    "qwen3-moe": Family("qwen3_moe"),
    "mixtral": Family("mixtral"),
    "gpt-oss": Family("gpt_oss"),
    "jamba": Family("jamba"),
    # With reentrant checkpointing a gradient norm is 1.2e-6 off; with adam_epsilon=1e-5, 1.0e-7; with SGD, 0
    "qwen3-next": Family("qwen3_next", {}, 2e-6, "AdamW divides gradients that are rounding by their own size"),
    "bloom": Family("bloom"),
    "mamba": Family("mamba"),
    "lfm2": Family("lfm2"),
    "qwen2-vl": Family("qwen2_vl"),
    "gemma3-vl": Family("gemma3"),
    "falcon": Family("falcon"),
    "nemotron": Family("nemotron"),
    "stablelm": Family("stablelm"),
    "opt": Family("opt"),
}
MODES: dict[str, dict] = {
    "base": dict(gradient_checkpointing=False),
    "reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
    "non-reentrant": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
}
TRAINERS = {"trl": trl.DPOTrainer, "fast": FastDPOTrainer, "drop-in": DPOTrainer}


@dataclass
class Row:
    """What one family did in one mode."""

    family: str
    mode: str
    layout: str = ""
    differences: dict[str, float] = field(default_factory=dict)  # "fast loss" and the like -> largest
    moved: float = 0.0  # by how much TRL's loss has
    limit: float = LIMIT
    note: str = ""  # the family's reason, or what went wrong

    @property
    def off(self) -> float:
        return max(self.differences.values(), default=float("nan"))

    @property
    def is_bad(self) -> bool:
        return not self.off <= self.limit


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def pairs(count: int = 9) -> datasets.Dataset:
    """Prompts of 2 to 12 tokens, completions of 1 to 9: longer than the windows."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(f"w{n}" for n in torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    return datasets.Dataset.from_list(
        [{"prompt": text(2, 12), "chosen": f" {text(1, 9)}", "rejected": f" {text(1, 9)}"} for _ in range(count)]
    )


def save_model(family: Family, folder: str) -> type[transformers.PreTrainedModel]:
    """A tiny model without dropout in `folder`; returns its class."""
    options = {**_without_dropout(family.kind), **family.options}
    if family.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        model = scan.build(family.kind, **options)
    else:
        torch.manual_seed(0)
        config_class = transformers.CONFIG_MAPPING[family.kind]
        config = config_class(**scan.shrunk(config_class, **options))
        text = config.get_text_config()
        if "mrope_section" in getattr(text, "ignore_keys_at_rope_validation", ()):  # of a head of 8
            text.rope_parameters["mrope_section"] = [1, 1, 2]
        model = transformers.AutoModelForImageTextToText.from_config(config).float()
    model.save_pretrained(folder)
    return type(model)


def _without_dropout(kind: str) -> dict[str, float]:
    """TRL switches off modules alone, `FastDPOTrainer` numbers in layers as well: here there is none."""
    config = transformers.CONFIG_MAPPING[kind]()
    return {name: 0.0 for name, value in vars(config).items() if "drop" in name and isinstance(value, float)}


def curve(name: str, model, folder: str, mode: str) -> tuple[list[dict], str]:
    """(logs of the steps, layout that ran) of one of TRAINERS."""
    config = FastDPOConfig if name == "fast" else trl.DPOConfig
    args = config(
        folder,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        per_device_train_batch_size=3,
        max_steps=3,
        learning_rate=1e-3,
        **MODES[mode],
    )
    trainer = TRAINERS[name](model, args=args, train_dataset=pairs(), processing_class=tokenizer())
    trainer.train()
    layout = "" if name == "trl" else dict(row[:2] for row in trainer.report_facts()["how"])["layout"]
    return [log for log in trainer.state.log_history if "loss" in log], layout


def measure(name: str, mode: str) -> Row:
    """One row: the three trainers on one family."""
    family = FAMILIES[name]
    row = Row(name, mode, limit=family.limit, note=family.reason)
    with tempfile.TemporaryDirectory() as folder, _quiet():
        try:
            model_class = save_model(family, folder)
            logs, layouts = {}, []
            for trainer in TRAINERS:
                logs[trainer], layout = curve(trainer, model_class.from_pretrained(folder), folder, mode)
                layouts.append(layout)
        except Exception as error:  # of any model: the row says it, and the status
            row.note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return row
    row.layout = " / ".join(dict.fromkeys(layout for layout in layouts if layout))
    row.moved = max(abs(log["loss"] - logs["trl"][0]["loss"]) for log in logs["trl"])
    for trainer in ("fast", "drop-in"):
        for key in ("loss", "grad_norm"):
            both = [(a[key], b[key]) for a, b in zip(logs[trainer], logs["trl"], strict=True)]
            row.differences[f"{trainer} {key}"] = max(abs(a - b) / max(1.0, abs(b)) for a, b in both)
    return row


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say of tiny models would hide the table."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    nowhere = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(disabled)


def shown(row: Row) -> dict:
    numbers = {name: f"{value:.1e}" for name, value in row.differences.items()} | {"moved": f"{row.moved:.1e}"}
    note = row.note if row.is_bad or row.off > LIMIT else ""
    return {"family": row.family, "mode": row.mode, "layout": row.layout, **numbers, "note": note}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.curves", description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    a = parser.parse_args(argv)
    if unknown := set(a.families) - FAMILIES.keys():
        parser.error(f"no such family: {', '.join(sorted(unknown))}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    rows = []
    for name in a.families or FAMILIES:
        for mode in a.modes:
            rows.append(measure(name, mode))
            print(f"{name} {mode}: {rows[-1].off:.1e} {rows[-1].note}", file=sys.stderr, flush=True)
    columns = ["family", "mode", "layout", "moved"]
    columns += [f"{trainer} {key}" for trainer in ("fast", "drop-in") for key in ("loss", "grad_norm")]
    print(table([shown(row) for row in rows], [*columns, "note"]))
    bad = [row for row in rows if row.is_bad]
    print(f"{len(rows)} rows, {len(bad)} of them off by more than their limit ({LIMIT:g})")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
