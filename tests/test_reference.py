"""Reference log-probs come from the right weights, without dropout and gradients, and leave the policy as it was."""

import pytest
import torch
from tiny import tiny_model, tiny_pairs

from dpo_fast import attach
from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.functional import score
from dpo_fast.reference import AdapterOff, FrozenAdapter, FrozenModel, Precomputed, evaluating, freeze, keep_trainable

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
    assert not torch.equal(FrozenModel(reference)(None, BATCH, ld_alpha=0.0).logps, found)


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
