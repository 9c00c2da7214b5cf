"""Recipes: what is read of the files that people have, and what is said of those that cannot be read."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from tiny import tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")

from dpo_fast.training import launch
from dpo_fast.training.config import FastDPOConfig
from dpo_fast.training.recipe import ALIASES, types_of
from dpo_fast.training.sources import BadInput

BASE = "model: m\ndataset: d.jsonl\nuse_cpu: true\n"


def read(tmp_path, text, *options):
    (tmp_path / "recipe.yaml").write_text(BASE + text)
    return launch.read_job([str(tmp_path / "recipe.yaml"), *options])


READ = {
    # null means none
    "max_length: null": dict(max_length=None),
    "max_length: ~": dict(max_length=None),
    "max_length:": dict(max_length=None),
    "lora_r: null": dict(lora_r=None),
    "loss_weights: null": dict(loss_weights=None),
    # no means no
    "save_strategy: no": dict(save_strategy="no"),
    "eval_strategy: 'no'": dict(eval_strategy="no"),
    "logging_strategy: off": dict(logging_strategy="no"),
    "disable_dropout: no": dict(disable_dropout=False),
    "trust_remote_code: yes": dict(trust_remote_code=True),
    "disable_dropout: 'false'": dict(disable_dropout=False),
    # lists and single values
    "report_to: [tensorboard, wandb]": dict(report_to=["tensorboard", "wandb"]),
    "report_to: [wandb]": dict(report_to=["wandb"]),
    "report_to: none": dict(report_to=[]),
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
    "run_name: 2026": dict(run_name="2026"),
    # mappings
    "model_init_kwargs: {dtype: bfloat16}": dict(model_init_kwargs={"dtype": "bfloat16"}),
    "lr_scheduler_kwargs: {min_lr: 1e-8}": dict(lr_scheduler_kwargs={"min_lr": "1e-8"}),
    "chat_template_kwargs: {enable_thinking: false}": dict(chat_template_kwargs={"enable_thinking": False}),
    "chat_template_kwargs: '{\"enable_thinking\": false}'": dict(chat_template_kwargs={"enable_thinking": False}),
}


@pytest.mark.parametrize("text", READ)
def test_values_are_what_they_mean(tmp_path, text):
    job, config = read(tmp_path, text)
    for key, wanted in READ[text].items():
        found = getattr(job if hasattr(job, key) else config, key)
        assert getattr(found, "value", found) == wanted


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
    ("--beta", "0.3", "--beta", "0.4"): dict(beta=0.4),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options_win_and_mean_the_same(tmp_path, options):
    job, config = read(tmp_path, "beta: 0.2\nmax_length: 5\nlora_r: 3\nreport_to: all\nloss_type: ipo", *options)
    for key, wanted in OPTIONS[options].items():
        found = getattr(job if hasattr(job, key) else config, key)
        assert getattr(found, "value", found) == wanted


# text of the file -> what the message names
BAD = {
    "beta: much": "beta must be a number, got 'much'",
    "beta: [0.1, 0.2]": r"beta must be a number, got \[0.1, 0.2\]",
    "beta: null": "beta must be a number, got None",
    "beta: true": "beta must be a number, got True",
    "beta: -1": "beta must be positive",
    "max_steps: 1.5": "max_steps must be a whole number, got 1.5",
    "max_length: long": "max_length must be a whole number or null, got 'long'",
    "max_length: 0": "max_length must be at least 1",
    "bf16: auto": "bf16 must be true or false .*got 'auto'",
    "loss_type: sigmod": "sigmod",
    "loss_type: {sigmoid: 1}": "loss_type must be a list, got",
    "layout: packed": "layout must be one of auto, shared_prefix, padded, got 'packed'",
    "truncation_mode: middle": "truncation_mode must be one of keep_start, keep_end, got 'middle'",
    "save_strategy: sometimes": "save_strategy must be one of no, steps, epoch, best, got 'sometimes'",
    "lr_scheduler_type: cosin": "lr_scheduler_type must be one of .*cosine",
    "model_init_kwargs: bfloat16": "model_init_kwargs must be a mapping",
    "lora_r: 0": "lora_r must be at least 1, got 0",
    "sample_tokens: 0": "sample_tokens must be at least 1, got 0",
    "samples: -1": "samples must be at least 0, got -1",
    "per_device_train_batch_size: 0": "per_device_train_batch_size must be at least 1, got 0",
    "gradient_accumulation_steps: 0": "gradient_accumulation_steps must be at least 1, got 0",
    "learning_rate: nan": "learning_rate must be a finite number",
    "learning_rate: -1e-3": "learning_rate must be a finite number",
    "chat_template_kwargs: [1]": "chat_template_kwargs must be a mapping",
    "beta: 0.1\nbeta: 0.2": "the key 'beta' comes twice",
    "run_name: &a [x]\nlabel_names: [*a, *a]": "aliases .* are not read",
    "beta: !!python/object/apply:os.system [ls]": "is not YAML",
    "beta: [1": "is not YAML",
    "betta: 1": "unknown key 'betta'; did you mean beta",
    "learning-rate: 1": "unknown key 'learning-rate'; did you mean learning_rate",
    "torch_dtype: bfloat16": "unknown key 'torch_dtype'; here it is model_init_kwargs: {dtype: bfloat16}",
    "micro_batch_size: 2": "here it is per_device_train_batch_size",
    "cutoff_len: 2": "here it is max_length",
    "lora_rank: 8": "here it is lora_r",
    "padding_free: true": "here it is layout",
}


@pytest.mark.parametrize("text", BAD)
def test_bad_values_are_named(tmp_path, text):
    with pytest.raises(BadInput, match=BAD[text]):
        read(tmp_path, text)


def test_all_unknown_keys_are_named_at_once(tmp_path):
    with pytest.raises(BadInput, match="3 unknown keys: ") as error:
        read(tmp_path, "model_name_or_path: m\nuse_peft: true", "--dataset_name", "d")
    for said in (
        "model_name_or_path (here it is model)",
        "use_peft (here it is lora_r",
        "dataset_name (here it is dataset)",
    ):
        assert said in str(error.value)


def test_hints_lead_to_keys_that_there_are():
    known = types_of(launch.Job, FastDPOConfig)
    for here, names in ALIASES.items():
        assert here.startswith("nothing") or here.partition(":")[0].partition(" ")[0].rstrip(",") in known, here
        assert not set(names.split()) & set(known), names


def test_options_without_a_key(tmp_path):
    with pytest.raises(BadInput, match="unexpected 'x'"):
        read(tmp_path, "", "x")
    with pytest.raises(BadInput, match="missing: --model, --dataset"):
        launch.read_job(["--beta", "0.1"])
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(BadInput, match="latin.yaml is not YAML"):
        launch.read_job([str(tmp_path / "latin.yaml")])


@pytest.fixture
def model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(20)))
    return dict(model=str(tmp_path / "model"), dataset=str(tmp_path / "pairs.jsonl"), output_dir=str(tmp_path / "out"))


MISSING = {
    "a logger": (dict(report_to=["no_such_logger"]), "report_to: no_such_logger needs a package"),
    "a schedule that needs more": (
        dict(lr_scheduler_type="cosine_with_min_lr"),
        "lr_scheduler_type=cosine_with_min_lr: ",
    ),
    "an attention": (dict(model_init_kwargs={"attn_implementation": "flash_attention_2"}), "[Ff]lash|Invalid version"),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_installed_is_named(model, tmp_path, name):
    changes, said = MISSING[name]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"report_to": "none", "use_cpu": True, **model, **changes}))
    job, config = launch.read_job([str(tmp_path / "recipe.yaml")])
    with pytest.raises(BadInput, match=said):
        launch.make_trainer(job, config)


# Keys of recipes that three houses have published, and what takes their place once our messages have been read
HOUSES = {
    "alignment-handbook": (
        dict(
            model_name_or_path="m", torch_dtype="null", attn_implementation="sdpa", dataset_mixer={"d": 1.0},
            dataset_splits=["train"], preprocessing_num_workers=12, bf16=True, beta=0.01, do_eval=True,
            eval_strategy="steps", eval_steps=100, gradient_accumulation_steps=2, gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False}, learning_rate="5.0e-7", log_level="warning",
            logging_steps=10, lr_scheduler_type="cosine", max_length=1024, max_prompt_length=512, num_train_epochs=1,
            optim="adamw_torch", per_device_train_batch_size=8, per_device_eval_batch_size=8, push_to_hub=False,
            save_strategy="steps", save_steps=100, save_total_limit=1, seed=42, report_to=["wandb"],
        ),
        dict(eval_strategy="no", do_eval=False, report_to="none", bf16=False),
    ),
    "TRL": (
        dict(
            model_name_or_path="m", dataset_name="d", learning_rate=5e-6, num_train_epochs=1, use_peft=True, lora_r=4,
            lora_alpha=16, per_device_train_batch_size=2, gradient_accumulation_steps=8, eval_strategy="no",
            logging_steps=25, load_in_4bit=True, padding_free=True, report_to="none",
        ),
        {},
    ),
    "LLaMA-Factory": (
        dict(
            model_name_or_path="m", stage="dpo", do_train=True, finetuning_type="lora", lora_rank=8, lora_target="all",
            pref_beta=0.1, pref_loss="sigmoid", template="llama3", cutoff_len=2048, max_samples=1000,
            overwrite_cache=True, preprocessing_num_workers=16, plot_loss=True, overwrite_output_dir=True,
            gradient_accumulation_steps=8, learning_rate=5e-6, num_train_epochs=3.0, lr_scheduler_type="cosine",
            warmup_steps=10, bf16=True, report_to="none",
        ),
        dict(bf16=False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("house", HOUSES)
def test_a_published_recipe_starts_in_the_second_run(model, tmp_path, house):
    """The first run names everything that is called otherwise here; what it names is taken out, and it trains."""
    recipe, changes = HOUSES[house]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(BadInput) as error:
        launch.read_job([str(path)])
    known = types_of(launch.Job, FastDPOConfig)
    unknown = set(recipe) - set(known)
    assert all(f"{key} (" in str(error.value) for key in unknown) and f"{len(unknown)} unknown keys" in str(error.value)
    kept = {key: value for key, value in recipe.items() if key in known}
    path.write_text(yaml.safe_dump({**kept, **changes, **model, "use_cpu": True, "max_steps": 1}))
    job, config = launch.read_job([str(path)])
    if job.lora_r:
        pytest.importorskip("peft")
    trainer = launch.make_trainer(job, config)
    trainer.train()
    assert trainer.state.global_step == 1


def test_twenty_pairs_with_all_defaults_give_a_report_with_numbers(model, capsys):
    from dpo_fast.cli import main

    options = [f"--{key}={value}" for key, value in model.items()]
    assert main(["train", *options, "--use_cpu", "--report_to", "none"]) == 0
    results = json.loads((Path(model["output_dir"]) / "results.json").read_text())
    logged = [log["step"] for log in results["log"] if "loss" in log]
    assert logged[0] == 1 and logged[-1] == results["steps"] and len(logged) >= 2
    assert abs(results["log"][0]["loss"] - 0.6931) < 1e-3
    assert "loss" in capsys.readouterr().out


def test_every_key_can_be_set(tmp_path):
    """Each with its own default, of the file: nothing that the dataclasses take is refused by its type."""
    for data_class in (launch.Job, FastDPOConfig):
        for field in dataclasses.fields(data_class):
            default = field.default if field.default is not dataclasses.MISSING else None
            if field.init and isinstance(default, (bool, int, float, str)) and field.name not in BASE:
                read(tmp_path, yaml.safe_dump({field.name: getattr(default, "value", default)}))
