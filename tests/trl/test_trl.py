"""`dpo_fast.trl.DPOTrainer` against TRL's own: the same fields of a batch, the same curves of a training."""

import copy
import functools
import importlib.util
import logging
import pickle
import sys

import pytest
import torch
import transformers
from tiny import QUIET, tiny_chat_rows, tiny_model, tiny_rows, tiny_tokenizer
from two_devices import two_devices

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl.trainer import dpo_trainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

from dpo_fast.trl import DPOTrainer, checks, seams  # noqa: E402
from dpo_fast.trl import fused_head as ours  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, output_router_logits=True)


# --- one batch -----------------------------------------------------------------------------------------------------


def examples() -> list[dict]:
    """A plain pair; completions that begin alike; no prompt; a one-token completion that begins the other."""
    return [
        dict(prompt_ids=[5, 6, 7, 8], chosen_ids=[9, 10, 11], rejected_ids=[12, 13]),
        dict(prompt_ids=[5, 6], chosen_ids=[20, 21, 22, 23], rejected_ids=[20, 21, 30]),
        dict(prompt_ids=[], chosen_ids=[40, 41, 42], rejected_ids=[43, 44]),
        dict(prompt_ids=[60, 61, 62], chosen_ids=[63], rejected_ids=[63, 64]),
    ]


def inputs_of(rows=None, **options) -> dict:
    """What TRL's trainer calls its model with."""
    batch = DataCollatorForPreference(pad_token_id=0, **options)(examples() if rows is None else rows)
    mask = batch.pop("completion_mask")
    return {**batch, "use_cache": False, "labels": batch["input_ids"].masked_fill(mask == 0, -100)}


def both(kind="llama", outputs=FIELDS, **overrides):
    """The same model with TRL's head and with ours; logits are far from uniform."""
    models = [tiny_model(kind, **overrides) for _ in range(2)]
    for model in models:
        for p in model.parameters():
            p.data.mul_(3 if p.ndim > 1 else 1)
    dpo_trainer.add_fused_lm_head(models[0], outputs=outputs)
    ours.install(models[1], outputs=outputs)
    return models


def assert_same_fields(theirs, mine, names=FIELDS):
    for name in names:
        a, b = getattr(mine, name), getattr(theirs, name)
        assert a.shape == b.shape and a.dtype == b.dtype, name
        assert torch.equal(a, b) if a.dtype == torch.bool else torch.allclose(a, b, atol=1e-5), name
    assert torch.equal(mine.label_mask, theirs.label_mask)
    assert torch.allclose(mine.loss, theirs.loss, atol=1e-5)


def assert_same_call(theirs, mine, inputs, **call):
    """Every field, and every parameter's gradient of a weighted sum of the log-probs and the loss."""
    found = [model(**inputs, fused_lm_head=True, **call) for model in (theirs, mine)]
    assert_same_fields(*found)
    for model, out in zip((theirs, mine), found, strict=True):
        weights = torch.linspace(-1, 1, out.log_probs.numel()).view_as(out.log_probs)
        model.zero_grad()
        ((out.log_probs * weights).sum() + out.loss).backward()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm().clamp(min=1e-3), name
    return found


def packed_widths(model) -> list:
    """Notes the shape of every row that the backbone is given."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def holes(inputs):
    inputs["labels"][0, 5] = inputs["labels"][5, 3] = -100
    return inputs


def other_labels(inputs):
    inputs["labels"][1, 3] = 77
    return inputs


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "inputs",
    [
        inputs_of(),
        inputs_of(max_length=4, truncation_mode="keep_end"),
        inputs_of(pad_to_multiple_of=16),
        holes(inputs_of()),
        other_labels(inputs_of()),
    ],
    ids=["plain", "keep_end", "wide", "holes", "labels"],
)
def test_every_field_is_trls(kind, inputs):
    theirs, mine = both(kind)
    seen = packed_widths(mine)
    assert_same_call(theirs, mine, inputs)
    assert len(seen) == 1 and seen[0][0] == 1 and seen[0][1] <= inputs["attention_mask"].sum()


def test_what_a_pair_begins_with_runs_once():
    _, mine = both()
    seen = packed_widths(mine)
    mine(**inputs_of(), fused_lm_head=True)
    assert seen == [(1, (4 + 3 + 2) + (4 + 2 + 1) + (0 + 3 + 2) + (4 + 0 + 1))]


def test_only_the_fields_that_were_asked_for():
    _, mine = both(outputs=("log_probs", "entropy"))
    out = mine(**inputs_of(), fused_lm_head=True)
    assert [name for name in FIELDS if getattr(out, name) is not None] == ["log_probs", "entropy"]
    with pytest.raises(RuntimeError, match="0.18 to 1.16.*perplexity"):
        ours.install(tiny_model(), outputs=("log_probs", "perplexity"))


def test_loss_counts_the_items_it_is_told():
    theirs, mine = both()
    assert_same_call(theirs, mine, inputs_of(), num_items_in_batch=torch.tensor(40))


def test_balancing_loss_counts_prompts_twice_as_trl_does():
    theirs, mine = both("qwen3_moe", **MOE)
    a, b = assert_same_call(theirs, mine, inputs_of())
    assert torch.allclose(a.aux_loss, b.aux_loss, atol=1e-6)
    a, b = (m(**inputs_of(), fused_lm_head=True, output_router_logits=False) for m in (theirs, mine))
    assert a.aux_loss is None and b.aux_loss is None


def test_a_batch_without_labels_is_a_differentiable_zero():
    theirs, mine = both()
    inputs = inputs_of()
    inputs["labels"].fill_(-100)
    _, out = assert_same_call(theirs, mine, inputs)
    assert out.loss == 0 and mine.lm_head.weight.grad is not None


def padded_left(inputs):
    columns, space = torch.arange(inputs["labels"].shape[1]), (inputs["attention_mask"] == 0).sum(1)
    rolled = (columns - space[:, None]) % len(columns)
    return {**inputs, **{name: inputs[name].gather(1, rolled) for name in ("input_ids", "attention_mask", "labels")}}


def with_a_hole(inputs):
    inputs["attention_mask"][0, 1] = 0
    return inputs


def with_labels_on_padding(inputs):
    inputs["labels"][1, -1] = 9
    return inputs


def an_odd_row(inputs):
    return {name: value[:7] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def with_position_ids(inputs):
    return {**inputs, "position_ids": torch.arange(inputs["labels"].shape[1]).expand_as(inputs["labels"])}


def without_mask(inputs):
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def shifted(inputs):
    labels = inputs.pop("labels")
    return {**inputs, "shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}


def embedded(inputs):
    embeddings = tiny_model().get_input_embeddings()(inputs.pop("input_ids")).detach() * 3
    return {**inputs, "inputs_embeds": embeddings}


@pytest.mark.parametrize(
    "change, reason",
    [
        (with_a_hole, "attention_mask is not one run"),
        (with_labels_on_padding, "labels are not -100 everywhere on padding"),
        (an_odd_row, "2P rows"),
        (with_position_ids, "position_ids"),
        (without_mask, "2P rows"),
        (shifted, "shifted"),
        (embedded, "inputs_embeds"),
    ],
)
def test_what_is_not_a_batch_of_text_pairs_runs_as_it_comes(change, reason, caplog):
    checks.log_once.cache_clear()
    theirs, mine = both()
    inputs = change(inputs_of())
    with caplog.at_level("WARNING", "dpo_fast"):
        assert_same_call(theirs, mine, inputs)
        mine(**inputs, fused_lm_head=True)
    lines = [r.getMessage() for r in caplog.records if "padded rows" in r.getMessage()]
    assert len(lines) == 1 and reason in lines[0]


def test_rows_padded_on_the_left_are_packed(caplog):
    checks.log_once.cache_clear()
    theirs, mine = both()
    with caplog.at_level("WARNING", "dpo_fast"):
        assert_same_call(theirs, mine, padded_left(inputs_of([row for row in examples() if row["prompt_ids"]])))
    assert not any("padded rows" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("kind", ["mamba", "bloom"])
def test_a_model_that_cannot_runs_padded_rows(kind, caplog):
    checks.log_once.cache_clear()
    overrides = dict(n_head=4) if kind == "bloom" else dict(state_size=4, expand=2, time_step_rank=4)
    theirs, mine = both(kind, **overrides)
    with caplog.at_level("WARNING", "dpo_fast"):
        assert_same_call(theirs, mine, inputs_of())
    assert any("padded rows, not shared prefixes, because" in r.getMessage() for r in caplog.records)


def test_a_batch_with_images_runs_as_it_comes(caplog):
    checks.log_once.cache_clear()
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlavaConfig(
        text_config=dict(model_type="qwen2", vocab_size=100, num_key_value_heads=2, **sizes),
        vision_config=dict(model_type="clip_vision_model", image_size=8, patch_size=4, projection_dim=16, **sizes),
        image_token_index=99,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    mine = copy.deepcopy(theirs)
    dpo_trainer.add_fused_lm_head(theirs)
    ours.install(mine)
    image = dict(prompt_ids=[99] * 4 + [5, 6], chosen_ids=[7, 8, 9], rejected_ids=[10, 11])
    inputs = {**inputs_of([image, image]), "pixel_values": torch.randn(4, 3, 8, 8)}
    found = [model(**inputs, fused_lm_head=True) for model in (theirs, mine)]
    assert_same_fields(*found, names=["log_probs"])
    assert "image tokens" in caplog.text


def test_attention_dropout_is_not_lost(caplog):
    checks.log_once.cache_clear()
    _, mine = both(attention_dropout=0.5)
    with caplog.at_level("WARNING", "dpo_fast"):
        mine.train()(**inputs_of(), fused_lm_head=True)
    assert "attention dropout" in caplog.text


@pytest.mark.parametrize("kind", ["stablelm", "nemotron", "falcon"])
def test_every_field_is_trls_where_packed_rows_are_wrong(kind, caplog):
    checks.log_once.cache_clear()
    theirs, mine = both(kind, **(dict(head_dim=8) if kind == "nemotron" else {}))
    with caplog.at_level("WARNING", "dpo_fast"):
        assert_same_call(theirs, mine, inputs_of())
    assert "padded rows, not shared prefixes, because" in caplog.text


def test_a_model_that_calls_a_part_of_its_base_model_is_packed():
    theirs, mine = both("opt", ffn_dim=48, word_embed_proj_dim=32)
    seen = []
    mine.model.decoder.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert_same_fields(*(model(**inputs_of(), fused_lm_head=True) for model in (theirs, mine)))
    assert seen == [1]


def test_a_hook_on_a_layer_asks_for_padded_rows(caplog):
    checks.log_once.cache_clear()
    theirs, mine = both()
    rows = []
    mine.model.layers[0].register_forward_hook(lambda _module, args, _out: rows.append(len(args[0])))
    with caplog.at_level("WARNING", "dpo_fast"):
        assert_same_call(theirs, mine, inputs_of())
    assert set(rows) == {8} and "model's layers.0" not in caplog.text and "layers.0 would see" in caplog.text


@pytest.mark.parametrize("kind", ["minicpm3", "gemma2"])
def test_a_head_that_cannot_be_scored_from_here_is_trls_own(kind, caplog, monkeypatch):
    """MiniCPM3 divides hidden states between backbone and head; TRL's head knows that."""
    latent = dict(kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, head_dim=8)
    more = dict(num_key_value_heads=4, scale_emb=2, dim_model_base=8, **latent) if kind == "minicpm3" else {}
    if kind == "gemma2":

        def refuse(_model):
            raise ValueError("a head of another kind")

        monkeypatch.setattr(ours, "attach", refuse)
    with caplog.at_level("WARNING", "dpo_fast"):
        theirs, mine = both(kind, **more)
        assert_same_call(theirs, mine, inputs_of())
    lines = [r.getMessage() for r in caplog.records if "TRL's own head" in r.getMessage()]
    assert len(lines) == 1 and type(mine).__name__ in lines[0]
    with pytest.raises(ValueError):
        ours.install(tiny_model(kind, **more), layout="shared_prefix")


def test_a_head_that_trls_does_not_score_either_is_refused():
    """BERT has layers between the backbone and the product: TRL would leave them out."""
    model = tiny_model("bert", is_decoder=True)
    with pytest.raises(ValueError, match="BertLMHeadModel changes hidden states"):
        ours.install(model)
    assert "forward" not in vars(model)


def test_policy_and_reference_pack_a_batch_once(monkeypatch):
    packed = []
    pack = ours.packed_rows
    monkeypatch.setattr(ours, "packed_rows", lambda *args: packed.append(1) or pack(*args))
    _, policy = both()
    _, reference = both(seed=1)
    inputs = inputs_of()
    first = policy(**inputs, fused_lm_head=True).log_probs
    other = reference(**inputs, fused_lm_head=True).log_probs
    assert len(packed) == 1 and not torch.allclose(first, other)
    changed = {**inputs, "input_ids": inputs["input_ids"].flip(0)}  # the same labels, of another batch
    policy(**changed, fused_lm_head=True)
    assert len(packed) == 2


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("kind, more", [("llama", {}), ("qwen3_moe", MOE)], ids=["llama", "experts"])
def test_a_head_on_another_device(kind, more, layout):
    model = tiny_model(kind, **more)
    ours.install(model, FIELDS, layout)
    inputs = inputs_of()
    model(**inputs, fused_lm_head=True)  # the probe, and the check of the head
    model.lm_head.to("meta")
    with two_devices():
        out = model(**inputs, fused_lm_head=True)
    assert {x.device.type for x in out.values()} == {"cpu"} and (out.aux_loss is None) == (not more)


def test_other_calls_are_the_models_own():
    model, plain = tiny_model(), tiny_model()
    ours.install(model)
    inputs = inputs_of()
    model(**inputs, fused_lm_head=True)
    assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model(**inputs).loss, plain(**inputs).loss)
    prompt = dict(input_ids=inputs["input_ids"][:1, :3], max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(**prompt), plain.generate(**prompt))
    with pytest.raises(ValueError, match="unused_keyword"):
        model.generate(**prompt, unused_keyword=1)
    with pytest.raises(TypeError, match="keyword"):
        model(inputs["input_ids"], fused_lm_head=True)


def test_installed_twice_and_copied():
    model, inputs = tiny_model(), inputs_of()
    ours.install(model)
    ours.install(model, outputs=("log_probs", "entropy"))
    before = model(**inputs, fused_lm_head=True)
    assert before.entropy is not None
    twin = copy.deepcopy(model)
    for p in twin.parameters():
        p.data.mul_(2)
    assert torch.equal(model(**inputs, fused_lm_head=True).log_probs, before.log_probs)
    assert not torch.equal(twin(**inputs, fused_lm_head=True).log_probs, before.log_probs)
    assert not torch.equal(twin(**inputs).logits, model(**inputs).logits)


# --- whole trainings -----------------------------------------------------------------------------------------------

SETTINGS = dict(
    **QUIET,
    bf16=False,
    per_device_train_batch_size=3,
    per_device_eval_batch_size=4,
    gradient_checkpointing=False,
    max_steps=3,
    learning_rate=1e-3,
)
NOT_NUMBERS = {f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second")}
NOT_NUMBERS.add("eval_model_preparation_time")


def trainer_of(trainer_class, tmp_path, model="llama", peft_config=None, rows=None, overrides=None, **options):
    if isinstance(model, str):
        made = tiny_model(model, **(overrides or {}))
        for p in made.parameters():
            p.data.mul_(3 if p.ndim > 1 else 1)
        made.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    return trainer_class(
        model,
        args=trl.DPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **options}),
        train_dataset=datasets.Dataset.from_list(rows or tiny_rows(9, seed=4)),
        eval_dataset=datasets.Dataset.from_list(tiny_rows(6, seed=5)),
        processing_class=tiny_tokenizer(),
        peft_config=copy.deepcopy(peft_config),
    )


def history(trainer_class, tmp_path, **options):
    trainer = trainer_of(trainer_class, tmp_path, **options)
    before = trainer.evaluate()
    trainer.train()
    return [before, *(log for log in trainer.state.log_history if "loss" in log), trainer.evaluate()]


def assert_same_curves(tmp_path, tolerance=1e-4, but=(), **options):
    # A directory each: TRL's cache of reference log-probs would hand one trainer's to the other
    theirs, mine = (history(cls, tmp_path / cls.__module__, **options) for cls in (trl.DPOTrainer, DPOTrainer))
    assert len(mine) == len(theirs) == SETTINGS["max_steps"] + 2
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys() and len(a.keys() - NOT_NUMBERS) > 12
        for name in a.keys() - NOT_NUMBERS - set(but):
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), (name, a, b)
    assert mine[-1]["eval_loss"] != pytest.approx(mine[0]["eval_loss"], abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(gradient_accumulation_steps=2, loss_type=["sigmoid", "sft"], rows=tiny_chat_rows(9)),
        dict(use_weighting=True, max_length=24, truncation_mode="keep_end"),
        # TRL's first margins are rounding, of either sign
        dict(ld_alpha=0.5, precompute_ref_log_probs=True, but=["rewards/accuracies", "eval_rewards/accuracies"]),
        dict(gradient_checkpointing=True),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        dict(model="qwen3_moe", overrides=MOE, router_aux_loss_coef=0.3),
        dict(model="bloom", overrides=dict(n_head=4)),
    ],
    ids=["plain", "accumulation+chat", "wpo+keep_end", "ld+precomputed", "checkpointing", "reentrant", "moe", "padded"],
)
def test_curves_and_evaluation_are_trls(tmp_path, options):
    assert_same_curves(tmp_path, **options)


def test_bf16_autocast(tmp_path):
    """Both round; they agree as far as bf16 does, which leaves open what is decided by comparing near-equals."""
    decided = ["rewards/accuracies", "eval_rewards/accuracies", "mean_token_accuracy", "eval_mean_token_accuracy"]
    assert_same_curves(tmp_path, tolerance=2e-2, bf16=True, but=decided)


@pytest.mark.parametrize("options", [{}, dict(gradient_checkpointing=True), dict(precompute_ref_log_probs=True)])
def test_lora(tmp_path, options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    assert_same_curves(tmp_path, peft_config=config, learning_rate=1e-1, **options)


def test_adalora(tmp_path):
    """PEFT adds its regulariser to what a model returns as its loss, of which TRL takes no notice."""
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=20, init_r=4, target_modules=["q_proj", "v_proj"])
    # Margins of the first steps are nearly 0, of either sign
    assert_same_curves(
        tmp_path, peft_config=config, learning_rate=1.0, but=["rewards/accuracies", "eval_rewards/accuracies"]
    )


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_prompt_learning_runs_padded_rows(tmp_path, kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_same_curves(tmp_path, peft_config=config, learning_rate=1.0)


def test_activated_lora_runs_padded_rows(tmp_path):
    """PEFT switches it on at a token of each of TRL's rows."""
    peft = pytest.importorskip("peft")
    start = tiny_tokenizer()(" yes")["input_ids"][-1:]
    config = dict(r=4, target_modules=["q_proj"], alora_invocation_tokens=start, init_lora_weights="gaussian")
    assert_same_curves(tmp_path, peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **config), learning_rate=1.0)


def test_an_adapter_that_was_there_before_has_a_reference_copy(tmp_path):
    peft = pytest.importorskip("peft")
    found = []
    for trainer_class in (trl.DPOTrainer, DPOTrainer):
        model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(1))
        model.base_model.model.config._name_or_path = "policy"
        trainer = trainer_of(trainer_class, tmp_path, model=model)
        trainer.train()
        found.append([log["rewards/margins"] for log in trainer.state.log_history if "loss" in log])
    assert found[0][0] == found[1][0] == 0 and found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[1][-1] != 0


def test_other_arguments_than_trls_are_refused(tmp_path):
    from dpo_fast import FastDPOConfig

    with pytest.raises(TypeError, match="args must be a trl.DPOConfig, got FastDPOConfig"):
        DPOTrainer(tiny_model(), args=FastDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"))


def test_lora_on_the_head_trains(tmp_path):
    """TRL refuses it. The loss and its gradients are those of the model's own logits."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], lora_alpha=8)
    with pytest.raises(ValueError, match="lm_head"):
        trainer_of(trl.DPOTrainer, tmp_path, peft_config=config)
    trainer = trainer_of(DPOTrainer, tmp_path, peft_config=config)
    model = trainer.model
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])

    def logps():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (tokens * batch["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference = logps()
    chosen, rejected = (logps() - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(expected, trainable.values())
    loss = trainer.compute_loss(model, batch)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, a, b in zip(trainable, torch.autograd.grad(loss, trainable.values()), gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() and b.norm() > 0, name
    assert any("lm_head.lora_A" in name for name in trainable)
    trainer.train()


def test_padding_free_is_not_ignored(tmp_path):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("trl.trainer.dpo_trainer").addHandler(handler)
    try:
        trainer = trainer_of(DPOTrainer, tmp_path, padding_free=True)
        assert trainer.args.padding_free and trainer.padding_free and not lines
        trainer_of(trl.DPOTrainer, tmp_path, padding_free=True)
        assert "padding_free" in lines[0]
    finally:
        logging.getLogger("trl.trainer.dpo_trainer").removeHandler(handler)
    seen = packed_widths(trainer.model)
    trainer.train()
    assert {rows for rows, _ in seen} == {1}


@pytest.mark.parametrize("how", ["keyword", "environment"])
def test_padded_rows_on_request(tmp_path, how, monkeypatch, caplog):
    trainer_class = functools.partial(DPOTrainer, layout="padded") if how == "keyword" else DPOTrainer
    if how == "environment":
        monkeypatch.setenv("DPO_FAST_LAYOUT", "padded")
    trainer = trainer_of(trainer_class, tmp_path)
    seen = packed_widths(trainer.model)
    trainer.evaluate()
    assert {rows % 2 for rows, _ in seen} == {0} and "padded rows" not in caplog.text
    monkeypatch.setenv("DPO_FAST_LAYOUT", "packed")
    with pytest.raises(ValueError, match="DPO_FAST_LAYOUT must be one of auto, shared_prefix, padded, got 'packed'"):
        trainer_of(DPOTrainer, tmp_path)


def test_an_explicit_layout_does_not_fall_back(tmp_path):
    with pytest.raises(ValueError, match="layout='shared_prefix' cannot run: .*StableLm"):
        trainer_of(functools.partial(DPOTrainer, layout="shared_prefix"), tmp_path, model="stablelm")
    with pytest.raises(ValueError, match="layout='shared_prefix' cannot run: NEFTune"):
        trainer_of(functools.partial(DPOTrainer, layout="shared_prefix"), tmp_path, neftune_noise_alpha=5.0)
    model = tiny_model()
    ours.install(model, layout="shared_prefix")
    with pytest.raises(ValueError, match="cannot run: the batch has position_ids"):
        model(**with_position_ids(inputs_of()), fused_lm_head=True)


@pytest.mark.parametrize("options", [dict(neftune_noise_alpha=5.0), dict(model="stablelm"), dict(model="falcon")])
def test_curves_are_trls_where_rows_must_be_padded(tmp_path, options):
    assert_same_curves(tmp_path, **options)


def test_one_model_through_trls_trainer_and_ours(tmp_path):
    """Each sees to its own forward, whatever the other has left on the model."""
    tiny_model().save_pretrained(tmp_path / "model")
    model = type(tiny_model()).from_pretrained(tmp_path / "model")
    losses = []
    for trainer_class in (DPOTrainer, trl.DPOTrainer, DPOTrainer):
        trainer = trainer_of(trainer_class, tmp_path, model=model)
        seen = packed_widths(trainer.model)
        losses.append(trainer.evaluate()["eval_loss"])
        assert (seen[0][0] == 1) == (trainer_class is DPOTrainer)
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(losses[2])


# --- what a script brings --------------------------------------------------------------------------------------------


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(gradient_checkpointing=True)], ids=str)
def test_compiled(tmp_path, options):
    """The curves are those of TRL uncompiled; the one break in a forward is where the batch is packed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    mine = history(DPOTrainer, tmp_path, torch_compile=True, torch_compile_backend="eager", **options)
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert any("_packed_once" in reason for reason in breaks)
    others = [reason for reason in breaks if "_packed_once" not in reason]
    assert not others or options.get("gradient_checkpointing"), others  # there transformers has one of its own
    for a, b in zip(mine, history(trl.DPOTrainer, tmp_path, **options), strict=True):
        for name in a.keys() - NOT_NUMBERS:
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), name


@pytest.mark.slow  # minutes of C++ compilers
def test_compiled_by_inductor(tmp_path, monkeypatch):
    # A graph from its cache may call a product that this process has not registered
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    losses = []
    for trainer_class, options in ((trl.DPOTrainer, {}), (DPOTrainer, dict(torch_compile=True))):
        torch._dynamo.reset()
        trainer = trainer_of(trainer_class, tmp_path, overrides=dict(num_hidden_layers=1), **options)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[1] == pytest.approx(losses[0], abs=5e-7) and losses[0][-1] < losses[0][0] - 1e-2


def test_predict_takes_what_evaluate_takes(tmp_path):
    rows = datasets.Dataset.from_list(tiny_rows(5, seed=8))
    for options in ({}, dict(precompute_ref_log_probs=True)):
        trainer = trainer_of(DPOTrainer, tmp_path, **options)
        assert trainer.predict(rows).metrics["test_loss"] == trainer.evaluate(rows)["eval_loss"]
        trainer.predict(trainer.eval_dataset)
    trainer.train()
    with pytest.raises(ValueError, match="keeps no reference model after training has begun"):
        trainer.predict(rows)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_under_its_old_name(tmp_path, dtype, caplog):
    trainer = trainer_of(DPOTrainer, tmp_path, model_init_kwargs={"torch_dtype": dtype})
    assert trainer.model.dtype == trainer.ref_model.dtype == torch.bfloat16
    assert "torch_dtype in model_init_kwargs is called dtype now" in caplog.text


@pytest.mark.parametrize("name", ["models", "data", "rows", "facts", "checkpoints"])
def test_what_the_drop_in_uses_needs_no_config(name, monkeypatch):
    """FastDPOConfig refuses transformers before 5.6, which TRL up to 0.28 asks for."""
    monkeypatch.setitem(sys.modules, "dpo_fast.training.config", None)
    spec = importlib.util.find_spec(f"dpo_fast.training.{name}")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_old_name_is_left_to_a_trl_that_reads_it(monkeypatch, caplog):
    class ReadsTheOldName:  # as TRL's does up to 0.22
        def _create_model_from_path(self, model_path, args):
            return args.model_init_kwargs.get("torch_dtype")

    config = trl.DPOConfig(model_init_kwargs={"torch_dtype": "bfloat16"}, bf16=False, report_to=[])
    monkeypatch.setattr(dpo_trainer, "DPOTrainer", ReadsTheOldName)
    checks.take_old_dtype(config)
    assert config.model_init_kwargs == {"torch_dtype": "bfloat16"} and not caplog.text


@pytest.mark.parametrize(
    "name, hint",
    [
        ("tokenizer", "it is called processing_class"),
        ("model_init", "give the model"),
        ("beta", "put it into DPOConfig"),
        ("max_target_length", "TRL's DPOTrainer has none"),
    ],
)
def test_arguments_that_trl_does_not_take(name, hint):
    with pytest.raises(TypeError, match=f"DPOTrainer takes no argument {name}: {hint}"):
        DPOTrainer(tiny_model(), **{name: 1})


def adapted(*names, **options):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), lora(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora())
    return model


def test_names_of_adapters_that_trl_cannot_take(tmp_path):
    with pytest.raises(ValueError, match="called ref, and the model has one already .default, ref.: model.delete_ada"):
        trainer_of(DPOTrainer, tmp_path, model=adapted("default", "ref"))
    with pytest.raises(ValueError, match="trains the adapter called default, the model has mine: load it under that"):
        trainer_of(DPOTrainer, tmp_path, model=adapted("mine"))
    trainer_of(DPOTrainer, tmp_path, model=adapted("default", "reference")).train()


def test_paths_that_trl_does_not_load(tmp_path):
    adapted("default").save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds an adapter, which TRL does not load: pass peft.AutoPeftModel"):
        DPOTrainer(str(tmp_path / "adapter"))
    with pytest.raises(TypeError, match="ref_model must be a model: load it"):
        DPOTrainer(tiny_model(), ref_model=str(tmp_path))


def test_one_line_imports_what_trl_has():
    exec("from dpo_fast.trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config")
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from dpo_fast.trl import no_such_name")
    import dpo_fast.trl

    assert dpo_fast.trl.DPOConfig is trl.DPOConfig and DPOTrainer is not trl.DPOTrainer


def test_an_adapter_loaded_for_inference(tmp_path, caplog):
    peft = pytest.importorskip("peft")
    adapted("default").save_pretrained(tmp_path / "adapter")
    trainer = trainer_of(DPOTrainer, tmp_path, model=peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter"))
    assert "is_trainable=True" in caplog.text
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer.train()
    trainer.evaluate()  # which it may be for


def test_a_mixed_model_trains_where_trl_cannot(tmp_path):
    """Its reference is TRL's: another copy of the model from its path."""
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")

    def mixed():
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        return peft.get_peft_model(base, lora(init_lora_weights=False), mixed=True)

    with pytest.raises(AttributeError):
        trainer_of(trl.DPOTrainer, tmp_path, model=mixed()).train()
    trainer, model = trainer_of(DPOTrainer, tmp_path, model=mixed()), mixed()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])

    def logps(model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        tokens = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (tokens * batch["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad(), model.disable_adapter():
        reference = logps(model)
    chosen, rejected = (logps(model) - reference).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(expected.item(), abs=1e-6)
    assert expected.item() != pytest.approx(0.693147, abs=1e-3)
    trainer.train()


# --- TRL itself ----------------------------------------------------------------------------------------------------


def test_attention_is_left_as_it_was(tmp_path):
    """Packed rows ran, and nothing of it is in the configs: a process that does not know this library can read them."""
    trainer = trainer_of(DPOTrainer, tmp_path)
    models = [m for m in (trainer.model, trainer.ref_model) if m is not None]
    for use in (trainer.train, trainer.evaluate, trainer.train):
        shapes = packed_widths(trainer.model)
        use()
        assert any(rows == 1 for rows, _width in shapes), "no packed row ran"
        assert {m.config._attn_implementation for m in models} == {"sdpa"}


@pytest.mark.parametrize("case", ["fp32", "bf16", "TRL's own head"])
def test_models_are_called_as_before_after_each_use(tmp_path, case, monkeypatch):
    """Nothing of ours and nothing of accelerate's is left on them, and the next use finds it again."""
    if case == "TRL's own head":
        monkeypatch.setattr(ours, "attach", lambda model: (_ for _ in ()).throw(ValueError("cannot be scored")))
    trainer = trainer_of(DPOTrainer, tmp_path, bf16=case == "bf16")
    models = [m for m in (trainer.model, trainer.ref_model) if m is not None]
    dtypes, hidden = [], trainer.model.model.layers[0].mlp
    for use in (trainer.train, trainer.evaluate, lambda: trainer.predict(trainer.eval_dataset), trainer.train):
        with hidden.register_forward_hook(lambda _module, _args, out: dtypes.append(out.dtype)):
            use()
        for model in models:
            assert vars(model).keys().isdisjoint({"forward", "_original_forward"})
            pickled = pickle.dumps(model)
            assert b"dpo_fast" not in pickled and b"trl." not in pickled
    loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_eval_dataloader())))
    loss.backward()
    assert all(p.grad is not None for p in trainer.model.parameters())
    assert set(dtypes) == {torch.bfloat16 if case == "bf16" else torch.float32}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("when", ["between two uses", "in a use"])
def test_a_forward_that_somebody_wraps_is_kept(tmp_path, bf16, when):
    trainer, calls = trainer_of(DPOTrainer, tmp_path, bf16=bf16), []
    before = trainer.evaluate()["eval_loss"]

    def wrap():
        def wrapped(*args, plain=trainer.model.forward, **kwargs):
            calls.append(1)
            return plain(*args, **kwargs)

        trainer.model.forward = wrapped

    if when == "between two uses":
        wrap()
        assert trainer.evaluate()["eval_loss"] == pytest.approx(before, abs=1e-2 if bf16 else 0)
    else:
        with trainer._models_in_use():
            wrap()
    assert trainer.model.forward.__name__ == "wrapped"
    calls.clear()
    trainer.model(input_ids=torch.tensor([[3, 4]]))
    assert calls == [1]


def test_trl_is_left_as_it_was(tmp_path):
    before = dict(vars(dpo_trainer))
    trainer_of(DPOTrainer, tmp_path)
    with pytest.raises(ValueError, match="train_dataset"):
        DPOTrainer(tiny_model(), args=trl.DPOConfig(output_dir=str(tmp_path), **SETTINGS))
    args = trl.DPOConfig(output_dir=str(tmp_path), padding_free=True, **SETTINGS)
    with pytest.raises(TypeError, match="processing_class"):
        data = datasets.Dataset.from_list(tiny_rows(2))
        DPOTrainer(tiny_model(), None, args, train_dataset=data, processing_class="tokenizer")
    assert args.padding_free
    assert all(vars(dpo_trainer)[name] is value for name, value in before.items())


NEWEST, OLDEST = "add_fused_lm_head", "DPOTrainer.concatenated_forward"


def without_seams(patch):
    patch.delattr(dpo_trainer, "add_fused_lm_head")
    patch.delattr(dpo_trainer.DPOTrainer, "_compute_loss")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_seams, f"none of {NEWEST}, DPOTrainer._compute_loss, {OLDEST}$"),
        (lambda p: p.setattr(dpo_trainer, NEWEST, lambda model: None), f"a {NEWEST} without outputs$"),
        (lambda p: p.delattr(dpo_trainer, NEWEST), "a DPOTrainer._compute_loss that does not use selective_log_soft"),
    ],
)
def test_a_trl_that_is_not_known_is_named(monkeypatch, change, said):
    assert seams.fast_dpo_of(dpo_trainer) is ours.FastDPO
    change(monkeypatch)
    with pytest.raises(
        ImportError, match=f"tested with TRL 0.18 to 1.16; TRL {trl.__version__} is .*, which has.* {said}"
    ):
        seams.fast_dpo_of(dpo_trainer)


def test_a_trl_that_cannot_be_answered_is_named(monkeypatch):
    monkeypatch.delattr("trl.trainer.utils.FusedCausalLMOutput")
    with pytest.raises(ImportError, match="no trl.trainer.utils.FusedCausalLMOutput with aux_loss"):
        ours.check_seam()


def test_a_trl_that_is_too_old_is_named(monkeypatch):
    without_seams(monkeypatch)
    forward = lambda self, model, batch: None  # noqa: E731  # as in 0.17
    monkeypatch.setattr(dpo_trainer.DPOTrainer, "concatenated_forward", forward, raising=False)
    with pytest.raises(ImportError, match="which has a DPOTrainer.concatenated_forward without is_ref_model$"):
        seams.fast_dpo_of(dpo_trainer)


def test_a_trl_that_does_not_use_the_seam_is_named(monkeypatch):
    monkeypatch.setattr(dpo_trainer.DPOTrainer, "__init__", lambda self, model: None)
    with pytest.raises(RuntimeError, match="0.18 to 1.16.*does not call"):
        DPOTrainer(tiny_model())
