"""Heads that are read as tensors give what calling them gives; the others say why they are called."""

import peft
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model

from dpo_fast.heads import head_tensors

HIDDEN = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))


def adapted(cls=peft.LoraConfig, **options):
    model = peft.get_peft_model(tiny_model(), cls(**options)).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def lora(**options):
    return adapted(r=4, target_modules=["lm_head"], **options)


def head_of(model):
    return model.get_base_model().get_output_embeddings()


def assert_read(model):
    head = head_of(model)
    tensors = head_tensors(head, HIDDEN)
    product = F.linear(HIDDEN, tensors.weight, tensors.bias)
    if tensors.low_rank is not None:
        product = product + tensors.low_rank[0] @ tensors.low_rank[1].T
    torch.testing.assert_close(product, head(HIDDEN))


def test_lora_in_every_state():
    model = lora(lora_dropout=0.5, use_rslora=True)
    assert_read(model)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    assert_read(model)
    with model.disable_adapter():
        assert_read(model)
    model.merge_adapter()
    assert_read(model)
    with model.disable_adapter():
        assert head_tensors(head_of(model), HIDDEN) == "the output head's adapter is switched off, but merged"


def test_a_trained_copy_on_and_off():
    model = adapted(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert_read(model)
    with model.disable_adapter():
        assert_read(model)


CALLED = {
    "dora": (lambda: lora(use_dora=True), "not plain LoRA"),
    "adalora": (lambda: adapted(peft.AdaLoraConfig, total_step=9, target_modules=["lm_head"]), "not plain LoRA"),
    "vera": (lambda: adapted(peft.VeraConfig, target_modules=["lm_head"]), "a forward of its own"),
}


@pytest.mark.parametrize("case", CALLED)
def test_heads_that_are_called_say_why(case):
    model, reason = CALLED[case]
    assert reason in head_tensors(head_of(model()), HIDDEN)


@pytest.mark.parametrize("where", ["", "base_layer", "lora_B.default"])
def test_a_hook_anywhere_in_the_head_runs(where):
    model = lora()
    head_of(model).get_submodule(where).register_forward_hook(lambda _module, _args, out: out * 2)
    assert head_tensors(head_of(model), HIDDEN) == "the output head has forward hooks"
