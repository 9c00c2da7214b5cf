"""Reference log-probs come from the right weights, without dropout and gradients, and leave the policy as it was."""

import copy

import pytest
import torch
from tiny import tiny_model, tiny_pairs

from dpo_fast import attach
from dpo_fast.batch import padded_batch
from dpo_fast.functional import score
from dpo_fast.reference import (
    AdapterOff,
    FrozenAdapter,
    FrozenModel,
    InitialPolicy,
    Snapshot,
    fingerprint,
    freeze,
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
    with pytest.raises(TypeError):
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
    with pytest.raises(TypeError):
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


# --- fingerprints --------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_numbers():
    model = attach(tiny_model())
    same = FrozenModel(model).fingerprint(None)
    assert len(same) == 64 and same == FrozenModel(copy.deepcopy(model)).fingerprint(None)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.lm_head.weight[3, 3] = torch.nextafter(moved.lm_head.weight[3, 3], torch.tensor(9.0))
    others = {
        "weight": moved,
        "dtype": copy.deepcopy(model).to(torch.bfloat16),
        "config": attach(tiny_model(rms_norm_eps=1e-3)),
        "head": attach(tiny_model("gemma2", final_logit_softcapping=5.0)),
        "another head": attach(tiny_model("gemma2", final_logit_softcapping=6.0)),
    }
    found = {name: FrozenModel(other).fingerprint(None) for name, other in others.items()}
    assert len({same, *found.values()}) == 1 + len(others)
    with torch.autocast("cpu", torch.bfloat16):
        assert FrozenModel(model).fingerprint(None) not in {same, *found.values()}
    assert FrozenModel(model).fingerprint(None) == same


def test_a_fingerprint_stays_while_the_policy_trains():
    """Of the policy with its weights from before, and of one without its adapter."""
    model = attach(tiny_model())
    source = InitialPolicy(Snapshot.of(model, trainable_ids(model)))
    before = source.fingerprint(model)
    assert before == FrozenModel(model).fingerprint(None)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert source.fingerprint(model) == before != FrozenModel(model).fingerprint(None)

    policy = adapted()
    off, on = AdapterOff(policy), FrozenModel(policy)
    without, with_it = off.fingerprint(policy), on.fingerprint(None)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.add_(1)
    assert off.fingerprint(policy) == without
    assert len({without, with_it, on.fingerprint(None)}) == 3
    trained = on.fingerprint(None)
    policy.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))  # that nobody uses
    assert off.fingerprint(policy) == without and on.fingerprint(None) == trained
    policy.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    assert off.fingerprint(policy) == without and on.fingerprint(None) != trained


def test_a_fingerprint_needs_all_weights():
    with torch.device("meta"):
        model = tiny_model()
    with pytest.raises(ValueError, match="is not whole on this rank"):
        fingerprint(model)
