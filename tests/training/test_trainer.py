"""`FastDPOTrainer`: what it trains, what it reports, and what it refuses."""

import dataclasses
import functools
import itertools
import logging
import math
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import transformers
from reads import counted_reads
from tiny import QUIET, tiny_chat_rows, tiny_model, tiny_rows, tiny_tokenizer
from trainers import TOKENIZER, fast_trainer

pytest.importorskip("datasets")

import datasets

from dpo_fast import FastDPOConfig, FastDPOTrainer, preference_loss
from dpo_fast.metrics import MetricSums
from dpo_fast.ops import dispatch
from dpo_fast.training.data import TOKEN_COLUMNS, PairCollator, Truncation
from dpo_fast.training.reference_columns import TOKENS
from dpo_fast.training.trainer import NOT_TAKEN


@pytest.fixture
def build(tmp_path):
    """build(model=..., args={...}, ...) -> a trainer on tiny data that writes nowhere else."""

    def make(model=None, train_dataset=None, args=(), **options):
        settings = dict(per_device_train_batch_size=4, learning_rate=1e-3, max_steps=2) | dict(args)
        folder = settings.pop("output_dir", tmp_path)
        return fast_trainer(folder, model, train_dataset, options=options, **settings)

    return make


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lora(**options):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options)


# --- training -----------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(build):
    trainer = build(args=dict(max_steps=12))
    reference = weights(trainer.reference.model)
    trainer.train()
    found = losses(trainer)
    assert abs(found[0] - math.log(2)) < 1e-6 and found[-1] < 0.6
    assert torch.equal(weights(trainer.reference.model), reference)
    assert not torch.equal(weights(trainer.model), reference)


@pytest.mark.parametrize("args", [{}, dict(bf16=True)], ids=["fp32", "bf16"])
def test_after_training_the_model_is_as_before(build, tmp_path, args):
    """It pickles for a process that has never heard of this library, and the trainer goes on working."""
    model, reference = tiny_model(), tiny_model(seed=3)
    marks = {"_is_accelerate_prepared"}  # accelerate's, which every trainer leaves
    before = set(vars(model)), model.config._attn_implementation, list(model.state_dict())
    trainer = build(model, ref_model=reference, eval_dataset=tiny_rows(3), args=args)
    trainer.train()
    for _ in range(2):
        assert set(vars(model)) - marks == before[0] and set(vars(reference)) - marks == before[0]
        assert model.config._attn_implementation == reference.config._attn_implementation == before[1]
        assert list(model.state_dict()) == before[2]
        trainer.evaluate()
    torch.save(model, tmp_path / "model.pt")
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(model.config))
    ids = torch.tensor([[3, 4, 5]])
    program = f"""
import sys; sys.modules["dpo_fast"] = None
import pickle, torch, transformers
model = torch.load("model.pt", weights_only=False)
twin = transformers.AutoModelForCausalLM.from_config(pickle.load(open("config.pkl", "rb")))
twin.load_state_dict(model.state_dict())
ids = torch.tensor({ids.tolist()})
assert torch.equal(twin.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
print(model.generate(ids, max_new_tokens=3, do_sample=False).tolist())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == str(model.eval().generate(ids, max_new_tokens=3, do_sample=False).tolist()).split()
    trainer.train()


def test_the_forward_of_before_comes_back(build):
    """An instance's own, as accelerate leaves it after a training in bf16."""
    model = tiny_model()
    inner = model.forward
    model.forward = own = functools.partial(inner)
    build(model, args=dict(bf16=True)).train()
    assert model.forward is own


def test_liger_s_layers_with_our_head(build, monkeypatch):
    """Its kernels need a GPU; here, what it does to a model: it binds a forward of its own unless told not to."""
    asked = []

    def apply(model, fused_linear_cross_entropy=True, **options):
        asked.append((fused_linear_cross_entropy, options))
        if fused_linear_cross_entropy:
            model.forward = types.MethodType(type(model).forward, model)

    stand_in = types.ModuleType("liger_kernel.transformers")
    stand_in._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    monkeypatch.setattr("transformers.integrations.liger.is_liger_kernel_available", lambda: True)
    trainer = build(args=dict(use_liger_kernel=True, liger_kernel_config={"rope": False}))
    trainer.train()
    assert asked == [(False, {"rope": False})]
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)


def test_a_forward_that_is_replaced_meanwhile_does_not_end_training(build):
    class Replaces(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            model.forward = types.MethodType(type(model).forward, model)

    trainer, plain = build(callbacks=[Replaces()]), build()
    trainer.train()
    plain.train()
    assert losses(trainer) == losses(plain)


def test_logs_have_trl_names(build):
    trainer = build(args=dict(extra_metrics=["entropy", "logits", "mean_token_accuracy"]))
    trainer.train()
    first = trainer.state.log_history[0]
    expected = {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    expected |= {"logps/chosen", "logps/rejected", "entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy"}
    assert expected <= first.keys()
    assert first["rewards/accuracies"] == 0.0 and first["rewards/margins"] == 0.0


def test_one_reduction_and_one_sync_per_log(build, monkeypatch):
    trainer = build(args=dict(max_steps=4, logging_steps=2, gradient_accumulation_steps=2))
    calls = {"reduce": 0, "add": 0}
    reduce, add = trainer.accelerator.reduce, MetricSums.add

    def count_reduce(*args, **kwargs):
        calls["reduce"] += 1
        return reduce(*args, **kwargs)

    def count_add(*args):
        calls["add"] += 1
        return add(*args)

    monkeypatch.setattr(trainer.accelerator, "reduce", count_reduce)
    monkeypatch.setattr(MetricSums, "add", count_add)
    trainer.train()
    assert calls == {"reduce": 2, "add": 8}


LIKELIHOODS = ["sft", "orpo", "cpo", ["simpo", "sft"], ["sigmoid", "sft"]]


@pytest.mark.parametrize("loss", ["sigmoid", *LIKELIHOODS], ids=str)
@pytest.mark.parametrize("rows", [8, 7])
def test_accumulation_equals_one_batch(build, rows, loss):
    """4 micro-batches of 2 pairs, and 2 + 2 + 2 + 1: each pair weighs the same, and in a likelihood each token."""
    args = dict(max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, loss_type=loss)
    whole = build(train_dataset=tiny_rows(rows), args=dict(per_device_train_batch_size=8, **args))
    parts = build(
        train_dataset=tiny_rows(rows),
        args=dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, **args),
    )
    start = weights(whole.model)
    whole.train()
    parts.train()
    moved = (weights(whole.model) - start).norm()
    assert moved > 0.005
    assert (weights(whole.model) - weights(parts.model)).norm() < 1e-5 * moved
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.parametrize(
    "args",
    [
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
        dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}),
        dict(dataloader_num_workers=1),
        dict(dataloader_drop_last=True),
        dict(precompute_ref_log_probs=True, precompute_ref_batch_size=3),
        dict(pad_to_multiple_of=32),
        dict(include_num_input_tokens_seen="non_padding"),
    ],
    ids=lambda args: "-".join(map(str, args)),
)
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_options_that_do_not_change_the_numbers(build, args, adapter):
    options = {"peft_config": lora(init_lora_weights=False)} if adapter else {}
    expected, other = build(**options), build(args=args, **options)
    expected.train()
    other.train()
    assert losses(other) == pytest.approx(losses(expected), abs=2e-6)
    assert losses(expected)[0] != losses(expected)[1]


def test_bf16_autocast(build):
    exact, rough = build(), build(args=dict(bf16=True))
    exact.train()
    rough.train()
    assert losses(rough) != losses(exact)
    assert losses(rough) == pytest.approx(losses(exact), abs=0.02)
    assert abs(losses(rough)[0] - math.log(2)) < 1e-6
    assert rough.model.dtype == torch.float32


def test_bf16_autocast_stays_on_after_the_first_training(build):
    """Of policy and reference, in this trainer and in the next that is given the model."""
    policy, ref, rows = tiny_model(), tiny_model(seed=3), tiny_rows(3)
    seen = {policy: set(), ref: set()}

    def note(dtypes):  # but of the check of the head, which is one row of four tokens
        return lambda _module, _args, out: None if out.shape[:2] == (1, 4) else dtypes.add(out.dtype)

    for model, dtypes in seen.items():
        model.model.layers[0].mlp.register_forward_hook(note(dtypes))
    trainer = build(policy, ref_model=ref, eval_dataset=rows, args=dict(bf16=True))
    uses = [trainer.train, trainer.evaluate, trainer.train, lambda: trainer.predict(trainer.eval_dataset)]
    uses += [lambda: trainer.compute_loss(trainer.model, trainer.data_collator([trainer.eval_dataset[0]]))]
    for use in uses:
        use()
        assert seen == {policy: {torch.bfloat16}, ref: {torch.bfloat16}}
        for dtypes in seen.values():
            dtypes.clear()
    trainer = build(policy, args=dict(bf16=True))
    seen[policy].clear()
    trainer.train()
    assert seen[policy] == {torch.bfloat16}


def test_an_exception_in_a_step_ends_autocast(build):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    model = tiny_model()
    trainer = build(model, args=dict(bf16=True))
    for hooked in (model.model.layers[0].mlp, trainer.reference.model.model.layers[0].mlp):
        with hooked.register_forward_hook(stop), pytest.raises(Stop):
            trainer.train()
        assert not torch.is_autocast_enabled("cpu")


def test_streaming(build):
    rows = tiny_rows(8)
    table, stream = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).to_iterable_dataset()
    args = dict(max_steps=2, train_sampling_strategy="sequential")
    if "train_sampling_strategy" not in FastDPOConfig.__dataclass_fields__:
        pytest.skip("transformers shuffles map-style data here")
    one, other = build(train_dataset=table, args=args), build(train_dataset=stream, args=dict(max_steps=2))
    one.train()
    other.train()
    assert losses(other) == losses(one)


def test_losses_without_reference_have_none(build):
    trainer = build(args=dict(loss_type="simpo"))
    assert trainer.reference is None
    trainer.train()
    assert len(losses(trainer)) == 2


def test_reports_reach_callbacks(build):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    build(callbacks=[Reporter()]).train()
    assert "rewards/margins" in seen[0] and "train_loss" in seen[-1]


def test_model_from_a_path(build, tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    trainer = build(str(tmp_path / "model"), processing_class=None, ref_model=str(tmp_path / "model"))
    assert trainer.model.dtype == torch.float32
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6
    trainer = build(str(tmp_path / "model"), args=dict(model_init_kwargs={"dtype": "bfloat16"}))
    assert trainer.model.dtype == torch.bfloat16


def test_dropout_is_off_unless_asked_for(build):
    def model():
        return tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)

    trainer = build(model())
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6
    trainer = build(model(), args=dict(disable_dropout=False))
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) > 1e-4
    trainer = build(tiny_model(attention_dropout=0.5))  # a number, not a module
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6


def test_an_example_is_printed_on_request(build, capsys):
    build(args=dict(print_example=True))
    assert "chosen (" in capsys.readouterr().out


# --- adapters -----------------------------------------------------------------------------------------------------


def test_new_adapter_has_the_base_model_as_reference(build):
    trainer = build(peft_config=lora(), args=dict(max_steps=6))
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if "lora" not in name}
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) < 1e-6 and losses(trainer)[-1] < losses(trainer)[0]
    assert all(torch.equal(p, base[name]) for name, p in trainer.model.named_parameters() if name in base)


def test_an_adapter_from_its_folder(build, tmp_path):
    """As the model: it is trained further, from its own tokenizer. As the reference: it stays."""
    peft = pytest.importorskip("peft")
    tiny_model().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, lora(init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    loaded, given = build(path, processing_class=None), build(model)
    loaded.train()
    given.train()
    assert losses(loaded) == losses(given) and losses(loaded)[0] == pytest.approx(math.log(2), abs=1e-6)
    both = build(path, ref_model=path)
    assert not any(p.requires_grad for p in both.reference.model.parameters())
    both.train()
    assert losses(both) == pytest.approx(losses(given), abs=1e-6)
    with pytest.raises(ValueError, match="got a PEFT model and a peft_config"):
        build(path, peft_config=lora())


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[5]),
            "an activated LoRA, which starts at a token of each row; use LoRA, or dpo_fast.trl.DPOTrainer",
        ),
        (
            lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "PROMPT_TUNING: prompt learning changes positions; use LoRA, or dpo_fast.trl.DPOTrainer",
        ),
        (lambda peft: peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2), "POLY, which needs"),
    ],
    ids=["alora", "prompt", "poly"],
)
def test_adapters_that_cannot_be_scored_are_refused(build, make, reason):
    with pytest.raises(ValueError, match=reason):
        build(peft_config=make(pytest.importorskip("peft")))


def test_explicit_reference_for_an_adapter(build):
    trainer = build(peft_config=lora(), ref_model=tiny_model(seed=5))
    trainer.train()
    assert abs(losses(trainer)[0] - math.log(2)) > 1e-4


# --- evaluation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_evaluation_weighs_pairs_equally(build, streaming):
    rows = datasets.Dataset.from_list(tiny_rows(7, seed=3))
    trainer = build(
        eval_dataset=rows.to_iterable_dataset() if streaming else rows,
        ref_model=tiny_model(seed=7),
        args=dict(per_device_eval_batch_size=3),
    )
    found = trainer.evaluate()
    assert trainer.evaluation_loop(trainer.get_eval_dataloader(), "again").num_samples == 7
    whole = trainer.data_collator(list(trainer.eval_dataset))
    with torch.no_grad():
        step = trainer.run_step(trainer.model, whole)
    pairs = step.pairs
    expected = preference_loss(pairs.chosen, pairs.rejected, pairs.ref_chosen, pairs.ref_rejected)
    assert found["eval_loss"] == pytest.approx(expected.mean().item(), rel=1e-6)
    assert found["eval_rewards/margins"] == pytest.approx(0.1 * pairs.margin.mean().item(), rel=1e-4)
    assert found["eval_logps/chosen"] == pytest.approx(pairs.chosen.mean().item(), rel=1e-6)


@pytest.mark.parametrize("loss", LIKELIHOODS, ids=str)
def test_evaluation_does_not_depend_on_its_batches(build, loss):
    found = {}
    for size in (7, 3, 1):
        args = dict(per_device_eval_batch_size=size, loss_type=loss)
        found[size] = build(eval_dataset=tiny_rows(7, seed=3), args=args).evaluate()
        assert not [name for name in found[size] if "likelihood" in name]
    losses = [metrics["eval_loss"] for metrics in found.values()]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-6)


def test_evaluation_during_training_and_of_other_data(build):
    trainer = build(
        eval_dataset={"text": tiny_rows(3), "chat": tiny_chat_rows(3)},
        args=dict(eval_strategy="steps", eval_steps=1, logging_steps=2),
    )
    trainer.train()
    assert sum("rewards/margins" in log for log in trainer.state.log_history) == 1
    assert any("eval_chat_rewards/margins" in log for log in trainer.state.log_history)
    assert all("eval" not in key for log in trainer.state.log_history if "loss" in log for key in log)
    found = trainer.evaluate(tiny_rows(5, seed=9))
    assert {"eval_loss", "eval_rewards/accuracies", "eval_runtime"} <= found.keys()
    assert "test_loss" in trainer.evaluate(trainer.eval_dataset["chat"], metric_key_prefix="test")
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate({"a": tiny_rows(2), "b": tiny_rows(2)}).keys()


def test_there_are_no_logits(build):
    trainer = build()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss, logits, labels = trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only=False)
    assert loss.shape == () and not loss.requires_grad and logits is None and labels is None
    assert trainer.predict(trainer.train_dataset).predictions is None


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("knobs", [{}, dict(ld_alpha=0.3), dict(use_weighting=True)], ids=str)
def test_precomputed_reference(build, knobs, layout):
    """Token by token, so that weights of tokens and exact log-ratios are those of a reference that runs along."""
    eval_rows = tiny_rows(4, seed=2)
    plain = build(eval_dataset=eval_rows, args=dict(**knobs, layout=layout))
    ahead = build(eval_dataset=eval_rows, args=dict(**knobs, layout=layout, precompute_ref_log_probs=True))
    plain.train()
    ahead.train()
    # A token's log-prob differs by roundings, as its batch has other companions
    assert losses(ahead) == pytest.approx(losses(plain), abs=2e-7)
    if knobs.get("use_weighting") is None:
        assert losses(ahead)[0] == pytest.approx(math.log(2), abs=1e-7)
    assert ahead.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=1e-6)
    with pytest.raises(ValueError, match="reference model is gone"):
        ahead.evaluate(tiny_rows(2))


def test_precomputed_tokens_of_another_truncation_are_refused(build):
    trainer = build(args=dict(precompute_ref_log_probs=True))
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows[:3])
    for sequence, pair in enumerate(batch.compared().index.T.flatten().tolist()):
        side, row = TOKENS[sequence // 3], rows[pair % 3]
        assert batch.reference_token_logps[batch.sequence_ids == pair].tolist() == pytest.approx(row[side])
    shorter = dataclasses.replace(trainer.data_collator, truncation=Truncation(max_completion_length=1))
    with pytest.raises(ValueError, match="they were computed with another truncation"):
        shorter(rows[:3])


# --- refusals -----------------------------------------------------------------------------------------------------


def test_same_object_as_policy_and_reference(build):
    model = tiny_model()
    with pytest.raises(ValueError, match="ref_model is the same object as model"):
        build(model, ref_model=model)
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, lora())
    with pytest.raises(ValueError, match="ref_model is the same object as model"):
        build(adapted, ref_model=model)


def test_bad_arguments(build, monkeypatch):
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match="args must be a FastDPOConfig, .* got TrainingArguments"):
        FastDPOTrainer(tiny_model(), args=transformers.TrainingArguments(use_cpu=True, report_to="none"))
    with pytest.raises(ValueError, match="processing_class is needed"):
        build(processing_class=None)
    with pytest.raises(TypeError, match="peft_config must be a peft.PeftConfig"):
        build(peft_config={"r": 4})
    with pytest.raises(ValueError, match="got a PEFT model and a peft_config"):
        build(peft.get_peft_model(tiny_model(), lora()), peft_config=lora())
    with pytest.raises(ValueError, match="prompt learning"):
        build(peft_config=peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match="expected a Hugging Face causal language model"):
        build(tiny_model().model)
    with pytest.raises(ValueError, match="dataset is a stream"):
        rows = datasets.Dataset.from_list(tiny_rows(4)).to_iterable_dataset()
        build(train_dataset=rows, args=dict(precompute_ref_log_probs=True))
    with pytest.raises(ValueError, match="dispatch_batches must not be True"):
        build(args=dict(accelerator_config={"dispatch_batches": True}))
    monkeypatch.setattr(FastDPOConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match="2 devices are visible to one process"):
        build()


@pytest.mark.parametrize(
    "device_map, refused",
    [(None, True), ({"": "cpu"}, True), ({"model": 0, "lm_head": 1}, False)],
    ids=["no map", "a map to one device", "spread over two"],
)
def test_two_visible_devices(tmp_path, device_map, refused):
    """transformers would put nn.DataParallel around the model, unless it is spread over them."""
    args, model = FastDPOConfig(output_dir=str(tmp_path), **QUIET), tiny_model()
    args._n_gpu = 2
    if device_map:
        model.hf_device_map = device_map
    make = functools.partial(FastDPOTrainer, model, args=args, train_dataset=tiny_rows(8), processing_class=TOKENIZER)
    if refused:
        with pytest.raises(ValueError, match="2 devices are visible to one process, .* nn.DataParallel, .* torchrun"):
            make()
    else:
        make()
        assert args.n_gpu == 1


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_arguments_of_other_trainers_are_refused_by_name(build, name):
    with pytest.raises(TypeError, match=f"FastDPOTrainer takes no {name}: "):
        build(**{name: object()})
    build(**{name: None})
    with pytest.raises(TypeError, match="FastDPOTrainer takes no argument compute_metric$"):
        build(compute_metric=None)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("beta", "put it into FastDPOConfig"),
        ("ref_adapter_name", "leave it out: the reference is the policy before"),
        ("max_target_length", "write max_completion_length"),
    ],
)
def test_arguments_of_older_trls_say_where_they_went(build, name, hint):
    with pytest.raises(TypeError, match=f"FastDPOTrainer takes no argument {name}: {hint}"):
        build(**{name: 1})


@pytest.mark.slow
@pytest.mark.parametrize("args", [{}, dict(gradient_checkpointing=True)], ids=str)
def test_compiled(build, args):
    """In one graph each, also where an evaluation comes after the training."""
    plain = build(args=args, eval_dataset=tiny_rows(3))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    other = build(args=dict(torch_compile=True, torch_compile_backend="eager", **args), eval_dataset=tiny_rows(3))
    for trainer in (plain, other):
        trainer.train()
    assert losses(other) == pytest.approx(losses(plain), abs=5e-7)
    assert other.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], abs=5e-7)
    assert not [reason for reason in torch._dynamo.utils.counters["graph_break"] if "dpo_fast" in reason]


def test_a_collator_that_makes_something_else_is_refused(build):
    pad = transformers.DataCollatorWithPadding(TOKENIZER)
    with pytest.raises(TypeError, match="data_collator .DataCollatorWithPadding. must make a PreferenceBatch .*raises"):
        build(data_collator=pad)
    with pytest.raises(TypeError, match="columns prompt_ids, .*it makes a list. Omit it to have one"):
        build(data_collator=list)
    with pytest.raises(TypeError, match="data_collator must be callable, got int"):
        build(data_collator=3)
    ours = build().data_collator
    build(data_collator=lambda rows: ours(rows)).train()


def test_a_model_that_does_not_train_is_refused(build, tmp_path):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path / "adapter")
    frozen = peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="no parameter of the model trains.*is_trainable=True"):
        build(frozen)
    with pytest.raises(ValueError, match="all have requires_grad=False"):
        build(tiny_model().requires_grad_(False))
    build(peft.PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)).train()


@pytest.mark.parametrize("kwargs", [{"torch_dtype": "bfloat16"}, {"dtype": "bf16"}, {"dtype": torch.bfloat16}])
def test_dtype_by_its_names(build, tmp_path, kwargs):
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = build(str(tmp_path / "model"), ref_model=str(tmp_path / "model"), args=dict(model_init_kwargs=kwargs))
    assert {trainer.model.dtype, trainer.reference.model.dtype} == {torch.bfloat16}
    for bad in ("bf17", "int64", "nn", 16):
        with pytest.raises(ValueError, match=f"dtype in model_init_kwargs must be .* got {bad!r}"):
            build(str(tmp_path / "model"), args=dict(model_init_kwargs=dict.fromkeys(kwargs, bad)))


def test_rows_that_a_model_cannot_take_are_refused_before_the_first_step(build):
    rows, ids = tiny_rows(3), dict(prompt_ids=[3], chosen_ids=[4] * 90, rejected_ids=[5])
    with pytest.raises(ValueError, match=r"row 0: prompt \+ chosen holds the token id \d+, .* embedding has 100 rows"):
        build(tiny_model(vocab_size=100), train_dataset=rows)
    with pytest.raises(ValueError, match="embedding has 100 rows"):
        build(ref_model=tiny_model(vocab_size=100), train_dataset=rows)
    with pytest.raises(ValueError, match="row 1: .* has 91 tokens, the model has 64 positions; max_length=64"):
        build(tiny_model("gpt2", n_positions=64), train_dataset=[dict(ids, chosen_ids=[4]), ids])
    build(tiny_model("gpt2", n_positions=64), train_dataset=[ids], args=dict(max_length=64)).train()
    with pytest.raises(ValueError, match="row 0: .* the model has 64 positions"):
        build(tiny_model("gpt2", n_positions=64), eval_dataset=[ids])


def test_template_options_for_all_rows(build):
    tokenizer = tiny_tokenizer(chat_template="{{ mood }}" + TOKENIZER.chat_template)
    for options in ({"mood": "merry "}, '{"mood": "merry "}'):
        trainer = build(
            train_dataset=tiny_chat_rows(2), processing_class=tokenizer, args=dict(chat_template_kwargs=options)
        )
        assert tokenizer.decode(trainer.train_dataset[0]["prompt_ids"]).startswith("merry <|user|>")
    with pytest.raises(ValueError, match="chat_template_kwargs must be a mapping"):
        build(args=dict(chat_template_kwargs="[1]"))


def test_predict_takes_what_evaluate_takes(build):
    raw = datasets.Dataset.from_list([{"prompt": "a", "chosen": "bc", "rejected": "d"}] * 3)
    trainer = build(eval_dataset=raw)
    expected = trainer.evaluate()
    for data in (raw, trainer.eval_dataset):
        found = trainer.predict(data, metric_key_prefix="eval")
        assert found.predictions is None
        for name in ("eval_loss", "eval_rewards/margins"):
            assert found.metrics[name] == expected[name]


def test_triton_is_not_replaced_in_silence(build, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    trainer = build(args=dict(impl="triton"))
    with pytest.raises(ValueError, match="impl='triton' cannot run: .*'cpu'"):
        trainer.train()


def test_resuming_from_something_else(build, tmp_path):
    trainer = build()
    with pytest.raises(ValueError, match="not a checkpoint of this training: .*no such directory"):
        trainer.train(resume_from_checkpoint=tmp_path / "nowhere")
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no trainer_state.json \(there: config.json"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "model"))
    other = build(tiny_model("gpt2"), args=dict(save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "gpt2")))
    other.train()
    with pytest.raises(ValueError, match="holds a 'gpt2' model, this trainer a 'llama'"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "gpt2" / "checkpoint-2"))
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        build(peft_config=lora()).train(resume_from_checkpoint=str(tmp_path / "gpt2" / "checkpoint-2"))


def test_dropped_pairs_are_said(build, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        build(train_dataset=[*tiny_rows(4), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert any("train dataset: 1 of 5 pairs dropped" in message for message in caplog.messages)


def test_pairs_that_ranks_take_twice_are_told_of(tmp_path, caplog, monkeypatch):
    trainer = fast_trainer(tmp_path, per_device_train_batch_size=3)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        trainer._say_what_repeats()
    assert "its first 4 pairs are taken again" in caplog.text and "leaves out the last 2 instead" in caplog.text
    caplog.clear()
    for settings in (dict(per_device_train_batch_size=4), dict(dataloader_drop_last=True), dict(tokens_per_batch=99)):
        vars(trainer.args).update(settings)
        trainer._say_what_repeats()
        vars(trainer.args).update(per_device_train_batch_size=3, dataloader_drop_last=False, tokens_per_batch=None)
    assert not caplog.text


# --- the host keeps out of the way -----------------------------------------------------------------------------------


def test_workers_pack_and_arrays_come_from_the_data(build, monkeypatch):
    """No batch is made in this process, and none of lists; the losses are those of lists, bit for bit."""
    curves, seen, collate = [], [], PairCollator.__call__

    def noted(self, rows):
        seen.append({type(row[name]) for row in rows for name in TOKEN_COLUMNS})
        return collate(self, rows)

    monkeypatch.setattr(PairCollator, "__call__", noted)
    for options in ({}, dict(dataloader_num_workers=1), dict(tokens_per_batch=60), {"as_lists": True}):
        seen.clear()
        as_lists = options.pop("as_lists", False)
        trainer = build(args=dict(max_steps=4, **options))
        if as_lists:
            monkeypatch.setattr(trainer, "_as_arrays", lambda dataset: dataset)
        trainer.train()
        assert (
            seen == []
            if options.get("dataloader_num_workers")
            else {list if as_lists else np.ndarray} == set().union(*seen)
        )
        curves.append(losses(trainer))
    assert curves[0] == curves[1] == curves[3] and len(curves[0]) == 4


def test_lists_where_somebody_else_reads_the_rows(build):
    """A collator of one's own may add lists up, and a transform of the data is not replaced."""

    class WithBegin(PairCollator):
        def __call__(self, rows):
            return super().__call__([{**row, "prompt_ids": [3] + row["prompt_ids"]} for row in rows])

    trainer = build(args=dict(max_steps=1))
    trainer.data_collator = WithBegin(2)
    begun = next(iter(trainer.get_train_dataloader()))
    assert begun.input_ids[:, 0].tolist() == [3] * len(begun.input_ids)
    trainer = build(args=dict(max_steps=1))
    changed = trainer.train_dataset.with_transform(
        lambda rows: {**rows, "prompt_ids": [[3, 3, 3] for _ in rows["prompt_ids"]]}
    )
    assert next(iter(trainer.get_test_dataloader(changed))).input_ids[0, :3].tolist() == [3, 3, 3]


# what a step has besides -> the settings
STEPS = {
    "plain": {},
    "statistics": dict(extra_metrics=["entropy", "logits", "mean_token_accuracy"]),
    "likelihood, weights, accumulated": dict(
        loss_type=["sigmoid", "sft"], use_weighting=True, gradient_accumulation_steps=2
    ),
    "padded": dict(layout="padded"),
    "tail weighted": dict(ld_alpha=0.5),
    "noise": dict(neftune_noise_alpha=5.0),
    "checkpointing": dict(gradient_checkpointing=True),
}


def experts() -> dict:
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    return dict(model=tiny_model("qwen3_moe", **sizes, output_router_logits=True))


@pytest.mark.parametrize("name", [*STEPS, "adapter", "experts", "reference with the data"])
def test_no_step_waits_for_the_device(name, build, monkeypatch):
    """Whole steps, CPU tensors for the device's: nothing is read between two logs, but by transformers, which looks
    whether a mask of padded rows hides anything."""
    options = {"adapter": lambda: dict(peft_config=lora()), "experts": experts}.get(name, dict)()
    settings = STEPS.get(name, {}) | dict(precompute_ref_log_probs=name == "reference with the data")
    trainer = build(args=dict(max_steps=2, **settings), **options)
    trainer.train()  # the probe, and all that is done once
    batches = [*itertools.islice(trainer.get_train_dataloader(), 2)]
    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    trainer.current_gradient_accumulation_steps = 1
    trainer._sums["train"], trainer._losses.steps = MetricSums(), []
    with trainer._models_in_use(), counted_reads() as (reads, stream):
        _, pairs = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
        for batch in batches:
            trainer.training_step(trainer.model, batch, num_items_in_batch=pairs)
    assert set(reads) == ({"transformers"} if name in ("padded", "noise") else set()), reads
    assert stream.kernels and trainer._sums["train"].sums[1, 0] == pairs and len(trainer._losses.steps) == 2
