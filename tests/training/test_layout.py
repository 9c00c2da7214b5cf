"""Which layout `FastDPOTrainer` chooses, and what disable_dropout reaches."""

import inspect

import pytest
import torch
from tiny import tiny_model, tiny_rows, why_not_nemotron
from trainers import fast_trainer

datasets = pytest.importorskip("datasets")


pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore::FutureWarning")]


def trainer_of(tmp_path, model, ref_model=None, **options):
    settings = {"max_steps": 2, "per_device_train_batch_size": 3, **options}
    data = datasets.Dataset.from_list(tiny_rows(6, seed=4))
    return fast_trainer(tmp_path, model, data, options=dict(ref_model=ref_model), **settings)


def losses(tmp_path, model, **options):
    trainer = trainer_of(tmp_path, model, **options)
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


WRONG = {
    "stablelm": (dict(num_key_value_heads=4), "does not hand the layout"),
    "nemotron": (dict(head_dim=8), why_not_nemotron()),
    "falcon": ({}, "depends on the name of its attention implementation"),
    "phimoe": (
        dict(num_local_experts=4, sliding_window=6, router_jitter_noise=0.0, router_aux_loss_coef=0.0),
        "window",
    ),
    "doge": (dict(sliding_window=6), "window"),
    "bert-generation": ({}, "differ from separate ones"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_model_that_cannot_trains_on_padded_rows(kind, tmp_path, caplog):
    options, reason = WRONG[kind]
    with caplog.at_level("WARNING", "dpo_fast"):
        found = losses(tmp_path, tiny_model(kind, **options))
    assert f"{type(tiny_model(kind, **options)).__name__}" in caplog.text and reason in caplog.text
    assert found == losses(tmp_path, tiny_model(kind, **options), layout="padded")
    assert found[0] == pytest.approx(0.693147, abs=1e-5)
    with pytest.raises(ValueError, match="layout='shared_prefix' cannot run: .*use layout='padded' or 'auto'"):
        trainer_of(tmp_path, tiny_model(kind, **options), layout="shared_prefix")


def test_a_reference_that_cannot_asks_for_padded_rows(tmp_path, caplog):
    with caplog.at_level("WARNING", "dpo_fast"):
        trainer = trainer_of(tmp_path, tiny_model(), tiny_model("stablelm", num_key_value_heads=4))
    assert trainer.data_collator.layout == "padded" and "StableLm" in caplog.text
    assert trainer_of(tmp_path, tiny_model(), tiny_model(seed=1)).data_collator.layout == "shared_prefix"


def test_noise_on_the_embeddings_asks_for_padded_rows(tmp_path, caplog):
    """NEFTune scales its noise by the length of a row, which is to be that of a sequence."""
    with caplog.at_level("WARNING", "dpo_fast"):
        trainer = trainer_of(tmp_path, tiny_model(), neftune_noise_alpha=5.0)
    assert trainer.data_collator.layout == "padded" and "neftune_noise_alpha" in caplog.text
    with pytest.raises(ValueError, match="cannot run: NEFTune"):
        trainer_of(tmp_path, tiny_model(), neftune_noise_alpha=5.0, layout="shared_prefix")


def test_a_hook_that_comes_later_sees_sequences(tmp_path):
    trainer, rows = trainer_of(tmp_path, tiny_model(), layout="auto"), []
    assert trainer.data_collator.layout == "shared_prefix"
    trainer.model.model.layers[0].register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    trainer.train()
    assert set(rows) == {6}


class Noisy(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.2, training=self.training)


def test_random_numbers_that_no_name_gives_away_are_said(tmp_path, caplog):
    quiet, noisy = tiny_model(), tiny_model()
    noisy.model.layers[1].mlp.act_fn = Noisy()
    with caplog.at_level("WARNING", "dpo_fast"):
        trainer_of(tmp_path, quiet)
        assert "draws random numbers" not in caplog.text
        trainer_of(tmp_path, noisy)
    assert "LlamaForCausalLM draws random numbers in training all the same" in caplog.text


DROPOUT = {
    "llama": dict(attention_dropout=0.3),
    "gpt2": dict(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "starcoder2": dict(residual_dropout=0.3, embedding_dropout=0.3, attention_dropout=0.3),
    "bloom": dict(n_head=4, hidden_dropout=0.3, attention_dropout=0.3),
    "gpt_bigcode": dict(n_embd=32, n_head=4, n_layer=2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
    "biogpt": dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3, activation_dropout=0.3, layerdrop=0.3),
    "xglm": dict(
        d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, dropout=0.3, attention_dropout=0.3,
        activation_dropout=0.3, layerdrop=0.3,
    ),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.3, layerdrop=0.3),
    "gpt_neox": dict(hidden_dropout=0.3, attention_dropout=0.3),
    "phi": dict(resid_pdrop=0.3, embd_pdrop=0.3, attention_dropout=0.3),
    "falcon": dict(hidden_dropout=0.3, attention_dropout=0.3),
    "gptj": dict(n_embd=32, n_head=4, n_layer=2, rotary_dim=4, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3),
}  # fmt: skip


@pytest.mark.parametrize("kind", DROPOUT)
def test_no_dropout_draws_no_random_number(kind, tmp_path, caplog):
    """Modules, numbers that layers hand to functions, and layers that are left out at random."""
    with caplog.at_level("WARNING", "dpo_fast"):
        trainer = trainer_of(tmp_path, tiny_model(kind, **DROPOUT[kind]))
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    before = torch.get_rng_state()
    first = model(batch).logps
    source = inspect.getsource(inspect.getmodule(type(model)))
    # transformers before 5.20 asks a random number whether a layer stays, also where all do
    asks = "if dropout_probability < self.layerdrop" in source and "self.layerdrop > 0" not in source
    assert asks or torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(first, model.eval()(batch).logps, atol=1e-6)
    assert "dropout" not in caplog.text
    saved = {name: value for name, value in trainer.model.config.to_dict().items() if "drop" in name}
    assert saved == {k: v for k, v in tiny_model(kind, **DROPOUT[kind]).config.to_dict().items() if "drop" in k}
