"""Every option is checked before any work, and can be given on a command line."""

import pytest
import torch
import transformers

pytest.importorskip("datasets")

from transformers.trainer_pt_utils import AcceleratorConfig

from dpo_fast import FastDPOConfig
from dpo_fast.training import config as config_module
from dpo_fast.training.data import Truncation


def config(tmp_path, **options):
    return FastDPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, **options)


def test_defaults(tmp_path):
    args = config(tmp_path)
    assert args.learning_rate == 1e-6 and args.beta == 0.1 and args.loss_type == ["sigmoid"]
    assert args.remove_unused_columns is False
    assert args.truncation() == Truncation(max_length=1024)
    assert args.objective().names == ("sigmoid",)


def test_objective_gets_every_knob(tmp_path):
    knobs = dict(
        beta=0.3,
        label_smoothing=0.1,
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.7,
        discopop_tau=0.2,
        simpo_gamma=0.9,
        cpo_alpha=0.4,
    )
    objective = config(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **knobs).objective()
    assert objective.loss_weights == [1.0, 0.5]
    assert {name: getattr(objective.params, name) for name in vars(objective.params)} == knobs
    assert config(tmp_path, loss_type="ipo", use_weighting=True).objective().use_weighting


def test_arguments_of_others_are_all_named_with_what_they_are_called_here(tmp_path):
    unknown = dict(padding_free=True, lerning_rate=1, rpo_alpha=0.5, zzz=object())
    with pytest.raises(TypeError) as error:
        config(tmp_path, **unknown)
    for said in (
        "padding_free (leave it out: layout",
        "lerning_rate (did you mean learning_rate",
        "rpo_alpha (write loss_type: [sigmoid, sft] and loss_weights: [1.0, 0.5])",
        "zzz (unknown)",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(loss_type="dpo"), "loss must be one of sigmoid, .* got 'dpo'"),
        (dict(loss_type=["sigmoid", "ipo"], loss_weights=[1.0]), "loss weights must be 2 finite numbers"),
        (dict(beta=0.0), "beta must be positive, got 0.0"),
        (dict(label_smoothing=1.5), "label_smoothing must be in"),
        (dict(loss_type="nca_pair", f_divergence_type="forward_kl"), "does not fit loss nca_pair"),
        (dict(loss_type="aot", use_weighting=True), "sorts across pairs"),
        (dict(ld_alpha=2.0), r"ld_alpha must be in \[0, 1\] or None, got 2.0"),
        (dict(max_length=0), "max_length must be at least 1"),
        (dict(truncation_mode="left"), "truncation_mode must be one of keep_start, keep_end"),
        (dict(extra_metrics=["perplexity"]), "extra_metrics must be a list of entropy, logits, mean_token_accuracy"),
        (dict(extra_metrics="entropy"), "extra_metrics must be a list"),
        (dict(impl="cuda"), "impl must be one of auto, triton"),
        (dict(pad_to_multiple_of=0), "pad_to_multiple_of must be at least 1 or None, got 0"),
        (dict(tile_mib=0), "tile_mib must be at least 1 or None, got 0"),
        (dict(pad_to_multiple_of="eight"), "must be a whole number, 'auto' or None, got 'eight'"),
    ],
)
def test_bad_values(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_command_line(tmp_path):
    parser = transformers.HfArgumentParser(FastDPOConfig)
    line = f"--output_dir {tmp_path} --loss_type sigmoid sft --loss_weights 1 0.5 --max_length 77 --use_cpu True "
    line += '--extra_metrics entropy --model_init_kwargs {"dtype":"bfloat16"} --report_to none'
    (args,) = parser.parse_args_into_dataclasses(line.split())
    assert args.loss_type == ["sigmoid", "sft"] and args.loss_weights == [1.0, 0.5] and args.max_length == 77
    assert args.extra_metrics == ["entropy"] and args.model_init_kwargs == {"dtype": "bfloat16"}


def test_what_changes_nothing_is_taken(tmp_path):
    """TRL's defaults, as a script writes them out."""
    assert config(tmp_path, remove_unused_columns=True).remove_unused_columns is False
    for written, meant in (("auto", None), ("None", None), ("8", 8), (8, 8), (None, None)):
        assert config(tmp_path, pad_to_multiple_of=written).pad_to_multiple_of == meant


@pytest.mark.parametrize(
    "options, bf16, checkpointing",
    [
        ({}, True, True),  # as TRL's DPOConfig
        (dict(bf16=False, gradient_checkpointing=False), False, False),
        (dict(fp16=True), False, True),
        (dict(use_cpu=True), False, False),
    ],
)
def test_defaults_on_an_accelerator(tmp_path, monkeypatch, options, bf16, checkpointing):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for module in (config_module, transformers.training_args):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: True)
    args = FastDPOConfig(output_dir=str(tmp_path), report_to="none", **options)
    assert (args.bf16, args.gradient_checkpointing, args.tf32) == (bf16, checkpointing, None)


@pytest.mark.parametrize(
    "options, non_blocking",
    [
        ({}, True),
        (dict(accelerator_config={"even_batches": False}), True),
        (dict(accelerator_config={"non_blocking": False}), False),
        (dict(accelerator_config=AcceleratorConfig()), False),
        (dict(dataloader_pin_memory=False), False),  # accelerate would warn
        (dict(use_cpu=True), False),
    ],
)
def test_copies_to_an_accelerator_do_not_block_unless_asked_to(tmp_path, monkeypatch, options, non_blocking):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    for module in (config_module, transformers.training_args):
        monkeypatch.setattr(module, "is_torch_bf16_gpu_available", lambda: True)
    args = FastDPOConfig(output_dir=str(tmp_path), report_to="none", **options)
    assert args.accelerator_config.non_blocking is non_blocking
    assert args.accelerator_config.even_batches is (options.get("accelerator_config") != {"even_batches": False})


def test_an_accelerator_without_bf16_says_that_it_trains_in_float32(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(config_module, "is_torch_bf16_gpu_available", lambda: False)
    args = FastDPOConfig(output_dir=str(tmp_path), report_to="none")
    assert args.bf16 is False and args.gradient_checkpointing is True
    assert "bf16: this device has none, so training is in float32" in caplog.text


def test_defaults_on_a_cpu(tmp_path):
    args = config(tmp_path)
    assert (args.bf16, args.gradient_checkpointing) == (False, False)


@pytest.mark.parametrize("version, told", [("2.11.0+cu130", True), ("2.13.0", False)])
def test_what_an_older_torch_compiles_anew_is_said(tmp_path, monkeypatch, caplog, version, told):
    monkeypatch.setattr(torch, "__version__", version)
    options = dict(output_dir=str(tmp_path), use_cpu=True, report_to="none", torch_compile=True)
    FastDPOConfig(gradient_checkpointing=True, **options)
    assert ("each batch of packed rows is compiled anew" in caplog.text) == told
    caplog.clear()
    FastDPOConfig(gradient_checkpointing=False, **options)
    assert "compiled anew" not in caplog.text


def test_a_transformers_that_is_too_old_is_named():
    config_module.check_transformers(config_module.OLDEST_TRANSFORMERS)
    with pytest.raises(ImportError, match="FastDPOTrainer needs transformers 5.6 or newer, and 4.57.6 is installed"):
        config_module.check_transformers("4.57.6")
