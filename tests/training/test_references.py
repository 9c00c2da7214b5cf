"""The reference of `FastDPOTrainer` is what the model was before training, and the first step proves it."""

import copy
import logging
import math
import types

import pytest
import torch
from tiny import tiny_model, tiny_rows
from trainers import fast_trainer

pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import datasets  # noqa: E402

from dpo_fast import reference  # noqa: E402
from dpo_fast.batch import PreferenceBatch  # noqa: E402
from dpo_fast.training import reference_columns, references  # noqa: E402
from dpo_fast.training.data import PairCollator, Truncation  # noqa: E402
from dpo_fast.training.reference_columns import DataColumns  # noqa: E402


@pytest.fixture
def build(tmp_path):
    """build(model, peft_config=..., ...) -> a trainer of 4 pairs; other keywords are settings."""

    def make(model, train_dataset=None, peft_config=None, ref_model=None, eval_dataset=None, **settings):
        settings = dict(per_device_train_batch_size=4, learning_rate=2e-2, max_steps=4) | settings
        options = dict(ref_model=ref_model, eval_dataset=eval_dataset, peft_config=peft_config)
        rows = tiny_rows(4) if train_dataset is None else train_dataset
        return fast_trainer(tmp_path / "out", model, rows, options=options, **settings)

    return make


def model(**overrides):
    """A model with large weights, so that what an adapter makes of them matters."""
    model = tiny_model(**overrides)
    for p in model.parameters():
        p.data.mul_(4 if p.ndim > 1 else 1)
    return model


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options})


def adapted(**options):
    return peft.get_peft_model(model(), lora(**{"init_lora_weights": False, **options}))


def unfrozen(adapted, *words):
    for name, p in adapted.named_parameters():
        if any(word in name for word in words) and "lora" not in name:
            p.requires_grad_(True)
    return adapted


def two_adapters(name="second", config=None):
    both = adapted()
    both.add_adapter(name, config or lora(init_lora_weights=False))
    both.base_model.set_adapter(["default", name])
    return both


def with_a_frozen_one():
    """The trained adapter on top of one that does not train."""
    both = two_adapters()
    for name, p in both.named_parameters():
        if ".default." in name:
            p.requires_grad_(False)
    return both


def called(name):
    given = peft.get_peft_model(model(), lora(init_lora_weights=False), adapter_name=name)
    given.add_adapter("other", lora(init_lora_weights=False))
    return given


def ada(adapter="given"):
    config = peft.AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=9, init_r=4, target_r=1, tinit=1, tfinal=1, target_modules=["q_proj"]
    )
    if adapter == "new":
        return config
    given = peft.get_peft_model(model(), config)
    for name, p in given.named_parameters():
        if "lora_E" in name:
            p.data.fill_(2.0)  # trained before
    return given


def logps(model, trainer):
    """Log-probs of chosen and rejected of the training data under plain forwards."""
    found = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in trainer.train_dataset:
            ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
            with torch.no_grad():
                log_p = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            found.append(log_p[len(row["prompt_ids"]) - 1 :].sum())
    return torch.stack(found)


def reference_logps(trainer):
    return trainer.reference_scores(trainer.model, trainer.data_collator(list(trainer.train_dataset))).logps


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


GIVEN = {
    "adapter": adapted,
    "norms": lambda: unfrozen(peft.get_peft_model(model(), lora()), "norm"),
    "embeddings, head": lambda: unfrozen(adapted(), "embed_tokens", "lm_head"),
    "saved modules, norms": lambda: unfrozen(adapted(modules_to_save=["lm_head"]), "norm"),
    "biases": lambda: peft.get_peft_model(model(attention_bias=True), lora(bias="all")),
    "dora": lambda: adapted(use_dora=True),
    "pissa": lambda: adapted(init_lora_weights="pissa"),
    "olora": lambda: adapted(init_lora_weights="olora"),
    "two": two_adapters,
    "two, one frozen": with_a_frozen_one,
    "called reference": lambda: called("reference"),
    "ia3": lambda: peft.get_peft_model(model(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "adalora": ada,
    "all weights": model,
    "few weights": lambda: unfrozen(model().requires_grad_(False), "layers.1"),
}


def actives(model):
    return list(model.active_adapters) if isinstance(model, peft.PeftModel) else []


def trained(trainer):
    """Train; returns the names of the parameters that moved."""
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    return {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}


SLOW = {
    "dora",
    "olora",
    "ia3",
    "saved modules, norms",
    "two, one frozen",
    "few weights",
    "pissa_niter",
    "saved modules",
}


def names_of(cases):
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in cases]


@pytest.mark.parametrize("name", names_of(GIVEN))
def test_of_a_model_that_is_given(build, name):
    given = GIVEN[name]()
    trainable = {name for name, p in given.named_parameters() if p.requires_grad}
    before, active = copy.deepcopy(given), actives(given)
    names = set(given.state_dict())
    trainer = build(given)
    expected = logps(before, trainer)
    assert torch.allclose(reference_logps(trainer), expected, atol=1e-4)
    moved = trained(trainer)
    assert torch.allclose(reference_logps(trainer), expected, atol=1e-4)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (logps(given, trainer) - expected).abs().max() > 1e-3
    # The model is as it was but for what trains
    assert moved <= trainable and len(moved) > 0.5 * len(trainable)
    assert {name for name, p in given.named_parameters() if p.requires_grad} == trainable
    assert set(given.state_dict()) == names
    assert actives(given) == active


def test_what_is_not_saved_is_said(build, caplog):
    build(unfrozen(adapted(), "norm"))
    assert (
        "5 parameters train that belong to no adapter (base_model.model.model.layers.0.input_layernorm" in caplog.text
    )
    caplog.clear()
    build(model(attention_bias=True), peft_config=lora(bias="all"))
    assert "belong to no adapter" not in caplog.text


NEW = {
    "plain": lora(),
    "pissa": lora(init_lora_weights="pissa"),
    "pissa_niter": lora(init_lora_weights="pissa_niter_4"),
    "olora": lora(init_lora_weights="olora"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "biases": lora(bias="all"),
    "saved modules": lora(modules_to_save=["lm_head", "norm"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "adalora": ada("new"),
}


@pytest.mark.parametrize("name", names_of(NEW))
@pytest.mark.filterwarnings("error:Careful, disabling adapter layers")
def test_of_a_new_adapter(build, name):
    if name == "orthogonal" and "orthogonal" not in str(peft.LoraConfig.__dataclass_fields__["init_lora_weights"].type):
        pytest.skip(f"peft {peft.__version__} has no such initialisation")
    plain = model(attention_bias=name == "biases")
    before = copy.deepcopy(plain)
    trainer = build(plain, peft_config=NEW[name])
    expected = logps(before, trainer)
    assert torch.allclose(reference_logps(trainer), expected, atol=2e-3)  # PiSSA's rounding, and none of its weights
    start = reference_logps(trainer)
    trainer.train()
    assert torch.equal(reference_logps(trainer), start)
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert (logps(trainer.model, trainer) - expected).abs().max() > 1e-3


def test_ranks_that_are_taken_away(build):
    """AdaLoRA masks ranks in training; loading puts smaller parameters in the place of those and changes the scale."""
    trainer = build(ada())
    start = reference_logps(trainer)
    trainer.train()
    tuner = trainer.model.base_model
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    for step in range(1, 9):
        tuner.update_and_allocate(step)
    tuner.resize_modules_by_rank_pattern(tuner.peft_config["default"].rank_pattern, "default")
    layers = [layer.self_attn.q_proj for layer in tuner.model.model.layers]
    assert min(layer.lora_E["default"].shape[0] for layer in layers) < 4
    for layer in layers:
        layer.ranknum["default"].fill_(1.0)
    assert torch.equal(reference_logps(trainer), start)


def test_rewriting_twice_is_refused(build):
    base = model()
    build(base, peft_config=lora(init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="held adapters already .* load the model anew"):
        build(base, peft_config=lora(init_lora_weights="pissa"))
    plain = model()
    first, second = (build(plain, peft_config=lora()) for _ in range(2))  # this one is made anew
    assert torch.equal(reference_logps(first), reference_logps(second))


def test_rounds_on_one_object(build, tmp_path):
    given, starts = adapted(), []
    for _round in range(3):
        trainer = build(given)
        now = logps(given, trainer)
        assert torch.allclose(reference_logps(trainer), now, atol=1e-4)
        trainer.train()
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
        starts.append(now)
    assert not torch.allclose(starts[0], starts[1], atol=0.1)
    trainer.save_model(str(tmp_path / "saved"))
    assert not [path for path in (tmp_path / "saved").iterdir() if path.is_dir()]
    assert list(given.peft_config) == ["default"]


def test_resuming_keeps_all_active_adapters(build, tmp_path):
    settings = dict(save_strategy="steps", save_steps=2)
    torch.manual_seed(0)
    start = two_adapters()
    whole = build(copy.deepcopy(start), **settings)
    whole.train()
    resumed = build(copy.deepcopy(start), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert list(resumed.model.active_adapters) == ["default", "second"]
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.requires_grad == theirs.requires_grad


def patch(model):
    """What TRL's trainers do to the models that they train."""
    before = model.forward

    def forward(self, *args, **kwargs):
        return before(*args, **kwargs)

    model.forward = types.MethodType(forward, model)


@pytest.mark.parametrize("attached", [True, False])
def test_after_somebody_has_replaced_the_forward(build, attached):
    plain = model()
    if attached:
        build(plain).train()
    patch(plain)
    trainer = build(plain)
    start = reference_logps(trainer)
    trainer.train()
    assert torch.equal(reference_logps(trainer), start)
    assert losses(trainer)[-1] < losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_dispatched_model(build):
    """As with device_map: accelerate has replaced `to`, which its own `prepare_model` calls."""
    import accelerate

    trainer = build(accelerate.dispatch_model(model(), {"": "cpu"}, force_hooks=True))
    assert trainer.reference.model is not trainer.model
    start = reference_logps(trainer)
    trainer.train()
    assert torch.equal(reference_logps(trainer), start)
    assert losses(trainer)[-1] < losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_copies_of_a_patched_model(build):
    """Neither the policy nor the reference is the model whose forward their forwards hold."""
    plain = model()
    patch(plain)
    trainer = build(copy.deepcopy(plain), ref_model=copy.deepcopy(plain))
    start = reference_logps(trainer)
    trainer.train()
    assert torch.equal(reference_logps(trainer), start)
    assert losses(trainer)[-1] < losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.allclose(logps(plain, trainer), start, atol=1e-4)


@pytest.mark.parametrize("config", [None, lora()])
def test_shared_memory_is_refused(build, config):
    plain = model()
    with pytest.raises(ValueError, match="shares the memory"):
        build(plain, ref_model=copy.copy(plain), peft_config=config)


# --- the proof -----------------------------------------------------------------------------------------------------


def shifted(trainer):
    """Change the policy behind the trainer's back."""
    for p in trainer.model.parameters():
        p.data.add_(torch.randn_like(p) * 0.2 * p.std())
    return trainer


@pytest.mark.parametrize("make", [model, adapted], ids=["full", "adapter"])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_reference_that_is_another_model_is_refused(build, make, bf16):
    trainer = shifted(build(make(), bf16=bf16))
    with pytest.raises(
        RuntimeError, match=r"the reference is not the model that training starts from: .* nats per token"
    ):
        trainer.train()
    assert not losses(trainer)


def test_a_new_adapter_that_is_not_the_identity(build, caplog):
    trainer = build(model(), peft_config=lora())
    trainer.reference = reference.InitialPolicy(reference.Snapshot())
    trainer.reference.weights = reference.Snapshot.of(trainer.model, {id(trainer.model.get_output_embeddings().weight)})
    trainer.reference.weights.kept[0].copy.data.mul_(1.1)
    with pytest.raises(RuntimeError, match="policy PeftModel, reference InitialPolicy"):
        trainer.train()
    trainer = build(model(), peft_config=lora(init_lora_weights=False))  # asked for; the reference is the base model
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        trainer.train()
    assert "the new adapter (LORA) does not start as the identity" in caplog.text


def test_when_nothing_is_to_be_proven(build, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(references, "check_start", lambda *args: calls.append(args))
    build(model(), ref_model=model(seed=1)).train()
    build(model(), loss_type="simpo").train()
    build(model(), train_dataset=scored_rows()).train()
    trainer = build(model())
    trainer.compute_loss(trainer.model.train(), trainer.data_collator(list(trainer.train_dataset)))
    trainer.evaluate(tiny_rows(2))
    assert not calls
    trainer = build(model(), save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.train()  # goes on with a policy that has moved
    assert len(calls) == 1
    build(model(), save_strategy="steps").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert len(calls) == 1


def test_the_proof_is_one_forward(build):
    trainer, seen = build(adapted(lora_dropout=0.5), max_steps=2, disable_dropout=False), []
    trainer.model.get_base_model().model.register_forward_hook(lambda module, *_: seen.append(module.training))
    trainer.train()
    assert seen == [False, False, True, False, True]


def test_what_rounding_explains():
    exact = torch.linspace(-9, -1, 200)
    rough = exact.bfloat16().float()
    distance, budget = references.disagreement(rough, exact, torch.finfo(torch.bfloat16).eps)
    assert 0 < distance < budget
    distance, budget = references.disagreement(rough, exact, torch.finfo(torch.float32).eps)
    assert distance > 10 * budget
    distance, budget = references.disagreement(exact * torch.nan, exact, 1.0)
    assert not distance <= budget
    assert references.disagreement(exact[:0], exact[:0], 1.0) == (0, 0)


# --- sharded models ------------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(monkeypatch):
    monkeypatch.setattr(references, "is_sharded", lambda accelerator: True)


@pytest.mark.parametrize("init", [False, "pissa"])
def test_a_sharded_adapter_is_copied(build, sharded, tmp_path, init):
    given = adapted(init_lora_weights=init)
    given.add_adapter("reference_1", lora(init_lora_weights=False))
    before = copy.deepcopy(given)
    trainer = build(given)
    expected = logps(before, trainer)
    assert torch.equal(logps(given, trainer), expected)
    assert isinstance(trainer.reference, reference.FrozenAdapter) and trainer.reference.adapter == "reference_2"
    trainer.train()
    assert torch.allclose(reference_logps(trainer), expected, atol=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    assert [path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()] == ["reference_1"]
    assert "reference_2" in given.peft_config


def test_what_a_sharded_model_cannot_have(build, sharded):
    with pytest.raises(ValueError, match="2 adapters are active"):
        build(two_adapters())
    with pytest.raises(ValueError, match="5 parameters train that belong to no adapter"):
        build(unfrozen(adapted(), "norm"))
    with pytest.raises(ValueError, match="parameters train that belong to no adapter"):
        build(model(attention_bias=True), peft_config=lora(bias="all"))
    with pytest.raises(ValueError, match="an adapter that starts as the identity"):
        build(model(), peft_config=lora(init_lora_weights="olora"))
    assert isinstance(build(model(), peft_config=lora()).reference, reference.AdapterOff)
    assert isinstance(build(two_adapters(), train_dataset=scored_rows()).reference, DataColumns)


# --- log-probs that come with the data -----------------------------------------------------------------------------


def scored_rows(value=-3.0):
    return [{**row, "ref_chosen_logps": value, "ref_rejected_logps": -5.0} for row in tiny_rows(4)]


def test_columns_are_the_reference(build, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        trainer = build(model(), train_dataset=scored_rows())
    assert "reference log-probs come from the data: its columns ref_chosen_logps, ref_rejected_logps" in caplog.text
    assert isinstance(trainer.reference, DataColumns)  # no copy is made
    assert reference_logps(trainer).tolist() == [-3.0] * 4 + [-5.0] * 4
    assert build(model(), train_dataset=scored_rows(), eval_dataset=tiny_rows(2)).evaluate()["eval_loss"] > 0


def test_columns_and_a_reference_model(build):
    with pytest.raises(ValueError, match="got ref_model and data with the columns ref_chosen_logps"):
        build(model(), train_dataset=scored_rows(), ref_model=model())
    with pytest.raises(ValueError, match="got ref_model and data with the columns"):
        build(model(), eval_dataset={"a": scored_rows()}, ref_model=model())
    with pytest.raises(ValueError, match="got ref_model and data with the columns"):
        build(model(), ref_model=model()).evaluate(scored_rows())
    build(model(), train_dataset=scored_rows(), ref_model=model(), loss_type="simpo")  # needs no reference


@pytest.mark.parametrize("ref_model", [None, "another"])
def test_precomputing_replaces_columns(build, caplog, ref_model):
    other = model(seed=3) if ref_model else None
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        trainer = build(model(), train_dataset=scored_rows(), ref_model=other, precompute_ref_log_probs=True)
    assert "the columns ref_chosen_logps, ref_rejected_logps of the data are replaced" in caplog.text
    assert torch.allclose(reference_logps(trainer), logps(other or model(), trainer), atol=1e-4)


def test_precomputing_has_no_dropout(build):
    dropping = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    trainer = build(dropping, precompute_ref_log_probs=True, disable_dropout=False, layout="padded")
    assert torch.allclose(reference_logps(trainer), logps(dropping, trainer), atol=1e-4)


def test_columns_hold_sums_which_cannot_be_weighed(build):
    with pytest.raises(ValueError, match="ld_alpha=0.5 weighs tokens, but the columns .* hold sums: remove them"):
        build(model(), train_dataset=scored_rows(), ld_alpha=0.5)
    assert reference_logps(build(model(), train_dataset=scored_rows(), ld_alpha=1.0)).tolist()[0] == -3.0
    build(model(), train_dataset=scored_rows(), ld_alpha=0.5, precompute_ref_log_probs=True).train()


def test_columns_of_pairs_that_are_cut(build, caplog):
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        build(model(), train_dataset=scored_rows(), max_completion_length=1)
    assert (
        "are cut to length: their columns ref_chosen_logps, ref_rejected_logps must be of what is left" in caplog.text
    )


def test_columns_of_a_batch():
    rows = [dict(prompt_ids=[5], chosen_ids=[6], rejected_ids=[7], ref_chosen_logps=-1.5, ref_rejected_logps=-2.5)] * 2
    batch = PairCollator(0, Truncation())(rows)
    assert batch.reference_logps.dtype == torch.float32
    assert DataColumns()(None, batch).logps.tolist() == [-1.5, -1.5, -2.5, -2.5]
    without = {name: value for name, value in rows[0].items() if not name.startswith("ref")}
    assert not reference_columns.serve(PairCollator(0, Truncation())([without]))
    assert not reference_columns.serve(PreferenceBatch(reference_logps=None))  # of somebody's own builder
    with pytest.raises(ValueError, match="this batch has none"):
        DataColumns()(None, PairCollator(0, Truncation())([without]))
    with pytest.raises(ValueError, match="2 of 4 reference log-probs are missing in this batch"):
        PairCollator(0, Truncation())([rows[0], without])
    with pytest.raises(
        ValueError, match="pair 1 of a batch: ref_rejected_logps must be a finite log-prob of at most 0"
    ):
        PairCollator(0, Truncation())([rows[0], {**rows[0], "ref_rejected_logps": 0.5}])
    with pytest.raises(ValueError, match="do not say whose they are"):
        DataColumns().fingerprint(None)


@pytest.mark.parametrize("value", [0.5, float("nan"), float("-inf")])
def test_impossible_columns(build, value):
    rows = datasets.Dataset.from_list(scored_rows(value))
    with pytest.raises(
        ValueError, match=f"row 0: ref_chosen_logps must be a finite log-prob of at most 0, got {value}"
    ):
        build(model(), train_dataset=rows).train()
