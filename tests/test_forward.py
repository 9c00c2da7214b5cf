"""`model(batch)`: the model's own log-probs and gradients, from the scored positions alone; nothing else changes."""

import copy
import functools
import inspect
import io
import pickle
import types

import pytest
import torch
import transformers
from tiny import tiny_config, tiny_model, tiny_pairs
from torch.utils import _pytree as pytree
from two_devices import two_devices

from dpo_fast import attach, forward
from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.forward import HeadTransform, TokenScores, detach, is_attached, release, score_hidden
from dpo_fast.functional import preference_step, score, step_metrics
from dpo_fast.heads import head_tensors
from dpo_fast.layout import shared_prefix_batch
from dpo_fast.metrics import MetricSums
from dpo_fast.objective import Objective
from dpo_fast.ops.stats import STATS

HEADS = {
    "llama": {},
    "gpt2": {},  # tied, absolute positions
    "gemma2": {"final_logit_softcapping": 2.0},
    "granite": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "cohere": {"logit_scale": 0.25},
}


def batch_of(n=3, **options):
    return padded_batch(tiny_pairs(n), pad_token_id=0, **options)


def own_logits(model, batch):
    """(N, V) from the model's own forward."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.flatten(0, 1)[batch["predictors"]]


def gradients(model, logps):
    model.zero_grad()
    (logps * torch.linspace(-1, 1, logps.numel())).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("kind", HEADS)
def test_log_probs_and_gradients_are_the_models_own(kind):
    model, batch = tiny_model(kind, **HEADS[kind]), batch_of()
    for p in model.parameters():  # logits large enough for a soft-cap to bend
        p.data.mul_(3 if p.ndim > 1 else 1)
    own = own_logits(model, batch).double().log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    expected = gradients(model, own)
    scores = attach(model)(batch)
    assert isinstance(scores, TokenScores) and scores.logps.dtype == torch.float32
    assert (scores.logps - own).abs().max() < 1e-5
    assert_same_gradients(gradients(model, scores.logps), expected)


def test_statistics_by_name():
    model, batch = tiny_model(), batch_of()
    logits = own_logits(model, batch).double()
    p = logits.softmax(-1)
    scores = attach(model)(batch, outputs=STATS)
    assert torch.allclose(scores.entropy.double(), -(p * p.log()).sum(-1), atol=1e-5)
    assert torch.allclose(scores.mean_logits.double(), logits.mean(-1), atol=1e-6)
    assert torch.equal(scores.is_top1, logits.argmax(-1) == batch.targets)
    assert torch.allclose(scores.log_sum_sq_probs.double(), p.square().sum(-1).log(), atol=1e-5)
    assert model(batch).entropy is None


def test_only_scored_positions_reach_the_head():
    model, batch, seen = attach(tiny_model()), batch_of(), []
    model.lm_head.register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape))
    model(batch)
    assert seen == [(batch.targets.numel(), model.config.hidden_size)]


def test_any_other_call_is_the_models_own():
    model, batch = tiny_model(), batch_of()
    prompt = dict(input_ids=batch.input_ids[:1, :3], max_new_tokens=4, do_sample=False)
    logits, tokens = model(batch.input_ids).logits, model.generate(**prompt)
    signature = inspect.signature(model.forward)
    attach(model)
    assert torch.equal(model(batch.input_ids).logits, logits)
    assert torch.equal(model.generate(**prompt), tokens)
    assert inspect.signature(model.forward) == signature
    assert model(input_ids=batch.input_ids, labels=batch.input_ids).loss > 0
    with pytest.raises(ValueError, match="unused_keyword"):  # generate still checks its keywords
        model.generate(**prompt, unused_keyword=1)


def test_attach_twice_and_detach():
    model = tiny_model()
    own = model.forward
    assert attach(attach(model)) is model
    model(batch_of())
    detach(detach(model))
    assert model.forward == own and not hasattr(model, "_dpo_fast")
    assert attach(model)(batch_of()).logps.numel()


def loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replaced(model):
    """As Liger and others bind a forward of theirs to the instance."""
    model.forward = types.MethodType(type(model).forward, model)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lose", [loaded, replaced, lambda model: pickle.loads(pickle.dumps(model))])
def test_an_attachment_that_was_lost_is_told_and_repaired(kind, lose):
    model, batch = attach(tiny_model(kind)), batch_of()
    expected = model(batch).logps
    model = lose(model)
    with pytest.raises(TypeError, match=r"is not attached, or not any more .*; call dpo_fast.attach\(model\)"):
        model(batch)
    for _ in range(2):
        assert torch.equal(attach(model)(batch).logps, expected)
    assert model(input_ids=batch.input_ids).logits.shape[:2] == batch.input_ids.shape


def test_an_attachment_that_was_wrapped_is_not_lost():
    model, batch = attach(tiny_model()), batch_of()
    inner = model.forward
    model.forward = functools.partial(lambda inner, *args, **kwargs: inner(*args, **kwargs), inner)
    assert is_attached(attach(model)) and model(batch).logps.numel()
    with pytest.raises(RuntimeError, match="wrapped again after attach"):
        detach(model)
    release(model)
    assert is_attached(model), "who has wrapped it may call it"


def by_default(inner):
    return lambda *args, inner=inner, **kwargs: inner(*args, **kwargs)


def in_a_list(inner):
    held = [inner]
    return lambda *args, **kwargs: held[0](*args, **kwargs)


@pytest.mark.parametrize("wrap", [by_default, in_a_list])
def test_a_wrapper_that_hides_what_it_wraps_is_seen_through(wrap):
    """Attached over once more, each plain call would end up in itself."""
    model, batch = attach(tiny_model()), batch_of()
    logits, expected = model(input_ids=batch.input_ids).logits, model(batch).logps
    for _ in range(2):
        model.forward = wrapped = wrap(model.forward)
        attach(model)
        assert model.forward is wrapped
        assert torch.equal(model(input_ids=batch.input_ids).logits, logits)
        assert torch.equal(model(batch).logps, expected)


def test_what_accelerate_kept_for_itself_is_no_attachment():
    """Its wrapper is gone with the forward that somebody has put in its place."""
    model, batch = attach(tiny_model()), batch_of()
    expected = model(batch).logps
    model._original_forward = model.forward
    replaced(model)
    assert not is_attached(model)
    assert torch.equal(attach(model)(batch).logps, expected)


def test_detach_restores_a_forward_of_the_instance():
    model = tiny_model()
    model.forward = own = lambda **kwargs: type(model).forward(model, **kwargs)
    detach(attach(model))
    assert model.forward is own


def test_a_deep_copy_is_attached_to_itself():
    model, batch = attach(tiny_model()), batch_of()
    twin = copy.deepcopy(model)
    before = model(batch).logps
    for p in twin.parameters():
        p.data.mul_(2)
    assert torch.equal(model(batch).logps, before)
    assert not torch.equal(twin(batch).logps, before)
    assert not torch.equal(twin(batch.input_ids).logits, model(batch.input_ids).logits)


@pytest.mark.parametrize("kwargs", [dict(target_modules=["q_proj", "lm_head"]), dict(modules_to_save=["lm_head"])])
def test_adapters_on_the_head_count(kwargs):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, init_lora_weights=False, **kwargs))
    batch = batch_of()
    own = own_logits(model, batch).log_softmax(-1).gather(-1, batch.targets[:, None]).squeeze(-1)
    expected = gradients(model, own)
    assert any("lm_head" in name for name in expected)
    logps = attach(model)(batch).logps
    assert torch.allclose(logps, own, atol=1e-5)
    assert_same_gradients(gradients(model, logps), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, batch = attach(tiny_model()).train(), batch_of()
    expected = gradients(model, model(batch).logps)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_gradients(gradients(model, model(batch).logps), expected)


def test_autocast_gives_fp32_log_probs():
    model, batch = attach(tiny_model()), batch_of()
    exact = model(batch).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch).logps
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.1


def test_a_plain_dict_works_as_fsdp_makes_one():
    model, batch = attach(tiny_model()), batch_of()
    assert torch.equal(model(dict(batch)).logps, model(input_ids=batch).logps)


def test_no_scored_token():
    batch = padded_batch([TokenPair([], [5], [], [6])], pad_token_id=0)
    logps = attach(tiny_model())(batch).logps
    assert logps.shape == (0,)
    logps.sum().backward()


def test_padding_changes_nothing():
    model = attach(tiny_model())
    assert torch.allclose(model(batch_of()).logps, model(batch_of(pad_to_multiple_of=64)).logps, atol=1e-6)


class LoudLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out


class ShiftedLlama(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda _module, args: (args[0] + 1,))


@pytest.mark.parametrize(
    "model_class, message",
    [(LoudLlama, "LoudLlama transforms the output of its head"), (ShiftedLlama, "ShiftedLlama changes hidden states")],
)
def test_an_unknown_head_is_refused_by_name(model_class, message):
    model = model_class(tiny_config())
    with pytest.raises(ValueError, match=message):
        attach(model)
    assert not hasattr(model, "_dpo_fast") and "forward" not in vars(model)


def test_weights_that_are_not_there_yet_are_checked_at_the_first_call():
    with torch.device("meta"):
        model = LoudLlama(tiny_config())
    attach(model)
    model.to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p.data)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    with pytest.raises(ValueError, match="LoudLlama"):
        model(batch_of())


class Bounded(torch.nn.Linear):
    def forward(self, x):
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("kind", ["llama", "cohere"], ids=["plain", "scaled"])
def test_logits_of_a_head_that_is_called_are_left_alone(kind):
    """Its own last operation and its hooks may need them after the backward."""
    model, batch, kept = tiny_model(kind, **HEADS[kind]), batch_of(), []
    model.lm_head.__class__ = Bounded
    own = own_logits(model, batch).log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    expected = gradients(model, own)
    attach(model)
    model.lm_head.register_forward_hook(lambda _module, _args, out: kept.append((out, out.detach().clone())))
    logps = model(batch).logps
    torch.testing.assert_close(logps, own)
    assert_same_gradients(gradients(model, logps), expected)
    assert torch.equal(*kept[-1])


def test_weights_that_are_not_finite_are_called_so():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite, its weights are not: model.layers.1.mlp.up_proj.weight has NaN"):
        attach(model)


@pytest.mark.parametrize("weights", [torch.float32, torch.float16])
def test_a_forward_that_is_wrapped_in_autocast_is_no_reason_against_a_head(weights):
    """As accelerate leaves it after training in bf16: logits in fp32 that were computed in bf16. Hidden states of
    half weights are fp32 in it, as the sums of residuals in fp16 and bf16 are."""
    model = tiny_model().to(weights)
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            out = inner(*args, **kwargs)
        out.logits = out.logits.float()
        return out

    model.forward = forward
    batch = batch_of()
    logps, expected = attach(model)(batch).logps, attach(tiny_model().to(weights))(batch).logps
    torch.testing.assert_close(logps, expected)


def test_bad_calls():
    with pytest.raises(TypeError, match="expected a Hugging Face causal language model .* got LlamaModel"):
        attach(tiny_model().model)
    with pytest.raises(TypeError, match="got Linear"):
        attach(torch.nn.Linear(2, 2))
    model = attach(tiny_model())
    with pytest.raises(TypeError, match=r"nothing but outputs, objective, .*, got \['labels'\]"):
        model(batch_of(), labels=torch.zeros(1))
    with pytest.raises(ValueError, match="outputs must be a sequence of names"):
        model(batch_of(), outputs=("perplexity",))


def test_transform_of_a_config():
    assert HeadTransform.from_config(tiny_config("gemma2")) == HeadTransform(1.0, 30.0)
    assert HeadTransform.from_config(tiny_config("granite", logits_scaling=4.0)) == HeadTransform(0.25)
    assert HeadTransform.from_config(tiny_config("falcon_h1", lm_head_multiplier=0.5)) == HeadTransform(0.5)
    config = tiny_config()
    config.output_multiplier = 3
    assert HeadTransform.from_config(config) == HeadTransform(3.0)


@pytest.mark.parametrize("dtype, change", [(torch.float32, 1e-3), (torch.bfloat16, 0.1), (torch.float64, 1e-12)])
def test_a_head_that_is_not_the_product_with_its_weight_is_refused(dtype, change, monkeypatch):
    """One row of one weight is off, by more than rounding explains."""
    model = tiny_model().to(dtype)
    attach(copy.deepcopy(model))

    def wrong(head, hidden):
        tensors = head_tensors(head, hidden)
        weight = tensors.weight.clone()
        weight[7] *= 1 + change
        return tensors._replace(weight=weight)

    monkeypatch.setattr("dpo_fast.forward.head_tensors", wrong)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM's output head is not the product with its weight \(off"):
        attach(model)


def test_a_head_that_is_called_compiles_without_a_graph_break_and_was_said_to_be(caplog):
    """A line of the log would break the graph: it is written when the head is checked."""
    model = tiny_model()
    head = model.lm_head
    head.register_forward_hook(lambda _module, _args, out: out)
    forward._log_once.cache_clear()
    attach(model)
    assert caplog.messages == ["the logits of the scored positions are built, the output head has hooks"]
    state = types.SimpleNamespace(transform=HeadTransform(), tile_mib=None, impl="torch")
    hidden, labels = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)), torch.arange(5)

    def score(x):
        return score_hidden(head, x, labels, state, ()).logps

    compiled = torch.compile(score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden), score(hidden))


def test_a_compiled_model_is_attached_below_its_wrapper():
    """Nothing compiles before it is called; torch.compile's wrapper hands its attributes on to the model."""
    model = tiny_model()
    compiled = torch.compile(model, backend="eager")
    attach(compiled)
    assert is_attached(model) and is_attached(compiled)
    detach(compiled)
    assert not is_attached(model) and "forward" not in vars(model)


@pytest.mark.parametrize("make", [lambda pairs: padded_batch(pairs, 0), shared_prefix_batch], ids=["padded", "packed"])
@pytest.mark.parametrize("reference", ["tokens", "sums"])
def test_a_head_on_another_device(make, reference):
    """Hidden states go there, results come back; metrics and the reference's sums are made where the batch is."""
    model, batch = attach(tiny_model()), make(tiny_pairs(3))
    score(model, batch)  # the probe, and the check of the head
    model.lm_head.to("meta")
    objective = Objective("sigmoid")
    with two_devices():
        ref = score(model, batch) if reference == "tokens" else torch.zeros(6)
        step = preference_step(model, batch, objective, ref, extra_metrics=["entropy", "logits", "mean_token_accuracy"])
        sums = MetricSums()
        sums.add(step_metrics(step, batch, objective))
    found = step.loss, step.losses, step.pairs.chosen, step.pairs.exact_log_ratios, step.tokens.entropy
    assert {x.device.type for x in pytree.tree_leaves(found) if x is not None} == {"cpu"}
    assert sums.sums.device.type == "cpu" and len(sums.means()) == 11
