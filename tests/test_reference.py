"""Reference log-probs come from the right weights, without dropout and gradients, and leave the policy as it was."""

import pytest
import torch
from tiny import tiny_model, tiny_pairs

from dpo_fast import attach
from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.functional import score
from dpo_fast.reference import (
    AdapterOff,
    FrozenAdapter,
    FrozenModel,
    InitialPolicy,
    Precomputed,
    Snapshot,
    evaluating,
    freeze,
    keep_trainable,
    of_adapters,
    starts_as_identity,
)
from dpo_fast.reference import (
    trainable as trainable_ids,
)

peft = pytest.importorskip("peft")
BATCH = padded_batch(tiny_pairs(3), pad_token_id=0)


def logps(model):
    with torch.no_grad():
        return score(model, BATCH).logps


def adapted(**options):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return attach(peft.get_peft_model(tiny_model(), config)).eval()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_frozen_model():
    reference = freeze(attach(tiny_model(seed=1)).train())
    found = FrozenModel(reference)(None, BATCH).logps
    assert torch.equal(found, logps(reference)) and not found.requires_grad
    assert not trainable(reference) and not reference.training


def test_adapter_off_is_the_base_model():
    model, base = adapted(lora_dropout=0.5).train(), attach(tiny_model())
    frozen = next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before = trainable(model)
    found = AdapterOff(model)(model, BATCH).logps
    assert torch.equal(found, logps(base)) and not found.requires_grad
    assert trainable(model) == before and not frozen.requires_grad
    assert model.training and all(module.training for module in model.modules())
    assert not torch.equal(logps(model.eval()), found)


def test_frozen_adapter_is_not_trained():
    model = adapted(lora_dropout=0.5)
    model.add_adapter("reference", model.peft_config["default"])
    before = trainable(model)
    reference = FrozenAdapter(model, "reference")
    found = reference(model, BATCH).logps
    policy = logps(model)
    assert model.active_adapter == "default" and trainable(model) == before
    assert not torch.equal(found, policy)
    for name, p in model.named_parameters():
        if ".default." in name:
            p.data.add_(0.1)
    assert torch.equal(reference(model.train(), BATCH).logps, found)  # without dropout
    assert not torch.equal(logps(model.eval()), policy)


def test_frozen_adapter_comes_back_after_an_error():
    model = adapted()
    model.add_adapter("reference", model.peft_config["default"])
    with pytest.raises(ValueError):
        FrozenAdapter(model, "reference")(model, None)
    assert model.active_adapter == "default"


def test_initial_policy():
    model = adapted(lora_dropout=0.5, modules_to_save=["lm_head"]).train()
    model.get_base_model().model.norm.weight.requires_grad_(True)
    reference = InitialPolicy(Snapshot.of(model, trainable_ids(model)))
    before, parameters = trainable(model), list(model.parameters())
    start = logps(model.eval())
    for p in parameters:
        if p.requires_grad:
            p.data.add_(0.1)
    found = reference(model.train(), BATCH).logps
    assert torch.equal(found, start) and not found.requires_grad
    assert not torch.equal(logps(model.eval()), start)
    with pytest.raises(ValueError):
        reference(model.train(), None)
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert trainable(model) == before and model.training


def test_snapshot():
    """One copy of a tied weight in both places; it follows the model's dtype and takes a new parameter's place."""
    model = tiny_model(tie_word_embeddings=True)
    weight = model.lm_head.weight
    snapshot = Snapshot.of(model, {id(weight)})
    assert len(snapshot.kept) == 2 and snapshot.kept[0].copy is snapshot.kept[1].copy
    model.double()
    model.lm_head.weight = torch.nn.Parameter(weight[:5].double())
    with snapshot.put_in():
        assert model.lm_head.weight is model.model.embed_tokens.weight is snapshot.kept[0].copy
        assert model.lm_head.weight.dtype == torch.float64 and torch.equal(
            model.lm_head.weight, weight.detach().double()
        )
    assert model.lm_head.weight.shape[0] == 5 and len(model.model.embed_tokens.weight) > 5


def test_adapter_off_brings_back_the_rest():
    model, base = adapted(bias="all"), attach(tiny_model())
    model.get_base_model().model.norm.weight.requires_grad_(True)
    rest = trainable_ids(model) - of_adapters(model)
    reference = AdapterOff(model, Snapshot.of(model, rest))
    model.get_base_model().model.norm.weight.data.mul_(2)
    assert torch.equal(reference(model, BATCH).logps, logps(base))
    assert not torch.equal(AdapterOff(model)(model, BATCH).logps, logps(base))


def test_what_starts_as_the_identity():
    def new(config):
        return peft.get_peft_model(tiny_model(), config)

    names = ["q_proj", "embed_tokens"]
    assert starts_as_identity(new(peft.LoraConfig(target_modules=names, modules_to_save=["lm_head"], use_dora=True)))
    assert starts_as_identity(new(peft.AdaLoraConfig(target_modules=names[:1], total_step=9)))
    assert not starts_as_identity(new(peft.LoraConfig(target_modules=names, init_lora_weights=False)))
    assert not starts_as_identity(new(peft.LoraConfig(target_modules=names[:1], init_lora_weights="pissa")))
    assert not starts_as_identity(tiny_model())


def test_precomputed():
    pair = TokenPair([5], [6], [5], [7], ref_chosen_logps=-1.5, ref_rejected_logps=-2.5)
    batch = padded_batch([pair], pad_token_id=0)
    assert Precomputed()(None, batch).logps.tolist() == [-1.5, -2.5]
    with pytest.raises(ValueError, match="this batch has none"):
        Precomputed()(None, BATCH)


def test_contexts_restore_each_module_and_parameter():
    model = tiny_model().train()
    model.lm_head.eval()
    model.lm_head.weight.requires_grad_(False)
    before = trainable(model)
    with pytest.raises(RuntimeError), evaluating(model), keep_trainable(model):
        assert not any(module.training for module in model.modules())
        model.requires_grad_(True)
        raise RuntimeError
    assert model.training and not model.lm_head.training and trainable(model) == before
