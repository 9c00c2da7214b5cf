"""A copy computes with its own weights, whatever has replaced a forward; shared memory and new weights are seen."""

import copy
import functools
import logging
import types

import pytest
import torch
from tiny import tiny_model, tiny_pairs
from torch import nn

from dpo_fast import attach
from dpo_fast.batch import padded_batch
from dpo_fast.copies import WeightSample, check_storage, compute_with_own_weights
from dpo_fast.functional import score

IDS = torch.arange(3, 9)[None]
BATCH = padded_batch(tiny_pairs(2), pad_token_id=0)


def by_closure(module):
    """As TRL and others do: a function that holds the forward of before."""
    before = module.forward

    def forward(self, *args, **kwargs):
        return before(*args, **kwargs)

    module.forward = types.MethodType(forward, module)


def by_partial(module):
    module.forward = functools.partial(lambda before, *args, **kwargs: before(*args, **kwargs), module.forward)


def by_object(module):
    class Wrapper:
        def __init__(self, before):
            self.before = before

        def __call__(self, *args, **kwargs):
            return self.before(*args, **kwargs)

        __deepcopy__ = lambda self, memo: self  # noqa: E731

    module.forward = Wrapper(module.forward)


def first_layer(model):
    return model.model.layers[0]


def moved(model):
    """The model, and a copy whose weights are others."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.5)
    expected = tiny_model()
    expected.load_state_dict(twin.state_dict())
    return twin, expected


def same(model, other):
    with torch.no_grad():
        return torch.equal(model(input_ids=IDS).logits, other(input_ids=IDS).logits)


@pytest.mark.parametrize("replace", [by_closure, by_object])
@pytest.mark.parametrize("where", [lambda model: model, first_layer], ids=["model", "layer"])
def test_a_copy_of_a_patched_model(replace, where, caplog):
    model = tiny_model()
    replace(where(model))
    twin, expected = moved(model)
    assert not same(twin, expected)
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        assert same(compute_with_own_weights(twin), expected)
    assert "worked on the model that it was copied from" in caplog.text
    assert same(model, tiny_model())  # the original keeps what was installed
    assert "forward" in vars(where(model))


@pytest.mark.parametrize("replace", [by_closure, by_partial, by_object])
def test_what_holds_its_own_module_stays(replace, caplog):
    model = tiny_model()
    replace(model)
    replace(first_layer(model))
    installed = model.forward, first_layer(model).forward
    assert compute_with_own_weights(model) is model and not caplog.records
    assert (model.forward, first_layer(model).forward) == installed


@pytest.mark.parametrize("attached_first", [True, False])
def test_attaching_a_copy_of_a_patched_model(attached_first):
    model = tiny_model()
    if attached_first:
        attach(model)
    by_closure(model)
    if not attached_first:
        attach(model)
    twin, expected = moved(model)
    attach(twin)
    with torch.no_grad():
        assert torch.equal(score(twin, BATCH).logps, score(attach(expected), BATCH).logps)
    assert same(twin, expected)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_a_copy_of_a_dispatched_model(patched, attached):
    """accelerate's `to` hands out the model that it was made for; its hooks stay."""
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    if patched:
        by_closure(model)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    if attached:
        attach(model)
    twin, expected = moved(model)
    assert twin.to("cpu") is model
    assert compute_with_own_weights(twin).to("cpu") is twin
    assert same(attach(twin), expected) and same(model, tiny_model())
    assert type(twin.lm_head.forward) is functools.partial


def test_weights_that_a_method_holds():
    """Only whoever knows the original can tell these from something that the user means."""
    model = tiny_model()
    weight, norm = model.lm_head.weight, model.model.norm
    forward = type(norm).forward
    model.lm_head.forward = lambda hidden: nn.functional.linear(hidden, weight)
    model.model.layers[0].mlp.forward = lambda hidden: forward(norm, hidden)
    twin, expected = moved(model)
    compute_with_own_weights(twin)
    assert "forward" in vars(twin.lm_head) and not same(twin, expected)
    assert same(compute_with_own_weights(twin, original=model), expected)


def test_hooks_are_named(caplog):
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, out, norm=model.model.norm: out * norm.weight.mean())
    compute_with_own_weights(copy.deepcopy(model), original=model)
    assert "a hook on lm_head holds a module or a weight of the model" in caplog.text


def test_a_copy_that_is_not_patched_is_left_alone():
    model = attach(tiny_model())
    twin = copy.deepcopy(model)
    installed = twin.forward
    assert compute_with_own_weights(twin).forward == installed


def test_shared_memory_is_refused():
    model, other = tiny_model(), tiny_model(seed=1)
    check_storage(model, other)
    check_storage(model, copy.deepcopy(model))
    with pytest.raises(ValueError, match="shares the memory of 21 parameters that train"):
        check_storage(model, copy.copy(model))
    other.load_state_dict(model.state_dict(), assign=True)  # other parameters over the same memory
    with pytest.raises(ValueError, match="shares the memory"):
        check_storage(model, other)
    model.requires_grad_(False)
    check_storage(model, other)  # what does not train may be shared
    part = nn.Linear(4, 2)
    whole = nn.Linear(4, 4)
    part.weight = nn.Parameter(whole.weight.data[:2])  # a view
    with pytest.raises(ValueError, match=r"shares the memory of 1 parameters .* weight the first"):
        check_storage(whole, part)


def test_rewritten_weights_are_seen():
    model = tiny_model()
    sample = WeightSample(model)
    assert sample.rewritten_in(model) == []
    model.lm_head.weight.data = model.lm_head.weight.data + 1e-3
    model.model.norm.weight.data.mul_(1.5)
    model.model.layers[0].self_attn.q_proj.weight = nn.Parameter(model.model.layers[0].self_attn.q_proj.weight.data)
    names = ["lm_head.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"]
    assert sorted(sample.rewritten_in(model)) == sorted(names)
    assert sample.had_adapters is False
