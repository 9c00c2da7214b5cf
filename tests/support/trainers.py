"""Tiny trainers: on CPU, nothing shown or reported, each step logged, nothing saved but what a test asks for."""

import pytest
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")  # what imports this is skipped without

from dpo_fast import FastDPOConfig, FastDPOTrainer

TOKENIZER = tiny_tokenizer()


def fast_trainer(folder, model=None, train_dataset=None, *, options=None, **settings) -> FastDPOTrainer:
    """model, train_dataset: tiny ones where None; options: further arguments of the trainer; settings: of its config,
    over `QUIET`."""
    return FastDPOTrainer(
        tiny_model() if model is None else model,
        args=FastDPOConfig(output_dir=str(folder), **{**QUIET, **settings}),
        train_dataset=tiny_rows(8) if train_dataset is None else train_dataset,
        **{"processing_class": TOKENIZER, **(options or {})},
    )
