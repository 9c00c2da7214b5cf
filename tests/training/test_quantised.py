"""Weights of few bits under an adapter: what a recipe says of them, and that they go on training on a CPU."""

import importlib.util
import logging
import math
import types

import pytest
import torch
import transformers
from tiny import tiny_model, tiny_rows
from trainers import TOKENIZER, fast_trainer

pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from dpo_fast import FastDPOConfig, quantised  # noqa: E402
from dpo_fast.hooks import mode  # noqa: E402
from dpo_fast.training import launch, models  # noqa: E402
from dpo_fast.training.sources import BadInput  # noqa: E402

SIZES = dict(hidden_size=64, intermediate_size=128)  # bitsandbytes' blocks are 64 wide
LORA = dict(r=4, target_modules=["q_proj", "v_proj"])


# --- on a CPU ------------------------------------------------------------------------------------------------------


class Linear4bit(torch.nn.Linear):
    """What bitsandbytes' layer does on a CPU with a kernel for 4 bits: in eval mode it turns to one that has no
    backward, and stays there until somebody asks for its state."""

    __module__ = "bitsandbytes.nn.modules"

    def __init__(self, layer: torch.nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.weight = layer.weight
        self.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=False)
        self.support_avx512bf16_for_cpu = True

    def forward(self, x):
        state = self.weight.quant_state
        if not self.training and not x.requires_grad and self.support_avx512bf16_for_cpu:
            state.packing_format_for_cpu = True
        out = super().forward(x)
        return out.detach() if state.packing_format_for_cpu else out

    def _save_to_state_dict(self, *args):
        self.weight.quant_state.packing_format_for_cpu = False
        super()._save_to_state_dict(*args)


def of_four_bits() -> torch.nn.Module:
    """Its layers are given no gradient by the embeddings, as in a model that bitsandbytes has loaded."""
    model = tiny_model().requires_grad_(False).eval()
    for layer in model.model.layers:
        for name in ("o_proj", "k_proj"):
            setattr(layer.self_attn, name, Linear4bit(getattr(layer.self_attn, name)))
        layer.mlp.down_proj = Linear4bit(layer.mlp.down_proj)
    return model


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("run_before", [False, True])
def test_layers_that_bitsandbytes_would_repack_train(tmp_path, run_before, caplog):
    model, plain = of_four_bits(), tiny_model()
    if run_before:
        model.eval()(input_ids=torch.tensor([[3, 4]]))
        assert model.model.layers[0].mlp.down_proj.weight.quant_state.packing_format_for_cpu
    found = []
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        for each in (model, plain):
            trainer = fast_trainer(
                tmp_path, each, options=dict(peft_config=peft.LoraConfig(**LORA)), learning_rate=1e-2, max_steps=2
            )
            trainer.train()
            first = losses(trainer)
            trainer.evaluate(tiny_rows(2))
            trainer.train()
            found.append(first + losses(trainer))
    assert found[0] == found[1] and len(set(found[0])) == 4
    assert ("had been run in eval mode" in caplog.text) == run_before


def test_layers_choose_one_kernel_for_all_that_is_compared():
    """Their mode is left as it is where a pass is made in another."""
    model = of_four_bits().train()
    with mode(model, training=False):
        assert not model.model.layers[0].mlp.up_proj.training and model.model.layers[0].mlp.down_proj.training


def test_what_cannot_be_put_back_is_refused():
    layer = Linear4bit(torch.nn.Linear(4, 4))
    layer.weight.quant_state = types.SimpleNamespace(packing_format_for_cpu=True)
    layer._save_to_state_dict = lambda *args: None
    with pytest.raises(ValueError, match="cannot train any more: load the model anew"):
        quantised.keep_trainable(torch.nn.Sequential(layer))


def folder_of(tmp_path) -> str:
    model = tiny_model(**SIZES)
    for p in model.parameters():
        p.data.mul_(3 if p.ndim > 1 else 1)
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_compute_dtype": "fp32"}, {"load_in_8bit": True}])
def test_bitsandbytes_itself(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    trainer = fast_trainer(
        tmp_path,
        folder_of(tmp_path),
        model_init_kwargs={"quantization_config": bits},
        options=dict(peft_config=peft.LoraConfig(**LORA), eval_dataset=tiny_rows(3)),
        learning_rate=1e-2,
        max_steps=3,
    )
    trainer.evaluate()
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6) and found[-1] < 0.692
    with pytest.raises(ValueError, match="pass peft_config=LoraConfig"):
        fast_trainer(tmp_path, folder_of(tmp_path), model_init_kwargs={"quantization_config": bits})


def test_trls_numbers_on_four_bits(tmp_path):
    """The drop-in packs, which is another order of sums: they agree as far as adapters in bfloat16 do."""
    pytest.importorskip("bitsandbytes")
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from dpo_fast.trl import DPOTrainer

    found, path = [], folder_of(tmp_path)
    for trainer_class in (trl.DPOTrainer, DPOTrainer):
        args = trl.DPOConfig(
            str(tmp_path), use_cpu=True, report_to="none", bf16=False, max_steps=3, logging_steps=1, learning_rate=1e-2,
            save_strategy="no", per_device_train_batch_size=3, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = trainer_class(
            path,
            args=args,
            train_dataset=datasets.Dataset.from_list(tiny_rows(9)),
            processing_class=TOKENIZER,
            peft_config=peft.LoraConfig(**LORA),
            quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
        )
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], abs=1e-3) and abs(found[1][-1] - found[1][0]) > 5e-3


# --- in a recipe ---------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    return lambda **options: FastDPOConfig(str(tmp_path), use_cpu=True, report_to="none", model_init_kwargs=options)


def bits_of(config):
    return models.loading_options(config)["quantization_config"]


def test_a_mapping_becomes_a_config(config, monkeypatch):
    monkeypatch.setattr(transformers.BitsAndBytesConfig, "post_init", lambda self: None)  # asks for the package
    four = bits_of(
        config(quantization_config=dict(load_in_4bit=True, bnb_4bit_compute_dtype="bf16", bnb_4bit_quant_type="nf4"))
    )
    assert isinstance(four, transformers.BitsAndBytesConfig) and four.load_in_4bit
    assert four.bnb_4bit_compute_dtype is torch.bfloat16 and four.bnb_4bit_quant_type == "nf4"
    assert bits_of(config(quantization_config=dict(quant_method="bitsandbytes", load_in_8bit=True))).load_in_8bit
    assert bits_of(config(quantization_config=four)) is four


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(quantization_config={"load_in_4bit": True, "bnb_4bit_compute_dtyp": "bf16"}), "bnb_4bit_compute_dtyp is"),
        (dict(quantization_config={"bits": 4}), "must have load_in_4bit or load_in_8bit: true, or another"),
        (dict(quantization_config={"quant_method": "bits"}), "must be one of .*got 'bits'"),
        (dict(quantization_config=4), "must be a mapping, as {load_in_4bit: true}, got 4"),
        (dict(load_in_4bit=True), "write quantization_config: {load_in_4bit: true} in place of load_in_4bit"),
    ],
)
def test_what_describes_none(config, options, message):
    with pytest.raises(ValueError, match=message):
        bits_of(config(**options))


RECIPE = """
model: {folder}
dataset: {folder}/none.jsonl
use_cpu: true
report_to: none
model_init_kwargs: {{quantization_config: {{load_in_4bit: true}}}}
"""


def refused(tmp_path, more="") -> str:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "r.yaml").write_text(RECIPE.format(folder=tmp_path) + more)
    with pytest.raises(BadInput) as error:
        launch.make_trainer(*launch.read_job([str(tmp_path / "r.yaml")]))
    return str(error.value)


@pytest.mark.parametrize("there", [True, None])
def test_a_recipe_needs_the_package_and_an_adapter(tmp_path, monkeypatch, there):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: there if name == "bitsandbytes" else found(name))
    if there:
        assert "trains an adapter, not its own weights; set lora_r" in refused(tmp_path)
        assert "none.jsonl" in refused(tmp_path, "lora_r: 4")  # the next thing that is looked at
    else:
        assert "needs the package bitsandbytes: pip install bitsandbytes" in refused(tmp_path, "lora_r: 4")


def test_both_ways_at_once(tmp_path):
    given = types.SimpleNamespace(quant_method="x")
    with pytest.raises(ValueError, match="given twice"):
        fast_trainer(
            tmp_path, "m", model_init_kwargs={"quantization_config": given}, options=dict(quantization_config=given)
        )
    with pytest.raises(ValueError, match="this one is loaded already"):
        fast_trainer(tmp_path, options=dict(quantization_config=given))
