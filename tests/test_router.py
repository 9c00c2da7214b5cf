"""The balancing loss of mixtures of experts: of packed rows as of padded ones, as the model's own forward gives it."""

import pytest
import torch
from tiny import tiny_model, tiny_pairs

from dpo_fast import Objective, attach
from dpo_fast.batch import padded_batch
from dpo_fast.layout import shared_prefix_batch
from dpo_fast.router import balancing_loss, router_coefficient, token_weights

EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
PAIRS = tiny_pairs(4, longest=9)


def build(**overrides):
    model = tiny_model("qwen3_moe", **EXPERTS, **overrides)
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key("aten::_grouped_mm", "CPU"):
        pytest.skip(f"torch {torch.__version__} cannot run transformers' experts on CPU: no grouped_mm there")
    for p in model.parameters():
        p.data.mul_(3 if p.ndim > 1 else 1)
    return model


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("make", [lambda pairs: padded_batch(pairs, 0), shared_prefix_batch], ids=["padded", "packed"])
def test_equals_the_models_own(make):
    model, batch = attach(build()), make(PAIRS)
    rows = padded_batch(PAIRS, 0)
    own = model(
        input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_router_logits=True, use_cache=False
    ).aux_loss
    assert own > 2.001  # 2 where each expert is chosen as often as any other
    out = model(batch, objective=Objective("simpo"), aux_loss=True)
    assert out.aux_loss.item() == pytest.approx(own.item(), rel=1e-5)
    a, b = gradients(model, out.aux_loss), gradients(model, own)
    assert (a - b).norm() <= 1e-5 * b.norm()
    without = model(batch, objective=Objective("simpo"))
    assert without.aux_loss is None and torch.equal(without.loss, out.loss)
    assert model(batch, aux_loss=True).aux_loss.item() == pytest.approx(own.item(), rel=1e-5)


def test_how_often_a_token_is_there():
    weights = token_weights(shared_prefix_batch(PAIRS))
    assert weights.sum() == padded_batch(PAIRS, 0).attention_mask.sum() and set(weights.unique().tolist()) == {1.0, 2.0}


def test_what_the_loss_is_multiplied_by():
    model, dense = build(router_aux_loss_coef=0.25), tiny_model()
    assert router_coefficient(model, None) == 0.25 and router_coefficient(model, 0.0) == 0.0
    assert router_coefficient(model, 0.5) == 0.5
    assert router_coefficient(dense, None) == router_coefficient(dense, 0.0) == 0.0
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1, but LlamaForCausalLM is no mixture of experts"):
        router_coefficient(dense, 0.1)


def test_models_without_router_logits():
    assert balancing_loss(build(), (), None) == 0  # no layer routes
    with pytest.raises(ValueError, match="LlamaForCausalLM gives no router logits"):
        balancing_loss(tiny_model(), None, None)
