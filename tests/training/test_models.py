"""The models that run shared-prefix rows: log-probs and every gradient equal those of separate sequences."""

import re

import pytest
import torch
import transformers as tf
from tiny import skip_without_experts

from dpo_fast import attention
from dpo_fast.batch import TokenPair
from dpo_fast.layout import shared_prefix_batch

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
HEAD = dict(head_dim=8)
WINDOW = dict(sliding_window=8)
CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "mistral": lambda: tf.MistralConfig(**SMALL, **WINDOW),
    "qwen2": lambda: tf.Qwen2Config(**SMALL),
    "qwen3": lambda: tf.Qwen3Config(**SMALL, **HEAD),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, **HEAD, **WINDOW, query_pre_attn_scalar=8),
    "gemma3": lambda: tf.Gemma3TextConfig(**SMALL, **HEAD, **WINDOW, query_pre_attn_scalar=8),
    "phi3": lambda: tf.Phi3Config(**SMALL),
    "olmo2": lambda: tf.Olmo2Config(**SMALL),
    "granite": lambda: tf.GraniteConfig(**SMALL),
    "cohere2": lambda: tf.Cohere2Config(**SMALL, **WINDOW),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(
        **SMALL, **HEAD, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mixtral": lambda: tf.MixtralConfig(**SMALL, num_local_experts=4),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "gpt2": lambda: tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "smollm3": lambda: tf.SmolLM3Config(**SMALL),
    "gpt_oss": lambda: tf.GptOssConfig(**SMALL, **HEAD, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
}


def build(name):
    config = CONFIGS[name]()
    skip_without_experts(config)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def make_pairs():
    generator = torch.Generator().manual_seed(1)

    def tokens(n):
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    first, second = tokens(20), tokens(11)  # longer than the windows
    return [TokenPair(first, tokens(9), first, tokens(12)), TokenPair(second, tokens(1), second, tokens(5))]


def separate_rows(model, pairs):
    """Each sequence through the stock model by itself, full logits: sum of chosen - 0.7 rejected log-probs."""
    total = 0.0
    for pair in pairs:
        prompt = pair.chosen_prompt
        for completion, sign in ((pair.chosen, 1.0), (pair.rejected, -0.7)):
            logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
            log_p = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            total = total + sign * log_p.gather(1, torch.tensor(completion)[:, None]).sum()
    return total


def packed_row(model, pairs):
    batch = shared_prefix_batch(pairs)
    inputs = attention.model_inputs(batch.layout, model.device)
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predictors,
        **inputs,
    ).logits[0]
    logps = logits.float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return (logps * torch.where(batch.sequence_ids < batch.num_pairs, 1.0, -0.7)).sum()


def gradients(model, total):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return flat(parameters, torch.autograd.grad(total, parameters, allow_unused=True))


def flat(parameters, found):
    pieces = zip(parameters, found, strict=True)
    return torch.cat([torch.zeros(p.numel()) if g is None else g.flatten() for p, g in pieces])


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_separate_rows(name):
    model, pairs = build(name), make_pairs()
    expected = separate_rows(model, pairs)
    true = gradients(model, expected)
    assert attention.reasons_against(model) == []
    attention.enable(model)
    found = packed_row(model, pairs)
    assert abs(found - expected) <= 1e-5 * abs(expected)
    assert (gradients(model, found) - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_gradient_checkpointing(name, reentrant):
    model, pairs = build(name), make_pairs()
    true = gradients(model, separate_rows(model, pairs))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    attention.enable(model)
    model.zero_grad()
    packed_row(model, pairs).backward()
    found = flat(list(model.parameters()), [p.grad for p in model.parameters()])
    assert (found - true).norm() <= 1e-5 * true.norm()


@pytest.mark.parametrize(
    "name, implementation", [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_calls_without_a_layout_are_unchanged(name, implementation):
    model = build(name).eval()
    model.set_attn_implementation(implementation)
    ids = torch.arange(3, 33).view(2, 15)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    attention.enable(model)
    attention.enable(model)
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    attention.disable(model)
    assert model.config._attn_implementation == implementation
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), generated)


def test_autocast():
    model, pairs = build("llama"), make_pairs()
    exact = separate_rows(model, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        padded = separate_rows(model, pairs)
        attention.enable(model)
        packed = packed_row(model, pairs)
    assert abs(packed - exact) <= 2 * abs(padded - exact) + 0.05


def test_attention_dropout_is_refused():
    model = tf.AutoModelForCausalLM.from_config(tf.LlamaConfig(**SMALL, attention_dropout=0.1)).train()
    attention.enable(model)
    with pytest.raises(ValueError, match="attention dropout must be 0 over a shared-prefix row, got 0.1"):
        packed_row(model, make_pairs())


UNFIT = {
    "mamba": (lambda: tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4), "mixes tokens"),
    "falcon_h1": (
        lambda: tf.FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
        "mixes tokens|layers of the kinds",
    ),
    "qwen3_next": (
        lambda: tf.Qwen3NextConfig(
            **SMALL, head_dim=8, num_experts=2, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        ),
        "layers of the kinds linear_attention",
    ),
    "bloom": (lambda: tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=4), "does not take its"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_models_that_cannot_say_why(name):
    make, reason = UNFIT[name]
    model = tf.AutoModelForCausalLM.from_config(make())
    reasons = attention.reasons_against(model)
    assert reasons and type(model).__name__ in reasons[0]
    assert re.search(reason, "; ".join(reasons)), reasons


def test_encoder_decoder_is_refused():
    config = tf.T5Config(vocab_size=97, d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=8)
    assert "encoder-decoder" in attention.reasons_against(tf.T5ForConditionalGeneration(config))[0]
