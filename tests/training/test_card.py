"""README.md beside a saved model."""

import pytest
from trainers import fast_trainer

pytest.importorskip("datasets")

from dpo_fast.training import card

ROWS = [("data", "pairs | <b>"), ("loss", "sigmoid")]
LOG = [{"step": 0, "eval_loss": 0.6931}, {"step": 1, "loss": 0.6931}, {"step": 5, "loss": 0.5, "rewards/margins": 0.4}]


def trainer_in(folder, **options):
    return fast_trainer(folder, options=options, save_strategy="steps", save_steps=2, max_steps=2)


def test_card_says_what_was_trained_and_is_written_anew(tmp_path):
    text = card.write(tmp_path, "owner/base", ROWS, LOG[:2]).read_text()
    assert text.startswith("---\nlibrary_name: transformers\nbase_model: owner/base\n") and "`owner/base`" in text
    assert r"| data | pairs \| &lt;b&gt; |" in text and "rafailov2023direct" in text and "torch 2." in text
    assert "| loss | 0.6931 | 0.6931 |" in text
    (tmp_path / "README.md").write_text("my words\n" + text + "more words\n")
    text = card.write(tmp_path, "owner/base", ROWS, LOG).read_text()
    assert text.startswith("my words\n") and text.endswith("more words\n") and text.count(card.BEGIN) == 1
    assert "| loss | 0.5000 | 0.6931 |" in text and "| rewards/margins | 0.4000 |  |" in text


def test_a_path_of_this_machine_is_not_in_the_card(tmp_path):
    (tmp_path / "base").mkdir()
    text = card.write(tmp_path / "new", str(tmp_path / "base"), [], []).read_text()
    assert str(tmp_path) not in text and "base_model" not in text and "`base`" in text


@pytest.mark.thorough
def test_full_models_have_a_card_and_other_peoples_stay(tmp_path):
    trainer = trainer_in(tmp_path)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        text = (folder / "README.md").read_text()
        for said in (
            "| data | 8 pairs |",
            "| loss | sigmoid |",
            "| beta | 0.1 |",
            "frozen copy",
            "| steps | 2 of 8 pairs",
        ):
            assert said in text
    (tmp_path / "README.md").write_text("mine")
    trainer.save_model()
    trainer.create_model_card()
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.thorough
def test_an_adapters_card_keeps_the_head_of_pefts(tmp_path):
    peft = pytest.importorskip("peft")
    trainer = trainer_in(tmp_path, peft_config=peft.LoraConfig(r=2))
    trainer.train()
    for _ in range(2):
        trainer.save_model()
    text = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in text and text.count(card.BEGIN) == 1 and "the model without its adapter" in text
    assert "More Information Needed" not in text and f"# {tmp_path.name}" in text


@pytest.mark.thorough
def test_saving_shows_no_progress_bar_and_leaves_them_on(tmp_path, capsys):
    from transformers.utils import logging

    logging.enable_progress_bar()
    trainer_in(tmp_path).save_model()
    assert "Writing" not in capsys.readouterr().err and logging.is_progress_bar_enabled()
