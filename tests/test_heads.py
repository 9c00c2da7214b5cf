"""Heads that are read as tensors give what calling them gives; the others say why they are called."""

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_model
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from dpo_fast.heads import head_tensors

peft = pytest.importorskip("peft")

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


def scaled(_module, gradients, *_):
    return (gradients[0] * 0.1,)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(lambda _module, _args, out: out * 2),
    "forward pre": lambda module: module.register_forward_pre_hook(lambda _module, args: (args[0] * 2,)),
    "backward": lambda module: module.register_full_backward_hook(scaled),
    "backward pre": lambda module: module.register_full_backward_pre_hook(scaled),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["", "base_layer", "lora_A.default", "lora_B.default"])
def test_a_hook_anywhere_in_the_head_is_a_reason(where, kind):
    model = lora()
    HOOKS[kind](head_of(model).get_submodule(where))
    assert head_tensors(head_of(model), HIDDEN) == "the output head has hooks"


GLOBAL = {
    "forward": "register_module_forward_hook",
    "forward pre": "register_module_forward_pre_hook",
    "backward": "register_module_full_backward_hook",
    "backward pre": "register_module_full_backward_pre_hook",
}


@pytest.mark.parametrize("kind", GLOBAL)
def test_a_hook_of_all_modules_is_a_reason_unless_it_is_torch_s_own(kind):
    with getattr(torch.nn.modules.module, GLOBAL[kind])(lambda *_: None):
        assert head_tensors(tiny_model().lm_head, HIDDEN) == "the output head has the hooks of all modules"
    with FlopCounterMode(display=False) as counter:
        assert not isinstance(head_tensors(tiny_model().lm_head, HIDDEN), str)
    assert counter.get_total_flops() == 0


class Wrapped(torch.Tensor):
    """A class of tensors with mathematics of its own, as quantised ones are."""


def double(head):
    forward = head.forward
    head.forward = lambda x: 2 * forward(x)


def quantised(head):
    head.weight = torch.nn.Parameter(head.weight.detach().as_subclass(Wrapped))


def sparse(head):
    head.weight = torch.nn.Parameter(head.weight.detach().to_sparse(), requires_grad=False)


class Bounded(torch.nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class Called(torch.nn.Linear):
    def __call__(self, x):
        return super().__call__(x) / 2


def turned_into(cls):
    def turn(head):
        head.__class__ = cls

    return turn


CHANGED = {
    "forward replaced": (double, "a forward that was replaced"),
    "a tensor's class": (quantised, "tensors are of the class Wrapped"),
    "a module's class": (turned_into(Bounded), "a Bounded with a forward of its own"),
    "__call__": (turned_into(Called), "a forward that was replaced"),
    "sparse": (sparse, "tensors are of the class Parameter"),
    "meta": (lambda head: head.to("meta"), "tensors are of the class Parameter"),
    "compiled": (lambda head: head.compile(backend="eager"), "been compiled by itself"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_what_changes_a_call_is_a_reason(what):
    change, reason = CHANGED[what]
    head = tiny_model().lm_head
    change(head)
    assert reason in head_tensors(head, HIDDEN)


class OwnLora(peft.tuners.lora.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_a_subclass_of_an_adapter_s_layer_is_called():
    model = lora()
    head_of(model).__class__ = OwnLora
    assert "not plain LoRA" in head_tensors(head_of(model), HIDDEN)


def test_an_adapter_s_forward_replaced_for_all_is_a_reason(monkeypatch):
    model = lora()
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", OwnLora.forward)
    assert "not plain LoRA" in head_tensors(head_of(model), HIDDEN)


@pytest.mark.parametrize("where", ["base_layer", "lora_B.default"])
def test_a_call_of_its_own_below_an_adapter_is_a_reason(where):
    model = lora()
    head_of(model).get_submodule(where).__class__ = Called
    assert isinstance(head_tensors(head_of(model), HIDDEN), str)


def test_a_forward_replaced_for_all_linear_layers_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.nn.Linear, "forward", Bounded.forward)
    assert "with a forward of its own" in head_tensors(tiny_model().lm_head, HIDDEN)


def test_a_parametrised_weight_is_read_as_it_is_computed():
    head = tiny_model().lm_head
    parametrize.register_parametrization(head, "weight", torch.nn.Tanh())
    tensors = head_tensors(head, HIDDEN)
    torch.testing.assert_close(F.linear(HIDDEN, tensors.weight), head(HIDDEN))


def test_factors_of_an_adapter_keep_their_dtype():
    model = peft.get_peft_model(
        tiny_model().bfloat16(), peft.LoraConfig(r=4, target_modules=["lm_head"]), autocast_adapter_dtype=True
    )
    tensors = head_tensors(head_of(model), HIDDEN.bfloat16())
    assert tensors.weight.dtype == torch.bfloat16 and {x.dtype for x in tensors.low_rank} == {torch.float32}
