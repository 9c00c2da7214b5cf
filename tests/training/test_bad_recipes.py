"""Recipes: what is read of the files that people have, and what is said of those that cannot be read."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import transformers
import yaml
from tiny import save_inputs

pytest.importorskip("datasets")

from dpo_fast.cli import main
from dpo_fast.training import launch, outcome
from dpo_fast.training.aliases import OTHERWISE, RENAMED, hint_for
from dpo_fast.training.config import FastDPOConfig
from dpo_fast.training.keys import keys_of
from dpo_fast.training.sources import BadInput

KEYS = keys_of(launch.Job, FastDPOConfig)
FSDP_HAS_OPTIONS = isinstance(FastDPOConfig(use_cpu=True).fsdp, list)  # in transformers 5.6

BASE = "model: m\ndataset: d.jsonl\nuse_cpu: true\n"


def read(tmp_path, text, *options):
    (tmp_path / "recipe.yaml").write_text(BASE + text)
    return launch.read_job([str(tmp_path / "recipe.yaml"), *options])


def plain(value):
    """An enum as its name."""
    return list(map(plain, value)) if isinstance(value, list) else getattr(value, "value", value)


READ = {
    # null means none
    "max_length: null": dict(max_length=None),
    "max_length: ~": dict(max_length=None),
    "max_length:": dict(max_length=None),
    "lora_r: null": dict(lora_r=None),
    "loss_weights: null": dict(loss_weights=None),
    "max_length: None": dict(max_length=None),
    "eval_steps: NULL": dict(eval_steps=None),
    "run_name: none": dict(run_name=None),
    "run_name: 'none'": dict(run_name="none"),
    "report_to: null": dict(report_to=[]),
    "debug:": dict(debug=[]),
    "eval_dataset: ''": dict(eval_dataset=None),
    # no means no
    "save_strategy: no": dict(save_strategy="no"),
    "eval_strategy: 'no'": dict(eval_strategy="no"),
    "logging_strategy: off": dict(logging_strategy="no"),
    "save_strategy: false": dict(save_strategy="no"),
    "include_num_input_tokens_seen: no": dict(include_num_input_tokens_seen="no"),
    "include_num_input_tokens_seen: on": dict(include_num_input_tokens_seen="all"),
    "disable_dropout: no": dict(disable_dropout=False),
    "trust_remote_code: yes": dict(trust_remote_code=True),
    "disable_dropout: 'false'": dict(disable_dropout=False),
    # lists and single values
    "report_to: [tensorboard, wandb]": dict(report_to=["tensorboard", "wandb"]),
    "report_to: [wandb]": dict(report_to=["wandb"]),
    "report_to: none": dict(report_to=[]),
    "report_to: [none]": dict(report_to=[]),
    "report_to: []": dict(report_to=[]),
    "optim_target_modules: all-linear": dict(optim_target_modules="all-linear"),
    "optim_target_modules: '[qk]_proj'": dict(optim_target_modules="[qk]_proj"),
    "debug: [underflow_overflow]": dict(debug=["underflow_overflow"]),
    "fsdp: [full_shard, auto_wrap]": dict(fsdp=["full_shard", "auto_wrap"] if FSDP_HAS_OPTIONS else True),
    "fsdp: yes": dict(fsdp=["full_shard"] if FSDP_HAS_OPTIONS else True),
    "fsdp: ''": dict(fsdp=[] if FSDP_HAS_OPTIONS else None),
    "loss_type: ipo": dict(loss_type=["ipo"]),
    "loss_type: [sigmoid, sft]": dict(loss_type=["sigmoid", "sft"]),
    "loss_type: [sigmoid, sft]\nloss_weights: [1, 5e-1]": dict(loss_weights=[1.0, 0.5]),
    "optim_target_modules: [q_proj, v_proj]": dict(optim_target_modules=["q_proj", "v_proj"]),
    "lora_target_modules: q_proj": dict(lora_target_modules=["q_proj"]),
    "extra_metrics: []": dict(extra_metrics=[]),
    # numbers as YAML 1.1 reads them
    "learning_rate: 5e-7": dict(learning_rate=5e-7),
    "learning_rate: '1e-6'": dict(learning_rate=1e-6),
    "beta: 1": dict(beta=1.0),
    "max_steps: 1e3": dict(max_steps=1000),
    "seed: '7'": dict(seed=7),
    "ddp_timeout: 1_800": dict(ddp_timeout=1800),
    "max_grad_norm: .inf": dict(max_grad_norm=float("inf")),
    # names as they are written, not as YAML 1.1 reads them
    "run_name: 2026": dict(run_name="2026"),
    "run_name: 0123": dict(run_name="0123"),
    "run_name: 12:30": dict(run_name="12:30"),
    "run_name: 2026-01-02": dict(run_name="2026-01-02"),
    "run_name: on": dict(run_name="on"),
    "run_name: 1.10": dict(run_name="1.10"),
    "lora_target_modules: [yes, 0x10]": dict(lora_target_modules=["yes", "0x10"]),
    # anchors and merges
    "beta: &b 0.5\nlabel_smoothing: *b": dict(beta=0.5, label_smoothing=0.5),
    "model_init_kwargs: &m {dtype: auto}\nchat_template_kwargs:\n  <<: *m\n  dtype: x": dict(
        chat_template_kwargs={"dtype": "x"}
    ),
    "resume_from_checkpoint: true": dict(resume_from_checkpoint=True),
    # mappings
    "model_init_kwargs: {dtype: bfloat16}": dict(model_init_kwargs={"dtype": "bfloat16"}),
    "lr_scheduler_kwargs: {min_lr: 1e-8}": dict(lr_scheduler_kwargs={"min_lr": 1e-8}),
    "lr_scheduler_kwargs: {a: [5E-7, '5e-7', 2026-01-02]}": dict(
        lr_scheduler_kwargs={"a": [5e-7, "5e-7", "2026-01-02"]}
    ),
    "gradient_checkpointing_kwargs:\n  use_reentrant: False": dict(
        gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "lora_kwargs: {use_dora: yes}": dict(lora_kwargs={"use_dora": True}),
    "chat_template_kwargs: {enable_thinking: false}": dict(chat_template_kwargs={"enable_thinking": False}),
    "chat_template_kwargs: '{\"enable_thinking\": false}'": dict(chat_template_kwargs={"enable_thinking": False}),
}


@pytest.fixture(autouse=True)
def verbosity():
    """Recipes set log_level, which is of the whole process: the tests after them get theirs back."""
    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("text", READ)
def test_values_are_what_they_mean(tmp_path, text):
    job, config = read(tmp_path, text)
    for key, wanted in READ[text].items():
        assert plain(getattr(job if hasattr(job, key) else config, key)) == wanted


OPTIONS = {
    ("--max_length", "None"): dict(max_length=None),
    ("--max_length=null",): dict(max_length=None),
    ("--lora_r", "none"): dict(lora_r=None),
    ("--report_to", "none"): dict(report_to=[]),
    ("--report_to", "tensorboard", "wandb"): dict(report_to=["tensorboard", "wandb"]),
    ("--bf16",): dict(bf16=True),
    ("--bf16", "no"): dict(bf16=False),
    ("--save-strategy", "no"): dict(save_strategy="no"),
    ("--loss_weights", "1", "0.5", "--loss_type", "sigmoid", "sft"): dict(loss_weights=[1.0, 0.5]),
    ("--loss_type", '["sigmoid", "sft"]'): dict(loss_type=["sigmoid", "sft"]),
    ("--model_init_kwargs", '{"dtype": "auto"}'): dict(model_init_kwargs={"dtype": "auto"}),
    ("--model_init_kwargs", "{dtype: auto}"): dict(model_init_kwargs={"dtype": "auto"}),
    ("--lr_scheduler_kwargs", '{"min_lr": 1e-8}'): dict(lr_scheduler_kwargs={"min_lr": 1e-8}),
    ("--lora_target_modules", "[q_proj, k_proj]"): dict(lora_target_modules=["q_proj", "k_proj"]),
    ("--no_disable_dropout",): dict(disable_dropout=False),
    ("--no-bf16", "--beta", "0.3"): dict(bf16=False, beta=0.3),
    ("--max_steps", "-1"): dict(max_steps=-1),
    ("--eval_dataset", ""): dict(eval_dataset=None),
    ("--output_dir", "-x"): dict(output_dir="-x"),
    ("--beta", "0.3", "--beta", "0.4"): dict(beta=0.4),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_win_and_mean_the_same(tmp_path, options):
    job, config = read(tmp_path, "beta: 0.2\nmax_length: 5\nlora_r: 3\nreport_to: all\nloss_type: ipo", *options)
    for key, wanted in OPTIONS[options].items():
        assert plain(getattr(job if hasattr(job, key) else config, key)) == wanted


# text of the file -> what the message names
BAD = {
    "beta: much": "recipe.yaml: beta must be a number, got 'much'",
    "beta: [0.1, 0.2]": r"beta must be a number, got \[0.1, 0.2\]",
    "beta: null": "beta must be a number, got null; leave it out for its default",
    "fp16:": "fp16 must be true or false, got null",
    "beta: true": "beta must be a number, got 'true'",
    "beta: .nan": "beta must be a number, got '.nan'",
    "beta: 1/3": "beta must be a number, got '1/3'",
    "beta: {a: 1}": "beta must be a number, got {'a': 1}",
    "beta: -1": "beta must be positive",
    "max_steps: 1.5": "max_steps must be a whole number, got '1.5'",
    "max_steps: 0o17": "max_steps must be a whole number, got '0o17'",
    "max_length: long": "max_length must be a whole number or null, got 'long'",
    "max_length: 0": "max_length must be at least 1",
    "bf16: auto": "bf16 must be true or false or null, got 'auto'; null chooses by the device",
    "disable_dropout: 2": "disable_dropout must be true or false, got '2'",
    "loss_type: sigmod": "sigmod",
    "loss_type: {sigmoid: 1}": "loss_type must be a list of text, got {'sigmoid': 1}",
    "loss_weights: [1, x]": r"loss_weights must be a list of numbers or null, got \[1, x\]",
    "loss_weights: [1, [2]]": "loss_weights must be a list of numbers or null",
    "report_to: [tensorboard, null]": "report_to must be text or a list of text or null, got .*null",
    "lora_target_modules: &a [*a]": "lora_target_modules must be a list of text",
    "layout: packed": "layout must be one of auto, shared_prefix, padded, got 'packed'",
    "truncation_mode: keep-end": "truncation_mode must be one of .*, got 'keep-end'; did you mean keep_end",
    "save_strategy: sometimes": "save_strategy must be one of no, steps, epoch, best, got 'sometimes'",
    "save_strategy: yes": "save_strategy must be one of no, steps, epoch, best, got 'yes'",
    "lr_scheduler_type: cosin": "lr_scheduler_type must be one of .*did you mean cosine",
    "optim: adamw_hf": "optim must be one of .*, got 'adamw_hf'; did you mean",
    "model: ''": "model must be text, got ''",
    "model_init_kwargs: bfloat16": "model_init_kwargs must be a mapping, as in {key: value}, or null, got 'bfloat16'",
    "model_init_kwargs: '{dtype'": "model_init_kwargs must be a mapping",
    "model_init_kwargs: &a {x: *a}": "model_init_kwargs must be a mapping as JSON has them: Circular",
    "fsdp_config: none.json": "fsdp_config must be .*the path of a JSON file that is there or null, got 'none.json'",
    "accelerator_config: {evn_batches: true}": "unexpected keyword argument 'evn_batches'",
    "lora_r: 0": "lora_r must be at least 1, got 0",
    "sample_tokens: 0": "sample_tokens must be at least 1, got 0",
    "samples: -1": "samples must be at least 0, got -1",
    "per_device_train_batch_size: 0": "per_device_train_batch_size must be at least 1, got 0",
    "gradient_accumulation_steps: 0": "gradient_accumulation_steps must be at least 1, got 0",
    "dataloader_num_workers: -1": "dataloader_num_workers must be at least 0, got -1",
    "num_train_epochs: 0": "num_train_epochs must be a finite number above 0, got 0",
    "learning_rate: .inf": "learning_rate must be a finite number",
    "learning_rate: -1e-3": "learning_rate must be a finite number",
    "chat_template_kwargs: [1]": "chat_template_kwargs must be a mapping",
    "beta: 0.1\nlora_r: 2\nbeta: 0.2": "recipe.yaml: the key 'beta' comes twice, in lines 4 and 6",
    "model_init_kwargs:\n  dtype: auto\n  dtype: auto": "the key 'dtype' comes twice, in lines 5 and 6",
    "beta: !!python/object/apply:os.system [ls]": "is not YAML: line 4 has the tag .*python",
    "beta: !secret x": "is not YAML: line 4 has the tag !secret",
    "beta: [1": "is not YAML",
    "beta: 0.1\n---\nbeta: 0.2": "is not YAML",
    "betta: 1": "unknown key 'betta'; did you mean beta",
    "learning-rate: 1": "unknown key 'learning-rate'; did you mean learning_rate",
    "0.1: 1": "unknown key '0.1'; dpo-fast train --help lists all keys",
    "torch_dtype: float16": "unknown key 'torch_dtype'; put dtype: float16 into model_init_kwargs",
    "torch_dtype: null": "unknown key 'torch_dtype'; leave it out",
    "load_in_4bit: false": "unknown key 'load_in_4bit'; leave it out",
    "micro_batch_size: 2": "write per_device_train_batch_size",
    "cutoff_len: 2": "write max_length",
    "lora_rank: 8": "write lora_r",
    "padding_free: true": "leave it out: layout: auto packs",
    "rpo_alpha: 0.5": r"write loss_type: \[sigmoid, sft\] and loss_weights: \[1.0, 0.5\]",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_values_are_named(tmp_path, text):
    if text.startswith("model:"):
        (tmp_path / "recipe.yaml").write_text(text + "\ndataset: d")
        with pytest.raises(BadInput, match=BAD[text]):
            launch.read_job([str(tmp_path / "recipe.yaml")])
        return
    with pytest.raises(BadInput, match=BAD[text]):
        read(tmp_path, text)


# options -> what the message names
BAD_OPTIONS = {
    ("--beta",): "--beta needs a value: a number",
    ("--beta", "1", "2"): "unexpected '2': beta takes one value, got '1 2'",
    ("--beta", "0.1", "more.yaml"): "unexpected 'more.yaml': .*; the YAML file comes first",
    ("--learning_rate", "1e-6,"): "^learning_rate must be a number, got '1e-6,'",
    ("--learning_rate=nan",): "learning_rate must be a number, got 'nan'",
    ("--disable_dropout", "maybe"): "disable_dropout must be true or false, got 'maybe'",
    ("--max_length", "Nothing"): "max_length must be a whole number or null, got 'Nothing'",
    ("--beta", "None"): "beta must be a number, got 'None'; leave it out",
    ("--model_init_kwargs", '{"dtype": '): "model_init_kwargs must be a mapping, as in {key: value}, or null",
    ("-beta", "1"): "unexpected '-beta'; options begin with two dashes",
    ("x",): "unexpected 'x'",
    ("--",): "unexpected '--'",
    ("--config", "x.yaml"): "unknown key 'config'; write the YAML file as the first argument, without a key",
    ("--no_samples",): "unknown key 'no_samples'; write samples: false|did you mean",
    ("--model=",): "model must be text, got ''$",
}


@pytest.mark.parametrize("options", BAD_OPTIONS)
def test_bad_options_are_named(tmp_path, options):
    with pytest.raises(BadInput, match=BAD_OPTIONS[options]):
        read(tmp_path, "", *options)


def test_all_unknown_keys_and_all_bad_values_are_named_at_once(tmp_path):
    with pytest.raises(BadInput) as error:
        read(
            tmp_path, "model_name_or_path: m\nuse_peft: true\nbeta: much\nqqq: 1", "--dataset_name", "d", "--bf16", "x"
        )
    for said in (
        "unknown keys 'model_name_or_path' (write model), 'use_peft' (set lora_r, ",
        ", 'qqq'; ",
        "unknown key 'dataset_name'; write dataset",
        "beta must be a number, got 'much'",
        "bf16 must be true or false or null, got 'x'",
    ):
        assert said in str(error.value)
    assert "\n" not in str(error.value)


# Keys that transformers 5.6 has and later versions have not
REMOVED_LATER = {"warmup_ratio", "logging_dir"}


def test_hints_lead_to_keys_that_there_are():
    for alias in {**RENAMED, **OTHERWISE}:
        assert alias not in KEYS or alias in REMOVED_LATER, alias
        hint = hint_for(alias, "1")
        assert re.match("write |put |set |leave it out|name |not ", hint) and "{value}" not in hint and "%" not in hint
        named = re.findall(r"(?:write|into|set) ([a-z_]+(?:_[a-z]+)*)(?=[:,]| |$)", hint)
        unknown = set(named) - set(KEYS) - {"a", "as", "the", "it", "or", "quantization_config", "variables"}
        assert not unknown, (alias, hint, unknown)


def test_files_and_options_without_a_key(tmp_path):
    with pytest.raises(BadInput, match="missing: --model, --dataset"):
        launch.read_job(["--beta", "0.1"])
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(BadInput, match="latin.yaml cannot be read as UTF-8 text"):
        launch.read_job([str(tmp_path / "latin.yaml")])
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    with pytest.raises(BadInput, match="empty.yaml must hold keys and values, .* got nothing"):
        launch.read_job([str(tmp_path / "empty.yaml")])
    (tmp_path / "bom.yaml").write_text("\ufeffmodel: ~/m\ndataset: d\nuse_cpu: yes\n", encoding="utf-8")
    job, config = launch.read_job([str(tmp_path / "bom.yaml")])
    assert job.model == str(Path("~/m").expanduser()) and config.output_dir == str(Path("runs/bom"))


def test_a_short_file_that_unfolds_into_gigabytes_is_refused(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"  a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(BadInput, match="model_init_kwargs is longer than a million characters"):
        read(tmp_path, "model_init_kwargs:\n  " + "\n".join(levels))


def test_the_report_shows_what_was_written_and_no_secrets(tmp_path):
    job, _ = read(
        tmp_path, "learning_rate: 5e-7\nmax_length: ~\nloss_weights: [1.0]\nhub_token: hf_a",
        "--model_init_kwargs", '{"token": "hf_b", "dtype": "auto"}', "--save_strategy", "no",
    )  # fmt: skip
    assert (job.given["learning_rate"], job.given["max_length"], job.given["loss_weights"]) == ("5e-7", "null", "1.0")
    assert job.given["save_strategy"] == "no" and job.given["output_dir"] == str(Path("runs/recipe"))
    assert "hf_" not in str(job.given) and '"dtype": "auto"' in job.given["model_init_kwargs"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with a tiny model and twenty pairs."""
    folder = tmp_path_factory.mktemp("here")
    save_inputs(folder, 20)
    return folder


@pytest.fixture
def model(here, tmp_path):
    return dict(model=str(here / "model"), dataset=str(here / "pairs.jsonl"), output_dir=str(tmp_path / "out"))


def without(*packages):
    """As if packages were not installed, for transformers' look at them."""

    def patch(monkeypatch):
        from transformers.integrations import integration_utils

        found = integration_utils.get_available_reporting_integrations()
        left = [name for name in found if name not in packages]
        monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: left)

    return patch


# what is set -> what the message names, before the model is looked at
REFUSED_EARLY = {
    "a logger that is none": ({"report_to": ["no_such"]}, "report_to must be none, all, or of .*wandb, got 'no_such'"),
    "loggers in one text": ({"report_to": "wandb,mlflow"}, "report_to must be none, all, or of .* got 'wandb,mlflow'"),
    "a logger": ({"report_to": "wandb"}, "report_to: wandb needs a package that is not here: pip install wandb"),
    "the second logger": ({"report_to": ["tensorboard", "wandb"]}, "pip install tensorboard"),
    "a schedule that needs more": ({"lr_scheduler_type": "cosine_with_min_lr"}, "cosine_with_min_lr .*min_lr_rate"),
    "a schedule's number": ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-9}, "polynomial .*lr_end"),
    "a schedule's keyword": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 1e-8}},
        "lr_scheduler_type=cosine with lr_scheduler_kwargs={'min_lr': 1e-08}: .*'min_lr'",
    ),
    "an optimizer's package": ({"optim": "adamw_anyprecision"}, "optim=adamw_anyprecision: .*torchdistx"),
    "an optimizer's arguments": ({"optim": "sgd", "optim_args": "momentum"}, "optim_args must be as in"),
    "an optimizer's number": ({"optim": "sgd", "optim_args": "momentum=x"}, "optim=sgd: .*'x'"),
    "no data to evaluate on": ({"eval_strategy": "steps"}, "eval_strategy needs data to evaluate on: set eval_dataset"),
    "none at the start either": ({"eval_on_start": True}, "eval_on_start needs data to evaluate on"),
    "Liger's layers on the CPU": ({"use_liger_kernel": True}, "use_liger_kernel needs"),
    "a checkpoint that is none": ({"resume_from_checkpoint": "nowhere"}, "resume_from_checkpoint must be .*'nowhere'"),
    "no checkpoint yet": ({"resume_from_checkpoint": True}, "there is no run to go on with"),
    "an adapter without a rank": ({"lora_alpha": 8, "lora_dropout": 0.1}, "lora_alpha, lora_dropout: .* lora_r"),
    "an adapter's keyword": ({"lora_r": 2, "lora_kwargs": {"dora": 1}}, "lora_kwargs: dora is not of peft.LoraConfig"),
}


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_what_would_end_the_run_later_is_said_before_anything_is_loaded(tmp_path, monkeypatch, name):
    changes, said = REFUSED_EARLY[name]
    if "lora_kwargs" in changes:
        pytest.importorskip("peft")
    without("wandb", "tensorboard", "mlflow")(monkeypatch)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("not looked at")
    base = {"model": str(tmp_path / "model"), "dataset": "d.jsonl", "use_cpu": True, "output_dir": str(tmp_path / "o")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**base, **changes}))
    job, config = launch.read_job([str(tmp_path / "recipe.yaml")])
    with pytest.raises(BadInput, match=said):
        launch.make_trainer(job, config)


# what is set -> what the message names, once the model is loaded
REFUSED_LATE = {
    "an attention": ({"model_init_kwargs": {"attn_implementation": "flash_attention_2"}}, 2, "[Ff]lash|version"),
    "a keyword of the model": ({"model_init_kwargs": {"foo": 1}}, 2, "model_init_kwargs: .*'foo'"),
    "the model's own folder": ({"output_dir": "{model}"}, 2, "output_dir: .* is the model's own folder"),
    "a file as a folder": ({"output_dir": "{dataset}"}, 2, "output_dir: .* is a file"),
    "a batch that is never full": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 64}, 2, "no step was trained: 20 pairs",
    ),
    "a metric that is none": (
        {"eval_dataset": "{dataset}", "metric_for_best_model": "f1"}, 2, "metric_for_best_model .*loss, .*'f1'",
    ),
    "a keyword of torch": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}}, 1, "[Uu]nexpected keyword .*foo",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_LATE)
def test_what_a_run_ends_with_is_one_sentence(model, tmp_path, capsys, name):
    changes, status, said = REFUSED_LATE[name]
    changes = {key: value.format(**model) if isinstance(value, str) else value for key, value in changes.items()}
    values = {**model, "use_cpu": True, "report_to": "none", "max_steps": 1, "samples": 0, "log_level": "error"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**values, **changes}))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "recipe.yaml")]) == status
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dpo-fast train: ")]
    assert re.search(said, sentence)


@pytest.mark.parametrize("change, said", [("sizes", "do not have the sizes"), ("cut", "weights cannot be read")])
def test_weights_that_are_no_use_are_one_sentence(here, model, tmp_path, capsys, change, said):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (here / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    if change == "cut":
        weights = broken / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    else:
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(
            json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]})
        )
    options = [f"--{key}={value}" for key, value in {**model, "model": broken}.items()]
    assert main(["train", *options, "--use_cpu", "--report_to", "none"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("bug", [TypeError, RuntimeError, KeyError, AttributeError, ZeroDivisionError, ValueError])
def test_a_bug_keeps_its_trace(model, monkeypatch, bug):
    """An operation that fails, in making the trainer or in training; what a `raise` says is for the user."""
    operations = {
        TypeError: lambda *_, **__: 1 + "", RuntimeError: lambda *_, **__: {}.popitem(),
        KeyError: lambda *_, **__: {}[0],
        AttributeError: lambda *_, **__: None.x, ZeroDivisionError: lambda *_, **__: 1 // 0,
        ValueError: lambda *_, **__: int("x"),
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in model.items()]
    places = [(outcome, "train")] if bug is ValueError else [(outcome, "train"), (launch, "FastDPOTrainer")]
    for owner, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, operations[bug])
            with pytest.raises(KeyError if bug is RuntimeError else bug):
                main(["train", *options, "--use_cpu", "--report_to", "none"])


@pytest.mark.parametrize(
    "error, status, said",
    [
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), 1, "the package pyyaml is missing: pip install"),
        (ModuleNotFoundError("No module named 'a_b'", name="a_b.c"), 1, "the package a-b is missing"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(model, monkeypatch, capsys, error, status, said):
    def train(*_):
        raise error

    monkeypatch.setattr(outcome, "train", train)
    options = [f"--{key}={value}" for key, value in model.items()]
    assert main(["train", *options, "--use_cpu", "--report_to", "none", "--log_level", "error"]) == status
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_module_of_ours_that_is_missing_is_a_bug(model, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'dpo_fast.nothing'", name="dpo_fast.nothing")

    monkeypatch.setattr(launch, "FastDPOTrainer", missing)
    with pytest.raises(ModuleNotFoundError):
        main(["train", *[f"--{key}={value}" for key, value in model.items()], "--use_cpu"])


# Recipes with the keys of those that are published, and what a reader of our messages changes: (what is said, what
# the reader then sets; None: takes out). All that is said about unknown keys is followed by `follow`, to the letter.
RECIPES = {
    "alignment-handbook, all weights": (
        """
model_name_or_path: {model}
torch_dtype: null
dataset_mixture:
  datasets:
    - {{id: someone/preferences, config: default, split: train_prefs, columns: [chosen, rejected], weight: 1.0}}
  test_split_size: 2000
  seed: 0
dataset_num_proc: 1
beta: 0.01
do_eval: true
eval_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: zephyr
learning_rate: 5.0e-7
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_torch
per_device_train_batch_size: 8
per_device_eval_batch_size: 8
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
""",
        [
            (
                "'dataset_mixture' (name one dataset (a file, a saved data set or a hub id) with dataset",
                {"dataset": ...},
            ),
            ("eval_strategy needs data to evaluate on: set eval_dataset", {"eval_dataset": ...}),
        ],
    ),
    "alignment-handbook, an adapter on four bits": (
        """
model_name_or_path: {model}
torch_dtype: float16
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
- q_proj
- k_proj
- v_proj
dataset_mixer:
  someone/preferences: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 1
bf16: true
beta: 0.01
evaluation_strategy: no
gradient_checkpointing: true
learning_rate: 5e-6
lr_scheduler_type: cosine
optim: paged_adamw_32bit
report_to:
- tensorboard
- wandb
""",
        [
            ("'dataset_mixer' (name one dataset", {"dataset": ..., "dataset_split": None, "eval_split": None}),
            ("report_to: tensorboard needs a package that is not here", {"report_to": "none"}),
            ("optim=paged_adamw_32bit: You need to install `bitsandbytes`", {"optim": "adamw_torch"}),
            ("bitsandbytes", {"model_init_kwargs": {"dtype": "float32"}}),
        ],
    ),
    "SmolLM3 with a schedule, Liger and flash attention": (
        """
model_name_or_path: {model}
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
dataset_name: {dataset}
do_eval: false
eval_strategy: 'no'
gradient_accumulation_steps: 2
learning_rate: 1.0e-06
logging_strategy: steps
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {{min_lr_rate: 1e-1}}
max_grad_norm: 0.2
beta: 0.05
loss_type: apo_zero
max_length: null
overwrite_output_dir: true
padding_free: true
report_to: [wandb]
save_strategy: no
use_liger_kernel: true
""",
        [
            ("'padding_free' (leave it out", {}),
            ("report_to: wandb needs a package", {"report_to": None}),
            ("use_liger_kernel needs", {"use_liger_kernel": None}),
            ("lash", {"model_init_kwargs": {"revision": "main", "dtype": "float32"}}),
        ],
    ),
    "LLaMA-Factory": (
        """
model_name_or_path: {model}
trust_remote_code: true
stage: dpo
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj
pref_beta: 0.1
pref_loss: sigmoid
dataset: dpo_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 1
logging_steps: 10
plot_loss: true
overwrite_output_dir: true
learning_rate: 5.0e-6
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
ddp_timeout: 180000000
resume_from_checkpoint: null
""",
        [
            ("'finetuning_type' (leave it out to train all weights, or set lora_r", {"dataset_split": None}),
            ("dpo_en_demo", {"dataset": ...}),
        ],
    ),
    "Axolotl": (
        """
base_model: {model}
model_type: LlamaForCausalLM
tokenizer_type: AutoTokenizer
load_in_8bit: false
load_in_4bit: false
strict: false
rl: dpo
chat_template: chatml
datasets:
  - {{path: {dataset}, split: train, type: chatml.intel}}
dataset_prepared_path:
val_set_size: 0.0
adapter: lora
lora_model_dir:
sequence_len: 2048
sample_packing: false
lora_r: 4
lora_alpha: 32
lora_target_linear: true
lora_fan_in_fan_out:
wandb_project: mine
wandb_entity:
gradient_accumulation_steps: 8
micro_batch_size: 1
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
learning_rate: 5e-6
train_on_inputs: false
group_by_length: false
bf16: auto
fp16:
tf32:
gradient_checkpointing: true
early_stopping_patience:
resume_from_checkpoint:
local_rank:
flash_attention: true
warmup_steps: 1
evals_per_epoch: 0
saves_per_epoch: 1
debug:
deepspeed: deepspeed_configs/zero2.json
weight_decay: 0.0
""",
        [
            ("bf16 must be true or false or null, got 'auto'; null chooses", {"bf16": "null"}),
            ("fp16 must be true or false, got null; leave it out", {"fp16": None}),
            ("local_rank must be a whole number, got null; leave it out", {"local_rank": None}),
            ("deepspeed must be .*the path of a JSON file that is there", {"deepspeed": None}),
            ("'datasets' (name one dataset", {"dataset": ..., "eval_dataset": ...}),
            ("'evals_per_epoch'", {"eval_strategy": "no"}),
            ("lash", {"model_init_kwargs": None}),
        ],
    ),
}


def follow(message: str, recipe: dict) -> None:
    """Do what a message says about unknown keys, and nothing else."""
    for key, hint in re.findall(r"'(\w+)' \((.*?)\)(?=, '|; dpo-fast train --help)", message):
        if key not in recipe:
            continue
        value = recipe.pop(key)
        if renamed := re.fullmatch(r"write (\w+)", hint):
            recipe[renamed[1]] = value
        elif nested := re.match(r"put (\w+): (.*) into (\w+)$", hint):
            recipe.setdefault(nested[3], {})[nested[1]] = yaml.safe_load(nested[2])
        else:
            for name, said in re.findall(r"(?:write|set|and) (\w+)(?:, for example \w+)?: ([^,\s]+)", hint):
                if name in KEYS:
                    recipe.setdefault(name, said)


@pytest.mark.thorough
@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_trains_once_our_messages_are_followed(here, model, tmp_path, monkeypatch, name):
    """Each message is met; the ones about packages only where these are not installed."""
    pytest.importorskip("peft")
    without("wandb", "tensorboard")(monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text, reader = RECIPES[name]
    recipe = yaml.load(text.format(**model), yaml.BaseLoader)
    path, met, messages = tmp_path / "recipe.yaml", set(), []
    for _ in range(8):
        path.write_text(yaml.safe_dump(recipe).replace("''", "").replace("'", ""))
        try:
            job, config = launch.read_job(
                [str(path), "--use_cpu", "--max_steps", "1", "--output_dir", model["output_dir"]]
            )
            trainer = launch.make_trainer(job, config)
            break
        except BadInput as error:
            messages.append(str(error))
        follow(messages[-1], recipe)
        for said, changes in reader:
            if said not in met and (said in messages[-1] or re.search(said, messages[-1])):
                met.add(said)
                for key, value in changes.items():
                    recipe[key] = model["dataset"] if value is ... else value
        recipe = {key: value for key, value in recipe.items() if value is not None}
    else:
        raise AssertionError("\n".join(messages))
    trainer.train()
    assert trainer.state.global_step == 1
    assert len(messages) <= 1 + len(reader)
    asked = yaml.load(text.format(**model), yaml.BaseLoader)
    assert config.beta == float(asked.get("beta", asked.get("pref_beta", 0.1)))
    assert config.learning_rate == float(asked["learning_rate"])
    assert (job.lora_r is not None) == bool({"use_peft", "adapter", "lora_rank"} & set(asked))
    print("\n".join(f"run {number}: {message}" for number, message in enumerate(messages, 1)))


def test_twenty_pairs_with_all_defaults_give_a_report_with_numbers(model, capsys):
    options = [f"--{key}={value}" for key, value in model.items()]
    assert main(["train", *options, "--use_cpu", "--report_to", "none"]) == 0
    results = json.loads((Path(model["output_dir"]) / "results.json").read_text())
    logged = [log["step"] for log in results["log"] if "loss" in log]
    assert logged[0] == 1 and logged[-1] == results["steps"] and len(logged) >= 2
    assert abs(results["log"][0]["loss"] - 0.6931) < 1e-3
    table = capsys.readouterr().out
    assert re.search(r"^ +loss +0\.6931 +0\.\d{4}$", table, re.MULTILINE) and "rewards/margins" in table


@pytest.mark.thorough
def test_a_run_is_taken_up_again(model, tmp_path):
    """resume_from_checkpoint: true goes on from the last checkpoint; the steps before it are not trained again."""
    options = [f"--{key}={value}" for key, value in model.items()]
    options += ["--use_cpu", "--report_to", "none", "--samples", "0", "--save_steps", "1", "--max_steps"]
    assert main(["train", *options, "1"]) == 0
    assert main(["train", *options, "3", "--resume_from_checkpoint"]) == 0
    results = json.loads((Path(model["output_dir"]) / "results.json").read_text())
    assert results["steps"] == 3
    assert sorted(path.name for path in Path(model["output_dir"]).glob("checkpoint-*"))[0] == "checkpoint-1"


def test_every_key_can_be_set(tmp_path):
    """Each with its own default, of the file: nothing that the dataclasses take is refused by its type."""
    for data_class in (launch.Job, FastDPOConfig):
        for field in dataclasses.fields(data_class):
            default = field.default if field.default is not dataclasses.MISSING else None
            if field.init and isinstance(default, (bool, int, float, str)) and field.name not in BASE:
                read(tmp_path, yaml.safe_dump({field.name: getattr(default, "value", default)}))
