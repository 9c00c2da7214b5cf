"""A packed row runs only where it is right: the probe, the guard of each call, and what may change between calls."""

import contextlib
import copy

import pytest
import torch
import transformers as tf
from tiny import skip_without_experts, tiny_model, tiny_pairs, why_not_nemotron

from dpo_fast import attach, attention, packing
from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.forward import backbone_of, reasons_against_packed_rows
from dpo_fast.layout import shared_prefix_batch
from dpo_fast.probe import probe_pairs, probe_tokens

SMALL = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
HEADS = dict(num_key_value_heads=4)
# families whose packed rows were wrong, each in its own way
WRONG = {
    "stablelm": (lambda: tf.StableLmConfig(**SMALL, **HEADS), "does not hand the layout"),
    "nemotron": (lambda: tf.NemotronConfig(**SMALL, **HEADS, head_dim=8), why_not_nemotron()),
    "falcon": (lambda: tf.FalconConfig(**SMALL), "depends on the name of its attention implementation"),
    "phimoe": (
        lambda: tf.PhimoeConfig(**SMALL, **HEADS, num_local_experts=4, sliding_window=5),
        "sliding_window=5",
    ),
    "phimoe, a large window": (
        lambda: tf.PhimoeConfig(**SMALL, **HEADS, num_local_experts=4, sliding_window=100),
        "sliding_window=100",
    ),
    "doge": (lambda: tf.DogeConfig(**SMALL, **HEADS, sliding_window=5), "sliding_window=5"),
    "bert-generation": (lambda: tf.BertGenerationConfig(**SMALL), "differ from separate ones"),
    "bart": (
        lambda: tf.BartConfig(
            vocab_size=97, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48
        ),
        "differ from separate ones",
    ),
    "cpmant": (
        lambda: tf.CpmAntConfig(
            vocab_size=97, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2
        ),
        "does not take its attention from",
    ),
}  # fmt: skip


def build(config) -> torch.nn.Module:
    skip_without_experts(config)
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config).float().eval()
    for p in model.parameters():
        p.data.mul_(3 if p.ndim > 1 else 1)
    return model


@torch.no_grad()
def own_sums(model, pairs) -> torch.Tensor:
    """(2P,) log-probs from the model's own forward, one sequence at a time."""
    sums = []
    for prompts, completions in (("chosen_prompt", "chosen"), ("rejected_prompt", "rejected")):
        for pair in pairs:
            prompt, completion = getattr(pair, prompts), getattr(pair, completions)
            logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
            logps = logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
            sums.append(logps.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(sums)


def sums_of(model, batch) -> torch.Tensor:
    logps = model(batch).logps
    return torch.zeros(2 * batch.num_pairs).index_add(0, batch.sequence_ids, logps)


PAIRS = [
    TokenPair([5, 6, 7, 8], [9, 10, 11, 12, 13], [5, 6, 7, 8], [14, 15]),
    TokenPair([20], [21], [20], [21, 22, 23]),
]


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_packed_runs_padded_and_stays_as_it_was(name, caplog):
    make, reason = WRONG[name]
    model = build(make())
    own = own_sums(model, PAIRS)
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    calls = [dict(input_ids=ids), dict(input_ids=ids, attention_mask=mask)]
    before = [model(**call).logits for call in calls]
    can_generate = name not in ("cpmant", "bert-generation", "bart")
    generated = model.generate(ids[:1], max_new_tokens=4, do_sample=False) if can_generate else None
    implementation = model.config._attn_implementation
    attach(model)
    packing._log_once.cache_clear()
    with caplog.at_level("WARNING", "dpo_fast"):
        for batch in (shared_prefix_batch(PAIRS), padded_batch(PAIRS, 0), shared_prefix_batch(PAIRS)):
            assert (sums_of(model, batch) - own).abs().max() < 1e-4
    lines = [r.getMessage() for r in caplog.records if "not shared prefixes" in r.getMessage()]
    assert len(lines) == 1 and reason in lines[0] and type(model).__name__ in lines[0]
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(model(**call).logits, x) for call, x in zip(calls, before, strict=True))
    if can_generate:
        assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), generated)
    packing.require(model)
    with pytest.raises(ValueError, match="layout='shared_prefix' cannot run: "):
        model(shared_prefix_batch(PAIRS))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_right_stays_packed(kind, dtype):
    windows = dict(sliding_window=8, head_dim=8) if kind != "llama" else {}
    experts = dict(num_local_experts=4, num_experts_per_tok=2) if kind == "gpt_oss" else {}
    model = attach(tiny_model(kind, **windows, **experts).to(dtype))
    assert reasons_against_packed_rows(model) == []
    ids = torch.arange(3, 15).view(2, 6)
    enabled = model(input_ids=ids).logits, model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    attention.disable(model)
    assert torch.equal(model(input_ids=ids).logits, enabled[0])
    assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False), enabled[1])


def test_one_layer_without_the_layout_is_enough_to_raise():
    """And without a probe that would have seen it: the guard of each call."""
    model, batch = attach(tiny_model()), shared_prefix_batch(tiny_pairs())
    model(batch)
    layer = model.model.layers[1].self_attn
    forward = layer.forward
    layer.forward = lambda *args, pair_layout=None, **kwargs: forward(*args, **kwargs)
    with pytest.raises(attention.LayoutLost, match="does not hand the layout of a packed row on"):
        model(batch)
    layer.forward = lambda hidden_states, **_: (hidden_states, None)  # calls no attention at all
    with pytest.raises(attention.LayoutLost, match="LlamaForCausalLM ran a packed row, but 1 attention"):
        model(batch)


class Centred(tf.models.llama.modeling_llama.LlamaMLP):
    """Reads the whole row, and hands everything on."""

    def forward(self, x):
        return super().forward(x) - 3 * x.mean(1, keepdim=True)


class Shaped(tf.models.llama.modeling_llama.LlamaMLP):
    def forward(self, x):
        return super().forward(x) / x.shape[1]


@pytest.mark.parametrize("mlp", [Centred, Shaped])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_reads_the_row_is_found_by_its_numbers(mlp, dtype):
    model = tiny_model(seed=1)
    for layer in model.model.layers:
        layer.mlp = mlp(model.config)
    for p in model.parameters():
        p.data.mul_(4 if p.ndim > 1 else 1)
    reasons = reasons_against_packed_rows(attach(model.to(dtype)))
    assert len(reasons) == 1 and "LlamaForCausalLM's packed rows differ from separate ones" in reasons[0]


@pytest.mark.parametrize("dtype, amount", [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_an_attention_that_is_a_little_off_is_found(dtype, amount, monkeypatch):
    """The tolerance is rounding: what is a ten thousandth in fp32, or a half in bf16, is none."""

    def off(*args, attend=attention.shared_prefix_attention, **knobs):
        return attend(*args, **knobs) * (1 + amount)

    def model():
        made = tiny_model(seed=1)
        for p in made.parameters():
            p.data.mul_(3 if p.ndim > 1 else 1)
        return attach(made.to(dtype))

    assert reasons_against_packed_rows(model()) == []
    monkeypatch.setattr(attention, "shared_prefix_attention", off)
    assert "differ from separate ones" in reasons_against_packed_rows(model())[0]


def test_the_probe_runs_once_per_model_and_a_copy_by_itself(monkeypatch):
    probed = []
    monkeypatch.setattr(packing, "prove", lambda *args, prove=packing.prove: probed.append(1) or prove(*args))
    model, batch = attach(tiny_model()), shared_prefix_batch(tiny_pairs())
    for _ in range(3):
        model(batch)
    assert len(probed) == 1
    copy.deepcopy(model)(batch)
    assert len(probed) == 2


def state_of(model):
    hooks = [len(getattr(m, kind)) for m in model.modules() for kind in ("_forward_hooks", "_forward_pre_hooks")]
    return torch.get_rng_state().tolist(), [m.training for m in model.modules()], hooks, set(vars(model))


@pytest.mark.parametrize("training", [False, True])
def test_the_probe_leaves_no_trace(training):
    model, calls = attach(tiny_model(attention_dropout=0.1)), []
    model.train(training)
    model.model.layers[0].eval()
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    model.model.register_forward_hook(lambda *_: calls.append(1))
    before = state_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert reasons_against_packed_rows(model)
        assert torch.is_autocast_cache_enabled()
    assert state_of(model) == before and calls == []
    assert all(p.grad is None for p in model.parameters())


def test_the_first_packed_batch_under_autocast_gives_every_gradient():
    """Casts made without gradients must not stay in autocast's cache."""
    model, batch, found = tiny_model(), shared_prefix_batch(tiny_pairs()), []
    for proven in (False, True):
        twin = attach(copy.deepcopy(model))
        if proven:
            reasons_against_packed_rows(twin)
        with torch.autocast("cpu", torch.bfloat16):
            loss = twin(batch).logps.sum()
        loss.backward()
        found.append({name: p.grad for name, p in twin.named_parameters()})
    assert all(g is not None and torch.equal(g, found[1][name]) for name, g in found[0].items())


@pytest.mark.parametrize("window", [None, 8])
def test_the_probes_cost_is_what_is_written_down(window):
    model, counted = tiny_model("mistral", sliding_window=window), []
    attach(model)
    embed = torch.nn.functional.embedding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "embedding", lambda ids, *a: counted.append(ids.numel()) or embed(ids, *a))
        assert reasons_against_packed_rows(model) == []
    assert (max(counted) <= 6 * max(probe_tokens(model.config)), sum(counted)) == (True, probe_tokens(model.config)[1])
    if window is None:
        assert probe_tokens(model.config) == (27, 231)  # as the docstring says
    longest = max(len(p.chosen_prompt) + len(p.chosen) for p in probe_pairs(model.config))
    assert window is None or longest > window


# --- what may change between calls ---------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(model, where):
    """A hook that reads the shape of what it sees."""
    rows = []

    def note(_module, args, *_):
        rows.extend(x.shape[1] for x in args if isinstance(x, torch.Tensor) and x.ndim == 3)

    layer = model.model.layers[1]
    register = {
        "layer": lambda: layer.register_forward_hook(note),
        "before": lambda: layer.register_forward_pre_hook(note),
        "attention": lambda: layer.self_attn.register_forward_hook(note),
        "projection": lambda: layer.self_attn.q_proj.register_forward_hook(note),
        "backward": lambda: layer.register_full_backward_hook(note),
        "embeddings": lambda: model.get_input_embeddings().register_forward_hook(note),
        "everywhere": lambda: torch.nn.modules.module.register_module_forward_hook(note),
    }[where]
    handle = register()
    try:
        yield rows
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "where", ["layer", "before", "attention", "projection", "backward", "embeddings", "everywhere"]
)
def test_hooks_inside_the_backbone_see_sequences(where, caplog):
    model, pairs = attach(tiny_model()), tiny_pairs()
    batch = shared_prefix_batch(pairs)
    expected = model(batch).logps
    packing._log_once.cache_clear()
    with hooked(model, where) as rows, caplog.at_level("WARNING", "dpo_fast"):
        found = model(batch).logps
        found.sum().backward()
    longest = max(len(p.chosen_prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs)
    assert all(row == longest for row in rows) and (rows or where in ("attention", "backward", "embeddings"))
    assert torch.allclose(found, expected, atol=1e-5)
    assert "would see packed rows" in caplog.text and "note" in caplog.text
    assert reasons_against_packed_rows(model) == []  # the hook is gone


def test_hooks_of_libraries_see_packed_rows():
    model = attach(tiny_model()).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert reasons_against_packed_rows(model) == []


def test_neftune_sees_sequences(caplog):
    from transformers.integrations.neftune import activate_neftune

    model = attach(tiny_model())
    activate_neftune(model, 5.0)
    reasons = reasons_against_packed_rows(model)
    assert len(reasons) == 1 and "neftune_noise_alpha" in reasons[0]


DROPOUT = {
    "llama": dict(attention_dropout=0.1),
    "gpt2": dict(attn_pdrop=0.1),
    "biogpt": dict(attention_probs_dropout_prob=0.1, hidden_dropout_prob=0.0),
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_attention_dropout_asks_for_padded_rows_in_training_only(kind):
    model = attach(tiny_model(kind, **DROPOUT[kind]))
    assert reasons_against_packed_rows(model) == []
    assert "attention dropout (0.1)" in reasons_against_packed_rows(model.train())[0]
    assert model(shared_prefix_batch(tiny_pairs())).logps.isfinite().all()


def test_layers_that_are_left_out_at_random_ask_for_padded_rows():
    model = attach(tiny_model("biogpt", layerdrop=0.5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    assert reasons_against_packed_rows(model) == []
    assert "layerdrop" in reasons_against_packed_rows(model.train())[0]


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "AdaptionPromptConfig"])
def test_adapters_that_work_on_rows_are_refused_by_name(kind):
    peft = pytest.importorskip("peft")
    options = dict(adapter_len=4, adapter_layers=2) if kind == "AdaptionPromptConfig" else dict(num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model(), getattr(peft, kind)(task_type="CAUSAL_LM", **options))
    with pytest.raises(TypeError, match="attach: the adapter .*; use LoRA"):
        attach(model)


@pytest.mark.parametrize("options", [dict(), dict(use_dora=True), dict(use_rslora=True)])
def test_adapters_that_work_on_tokens_are_packed(options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **options)
    model, pairs = attach(peft.get_peft_model(tiny_model(), config).eval()), tiny_pairs()
    assert reasons_against_packed_rows(model) == []
    assert torch.allclose(sums_of(model, shared_prefix_batch(pairs)), sums_of(model, padded_batch(pairs, 0)), atol=1e-4)


# --- backbones -----------------------------------------------------------------------------------------------------

PARTS = {
    "opt": dict(num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
    "opt, projected": dict(num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=16, max_position_embeddings=64),
    "trocr": dict(decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, d_model=32),
    "pegasus": dict(decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, d_model=32),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_model_that_calls_a_part_of_its_base_model_is_served(name):
    kind, sizes = name.partition(",")[0], PARTS[name]
    config = tf.AutoConfig.for_model(kind, **{**dict(vocab_size=97, hidden_size=32, num_hidden_layers=2), **sizes})
    model = build(config)
    own = own_sums(model, PAIRS)
    attach(model)
    for batch in (shared_prefix_batch(PAIRS), padded_batch(PAIRS, 0)):
        assert (sums_of(model, batch) - own).abs().max() < 1e-4
    assert backbone_of(model) is not model.base_model
    assert bool(reasons_against_packed_rows(model)) == (kind != "opt")


def test_compiled_code_asks_for_no_graph_break():
    model, batch = attach(tiny_model()), shared_prefix_batch(tiny_pairs())
    expected = model(batch).logps
    torch.compiler.reset()
    fresh = shared_prefix_batch(tiny_pairs())
    assert torch._dynamo.explain(lambda b: model(b).logps)(fresh).graph_break_count == 0
    compiled = torch.compile(lambda b: model(b).logps, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(shared_prefix_batch(tiny_pairs())), expected, atol=1e-6)


def test_weights_that_are_not_there_yet_are_proven_at_the_first_batch(caplog):
    make, _ = WRONG["stablelm"]
    ready = build(make())
    own = own_sums(ready, PAIRS)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(make()).eval()
    attach(model)
    model.to_empty(device="cpu")
    model.load_state_dict(ready.state_dict())
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert (sums_of(model, shared_prefix_batch(PAIRS)) - own).abs().max() < 1e-4
