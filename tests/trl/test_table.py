"""The one table of what differs from TRL, in docs/guide.md, is that of the installed TRL and of `FastDPOConfig`."""

import dataclasses
import re
from pathlib import Path

import pytest

trl = pytest.importorskip("trl")
pytest.importorskip("datasets")

from dpo_fast import FastDPOConfig  # noqa: E402

GUIDE = Path(__file__).parents[2] / "docs" / "guide.md"
# Settings of one name and one default that mean something else, and arguments of the trainers
OTHER_MEANINGS = {
    "bf16",
    "label_smoothing",
    "disable_dropout",
    "loss_type",
    "ld_alpha",
    "precompute_ref_log_probs",
    "model_init_kwargs",
    "gradient_accumulation_steps",
}
ARGUMENTS = {"model", "ref_model", "data_collator", "compute_metrics", "peft_config", "eval_dataset", "train_dataset"}
# What transformers itself resolves to the same
SAME = {"activation_checkpointing"}


def table() -> dict[str, list[str]]:
    """Setting -> the second column, as often as it has a row."""
    text = GUIDE.read_text(encoding="utf-8").partition("## Beside TRL")[2].partition("\n## ")[0]
    found: dict[str, list[str]] = {}
    for name, theirs in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE):
        found.setdefault(name, []).append(theirs)
    return found


def defaults(config) -> dict:
    found = {}
    for field in dataclasses.fields(config):
        made = field.default_factory is not dataclasses.MISSING
        found[field.name] = field.default_factory() if made else field.default
    return found


def different() -> dict:
    """Fields of TRL's config that have another default here or are absent -> TRL's default."""
    ours = defaults(FastDPOConfig)
    theirs = defaults(trl.DPOConfig).items()
    return {name: value for name, value in theirs if name not in SAME and (name not in ours or ours[name] != value)}


@pytest.mark.skipif(not trl.__version__.startswith("1.16."), reason="the table is that of TRL 1.16")
def test_each_default_that_differs_is_in_the_table():
    rows = table()
    for name, value in different().items():
        assert name in rows, f"{name}: TRL has {value!r}, this is not in docs/guide.md"
        assert rows[name] == [f"`{value!r}`"], f"{name}: TRL has {value!r}, docs/guide.md says {rows[name]}"
    assert rows.keys() == different().keys() | OTHER_MEANINGS | ARGUMENTS


def test_a_new_difference_would_be_found(monkeypatch):
    monkeypatch.setattr(FastDPOConfig.__dataclass_fields__["beta"], "default", 0.2)
    assert different().keys() - table().keys() == {"beta"}


def test_every_field_of_trls_is_taken_or_answered(tmp_path):
    """At its default, as a script writes it out; what is not taken is answered by name, with what to do."""
    needed = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for name, value in defaults(trl.DPOConfig).items():
        options = {**needed, name: value} if name not in needed else needed
        if name in ("bf16", "gradient_checkpointing", "activation_checkpointing") or value is None:
            options = {**needed, name: None} if name in defaults(FastDPOConfig) else {**needed, name: "x"}
        try:
            FastDPOConfig(**options)
        except TypeError as error:
            assert re.search(rf"{name} \((leave it out|write|put)", str(error)), error
    for name, more in (("sync_ref_model", "dpo_fast.trl.DPOTrainer has it"), ("pad_token", "set tokenizer.pad_token")):
        with pytest.raises(TypeError, match=more):
            FastDPOConfig(**needed, **{name: "x"})
