"""Keys of other projects' recipes -> what to write here. They are hinted at, never obeyed: a recipe that runs says what
is trained. Sources: alignment-handbook, TRL (its DPOConfig, ModelConfig and ScriptArguments, old and new),
LLaMA-Factory, Axolotl, SimPO, and keys that transformers had before 5.0."""

# The same thing under another name
RENAMED = {
    "adapter_name_or_path": "model",
    "base_model": "model",
    "model_name_or_path": "model",
    "lora_model_dir": "model",
    "data_path": "dataset",
    "dataset_name": "dataset",
    "train_dataset": "dataset",
    "train_file": "dataset",
    "dataset_config_name": "dataset_config",
    "dataset_train_split": "dataset_split",
    "test_datasets": "eval_dataset",
    "validation_file": "eval_dataset",
    "dataset_test_split": "eval_split",
    "dpo_beta": "beta",
    "pref_beta": "beta",
    "rl_beta": "beta",
    "dpo_label_smoothing": "label_smoothing",
    "dpo_loss_type": "loss_type",
    "pref_loss": "loss_type",
    "dpo_use_weighting": "use_weighting",
    "gamma": "simpo_gamma",
    "cutoff_len": "max_length",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "max_target_length": "max_completion_length",
    "preprocessing_num_workers": "dataset_num_proc",
    "dataset_processes": "dataset_num_proc",
    "precompute_ref_eval_batch_size": "precompute_ref_batch_size",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "evaluation_strategy": "eval_strategy",
    "wandb_name": "run_name",
    "wandb_run_id": "run_name",
    "push_to_hub_model_id": "hub_model_id",
    "push_to_hub_token": "hub_token",
    "overwrite_output_dir": "overwrite",
    "no_cuda": "use_cpu",
    "use_mps_device": "use_cpu",
    "torchdynamo": "torch_compile_backend",
    "config": "the YAML file as the first argument, without a key",
    "config_file": "the YAML file as the first argument, without a key",
}

_ATTENTION = "put attn_implementation: %s into model_init_kwargs"
_FLASH = _ATTENTION % "flash_attention_2"
_BITS = "put quantization_config: {load_in_%dbit: true} into model_init_kwargs"
_FOUR = _BITS % 4
_ADAPTER = "set lora_r, for example lora_r: 16, which trains a LoRA adapter"
_EVERY = "write %s_strategy: steps, and as steps a number below 1, which is a share of all steps"
_CHAT = "leave it out: the tokenizer's own chat template is used"
_PARTS = "name one dataset (a file, a saved data set or a hub id) with dataset, its part with dataset_split"
_LAYOUT = "leave it out: layout: auto packs pairs without padding where the model can run it"
_COLUMNS = "leave it out: columns are prompt, chosen, rejected"
_WANDB = "set %s in the environment"
_HELD_OUT = "write eval_split: {value}, which below 1 is a held-out share of dataset"
_FINISHED = "leave it out: the report has the curves"
_CACHE = "leave it out: what is tokenised is cached by the data's fingerprint"
_DOES = "leave it out: dpo-fast train trains with DPO"
_FSDP = "put it into fsdp_config"
_DROP_IN = "dpo_fast.trl.DPOTrainer has it, as TRL does"
_EXTRA_LORA = "put %s: {value} into lora_kwargs"

# Said in another way. {value} is what was written
OTHERWISE = {
    # the model
    **dict.fromkeys(("dtype", "torch_dtype"), "put dtype: {value} into model_init_kwargs"),
    "attn_implementation": _ATTENTION % "{value}",
    **dict.fromkeys(("flash_attention", "use_flash_attention_2", "use_flash_attn", "flash_attn"), _FLASH),
    "sdp_attention": _ATTENTION % "sdpa",
    "eager_attention": _ATTENTION % "eager",
    "flex_attention": _ATTENTION % "flex_attention",
    "model_revision": "put revision: {value} into model_init_kwargs",
    "load_in_4bit": _FOUR,
    "load_in_8bit": _BITS % 8,
    "quantization_bit": "put quantization_config: {load_in_{value}bit: true} into model_init_kwargs",
    "quantization_method": "leave it out, or put a quantization_config into model_init_kwargs",
    "bnb_4bit_quant_type": "put it into model_init_kwargs: {quantization_config: {load_in_4bit: true, ...}}",
    "bnb_4bit_compute_dtype": "put it into model_init_kwargs: {quantization_config: {load_in_4bit: true, ...}}",
    "bnb_4bit_quant_storage": "put it into model_init_kwargs: {quantization_config: {load_in_4bit: true, ...}}",
    "use_bnb_nested_quant": "put bnb_4bit_use_double_quant: true into quantization_config of model_init_kwargs",
    "device_map": "put device_map: {value} into model_init_kwargs",
    "low_cpu_mem_usage": "leave it out: transformers does so by itself",
    "rope_scaling": "put rope_scaling: {value} into model_init_kwargs",
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "base_model_config", "is_falcon_derived_model", "is_llama_derived_model"),
        "leave it out: the model's own config.json says so",
    ),
    **dict.fromkeys(
        ("tokenizer_name_or_path", "tokenizer_config", "tokenizer_name", "special_tokens", "eot_tokens"),
        "leave it out: the tokenizer that lies with the model is used as it is",
    ),
    "pad_token": "leave it out: the tokenizer's own is used; in Python, set tokenizer.pad_token",
    # the adapter
    "use_peft": _ADAPTER,
    "use_lora": _ADAPTER,
    "adapter": _ADAPTER,
    "finetuning_type": f"leave it out to train all weights, or {_ADAPTER}",
    "lora_target_linear": "write lora_target_modules: all-linear",
    **{f"lora_{name}": _EXTRA_LORA % name for name in ("bias", "modules_to_save", "target_parameters")},
    **{f"lora_{name}": _EXTRA_LORA % name for name in ("layers_to_transform", "fan_in_fan_out", "task_type")},
    "modules_to_save": _EXTRA_LORA % "modules_to_save",
    "additional_target": _EXTRA_LORA % "modules_to_save",
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), _EXTRA_LORA % "use_rslora"),
    **dict.fromkeys(("use_dora", "peft_use_dora"), _EXTRA_LORA % "use_dora"),
    "pissa_init": "put init_lora_weights: pissa into lora_kwargs",
    "loraplus_lr_ratio": "leave it out: not offered, both factors of an adapter have one learning rate",
    **dict.fromkeys(
        ("lora", "peft_config", "lora_config", "peft"),
        "write lora_r, lora_alpha, lora_dropout, lora_target_modules, and everything else as lora_kwargs",
    ),
    # the data
    **dict.fromkeys(("dataset_mixer", "dataset_mixture", "datasets", "dataset_mixer_list"), _PARTS),
    "dataset_splits": "write dataset_split for training and eval_split for evaluation",
    "dataset_configs": "write dataset_config",
    "dataset_streaming": "leave it out: hub data sets are downloaded and memory-mapped",
    **dict.fromkeys(
        ("max_samples", "max_train_samples"),
        "leave it out, or write dataset_split: train[:{value}], which takes a part of a hub data set",
    ),
    "max_eval_samples": "leave it out, or write eval_split: test[:{value}], which takes a part of a hub data set",
    **dict.fromkeys(("val_set_size", "val_size", "test_split_size"), _HELD_OUT),
    **dict.fromkeys(("template", "chat_template", "conv_template_name", "prompt_template", "default_system"), _CHAT),
    "auto_insert_empty_system_msg": _CHAT,
    **dict.fromkeys(("columns_to_keep", "column_mapping", "ranking", "formatting", "columns"), _COLUMNS),
    **dict.fromkeys(("overwrite_cache", "dataset_prepared_path", "tokenized_path", "shuffle_merged_datasets"), _CACHE),
    **dict.fromkeys(
        ("padding_free", "sample_packing", "eval_sample_packing", "packing", "neat_packing", "pad_to_sequence_len"),
        _LAYOUT,
    ),
    "train_on_inputs": "leave it out: only completions count",
    "group_by_length": "write train_sampling_strategy: group_by_length",
    # the objective
    "rl": "leave it out for DPO; other objectives are a loss_type, as ipo, orpo, simpo, hinge",
    "stage": _DOES,
    "rpo_alpha": "write loss_type: [sigmoid, sft] and loss_weights: [1.0, {value}]",
    "pref_ftx": "write loss_type: [sigmoid, sft] and loss_weights: [1.0, {value}]",
    "rl_alpha": "write loss_type: [sigmoid, sft] and loss_weights: [1.0, {value}]",
    "sft_weight": "write loss_type: [sigmoid, sft] and loss_weights: [1.0, {value}]",
    "gamma_beta_ratio": "write simpo_gamma, which is beta times {value}",
    **dict.fromkeys(
        ("reference_free", "force_use_ref_model", "is_encoder_decoder", "label_pad_token_id", "padding_value"),
        "leave it out: it follows from the loss, the model and the tokenizer",
    ),
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        f"leave it out: the reference stays what it is; {_DROP_IN}",
    ),
    **dict.fromkeys(("model_adapter_name", "ref_adapter_name"), "leave it out: the reference is the policy before"),
    "ref_model_init_kwargs": "leave it out: model_init_kwargs count for both models",
    "generate_during_eval": "write samples: the number of prompts that are answered before and after",
    **dict.fromkeys(
        ("use_liger_loss", "use_logits_to_keep", "use_num_logits_to_keep", "dpo_use_logits_to_keep"),
        "leave it out: logits of prompts are never computed",
    ),
    "dpo_padding_free": _LAYOUT,
    # training
    "warmup_ratio": "write warmup_steps: {value}, which below 1 is a share of all steps",
    "evals_per_epoch": _EVERY % "eval",
    "saves_per_epoch": _EVERY % "save",
    "gradient_checkpointing_use_reentrant": "write gradient_checkpointing_kwargs: {use_reentrant: {value}}",
    **dict.fromkeys(("fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap", "fsdp_version"), _FSDP),
    **dict.fromkeys(("dispatch_batches", "split_batches"), "put it into accelerator_config"),
    "early_stopping_patience": "leave it out: not offered, but load_best_model_at_end: true keeps the best",
    "activation_offloading": f"leave it out: gradient_checkpointing: true keeps few activations; {_DROP_IN}",
    "enable_liger_kernel": "write use_liger_kernel: true",
    "pure_bf16": "put dtype: bfloat16 into model_init_kwargs",
    "compute_type": "write bf16: true or fp16: true",
    "half_precision_backend": "leave it out: transformers has one",
    "fp16_opt_level": "leave it out: transformers has no apex any more",
    # output
    "save_safetensors": "leave it out: weights are always saved so",
    "plot_loss": _FINISHED,
    "logging_dir": "leave it out: TENSORBOARD_LOGGING_DIR in the environment says so",
    **{f"wandb_{name}": _WANDB % f"WANDB_{name.upper()}" for name in ("project", "entity", "watch", "log_model")},
    "env": "set variables in the environment",
    "include_inputs_for_metrics": "leave it out: metrics are computed from log-probs",
    "strict": "leave it out: an unknown key is always refused",
    "plugins": "leave it out",
}


def hint_for(key: str, value: str) -> str:
    """What to write instead of a key of another project, "" where it is none. value: what was written, as YAML."""
    name = RENAMED.get(key)
    text = OTHERWISE.get(key) if name is None else f"write {name}"
    if text is None:
        return ""
    if value == "null" or value.strip("'").lower() in ("false", "no", "off") and not (name or "{value}" in text):
        return "leave it out"
    if text is _HELD_OUT and not value.strip("0.'"):
        return "leave it out"
    return text.replace("{value}", value.strip("'") if len(value) <= 60 else "...")
