"""completion_logps and get_batch_logps: what the loops that exist hold already, scored as they would."""

import copy

import pytest
import torch
from reads import counted_reads
from tiny import tiny_model

import dpo_fast
from dpo_fast import completion, packing
from dpo_fast.completion import completion_logps, get_batch_logps, score_rows
from dpo_fast.forward import detach, is_attached
from dpo_fast.ops.stats import STATS

IDS = torch.tensor(
    [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0], [5, 6, 7, 20, 0, 0], [11, 12, 21, 22, 23, 24]]
)  # [chosen, rejected]
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 4 + [0] * 2, [1] * 6])
PROMPTS = torch.tensor([[3], [2], [3], [2]])
LABELS = IDS.masked_fill((torch.arange(6) < PROMPTS) | (MASK == 0), -100)
ROWS = (IDS, MASK, LABELS)


def left(rows=ROWS):
    """The same sequences, padded before them."""
    columns = torch.arange(rows[0].shape[1])
    rolled = (columns - (rows[1] == 0).sum(1, keepdim=True)) % len(columns)
    return tuple(x.gather(1, rolled) for x in rows)


def in_the_field(logits, labels, average=False, pad=-100):
    """As loops have it: shift, log-softmax, gather, mask, sum."""
    labels = labels[:, 1:].clone()
    mask = labels != pad
    labels[~mask] = 0
    tokens = logits[:, :-1].log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2) * mask
    return tokens.sum(-1) / mask.sum(-1) if average else tokens.sum(-1)


def of_model(model, ids=IDS, mask=MASK, labels=LABELS):
    return in_the_field(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, labels)


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_same(model, found, true):
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, len(true))
    a, b = (gradients(model, (x * weights).sum()) for x in (found, true))
    assert (a - b).norm() <= 1e-5 * b.norm()


# --- rows and models as they come ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, left()], ids=["right", "left"])
@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_logps_are_those_of_the_models_own_logits(kind, pairs, rows):
    model = tiny_model(kind)
    true = of_model(model)  # padded on the right: absolute positions are right there alone
    found = completion_logps(model, *rows, pairs=pairs, outputs=STATS)
    assert found.lengths.tolist() == [3, 2, 1, 4] and found.logps.dtype == torch.float32
    assert torch.equal(found.mean_logps, found.logps / found.lengths)
    for name in ("token_logps", *STATS):
        assert getattr(found, name).shape == (4, 5)
        assert (getattr(found, name)[rows[2][:, 1:] == -100] == 0).all(), name
    torch.testing.assert_close(found.token_logps.sum(1), found.logps)
    assert_same(model, found.logps, true)


def test_the_first_call_attaches_and_detach_undoes_it():
    model = tiny_model()
    forward = model.forward
    completion_logps(model, *ROWS)
    assert is_attached(model) and dpo_fast.detach(model) is model
    assert not is_attached(model) and model.forward == forward


def test_what_two_rows_begin_with_runs_once():
    model, seen = tiny_model(), []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    completion_logps(model, *ROWS)
    assert seen[-1] == (1, (6 + 1) + (4 + 4))
    several = IDS[:, [0, 0, 0, 3, 4, 5]].masked_fill(torch.arange(6) < 3, 5)  # pairs of one prompt
    completion_logps(
        model, several, torch.ones_like(several), several.masked_fill(torch.arange(6) < 3, -100), pairs=False
    )
    assert seen[-1] == (1, 3 + 4 * 3)


def test_on_a_gpu_the_host_reads_once(monkeypatch):
    model = tiny_model()
    completion_logps(model, *ROWS)
    from dpo_fast.layout import SharedPrefixLayout
    from dpo_fast.ops import dispatch

    make = SharedPrefixLayout.make
    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    with counted_reads() as (reads, stream):

        def on_the_host(*args):
            with stream.paused():
                return make(*args)

        monkeypatch.setattr(SharedPrefixLayout, "make", on_the_host)
        completion_logps(model, *ROWS, ld_alpha=0.5, outputs=("entropy",)).logps.sum().backward()
    assert reads["dpo_fast"] == 1 and set(reads) == {"dpo_fast"}, reads


def test_ld_dpo_weighs_the_tokens_beyond_the_shorter_completion():
    model = tiny_model()
    tokens, found = completion_logps(model, *ROWS).token_logps, completion_logps(model, *ROWS, ld_alpha=0.25).logps
    shorter, number = torch.tensor([1, 2, 1, 2]), (LABELS[:, 1:] != -100).cumsum(1)
    torch.testing.assert_close(found, (tokens * torch.where(number <= shorter[:, None], 1.0, 0.25)).sum(1))


def test_labels_of_several_turns():
    model = tiny_model()
    labels = LABELS.clone()
    labels[0, 4], labels[3, 3:5] = -100, -100
    assert_same(model, completion_logps(model, IDS, MASK, labels).logps, of_model(model, labels=labels))


def test_labels_may_differ_from_the_tokens():
    model = tiny_model()
    labels = LABELS.masked_fill(LABELS == 8, 30)
    assert_same(model, completion_logps(model, IDS, MASK, labels).logps, of_model(model, labels=labels))


def test_rows_without_padding_need_no_mask():
    model, ids = tiny_model(), IDS[[0, 3]]
    labels = LABELS[[0, 3]]
    found = completion_logps(model, ids, None, labels, pairs=False)
    assert_same(model, found.logps, of_model(model, ids, torch.ones_like(ids), labels))


def test_balancing_loss_of_experts():
    model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
                       output_router_logits=True)  # fmt: skip
    own = model(input_ids=IDS, attention_mask=MASK, use_cache=False)
    found = completion_logps(model, *ROWS)
    assert found.aux_loss.item() == pytest.approx(own.aux_loss.item(), rel=1e-5)
    assert_same(model, found.logps + found.aux_loss, in_the_field(own.logits, LABELS) + own.aux_loss)
    model.config.output_router_logits = False
    assert completion_logps(model, *ROWS).aux_loss is None


def test_rows_without_a_label_are_for_callers_that_know():
    model, labels = tiny_model(), LABELS.clone()
    labels[1] = -100
    found = score_rows(model, IDS, MASK, labels)
    assert found.logps[1] == 0 and found.lengths[1] == 0 and found.mean_logps[1].isnan()


# --- what runs as padded rows, and says so ---------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    completion._say_once.cache_clear()
    packing._log_once.cache_clear()
    with caplog.at_level("WARNING", "dpo_fast"):
        yield caplog


def test_a_model_that_cannot_run_a_packed_row(said):
    model = tiny_model("bloom", n_head=4)
    assert_same(model, completion_logps(model, *left()).logps, of_model(model))
    assert "padded rows, not shared prefixes" in said.text


def test_images(said):
    import transformers

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlavaConfig(
        text_config=dict(model_type="qwen2", vocab_size=100, num_key_value_heads=2, **sizes),
        vision_config=dict(model_type="clip_vision_model", image_size=8, patch_size=4, projection_dim=16, **sizes),
        image_token_index=99,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.cat([torch.full((4, 4), 99), IDS], 1)
    mask, labels = (torch.nn.functional.pad(x, (4, 0), value=value) for x, value in ((MASK, 1), (LABELS, -100)))
    pixels = torch.randn(4, 3, 8, 8)
    true = in_the_field(model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits, labels)
    found = completion_logps(model, ids, mask, labels, pixel_values=pixels, image_sizes=None)
    assert_same(model, found.logps, true)
    assert "padded rows, not shared prefixes, because the batch has pixel_values" in said.text


def test_a_model_whose_head_is_unknown_gives_its_own_logits(said):
    """BERT has layers between the backbone and the product."""
    model = tiny_model("bert", is_decoder=True)
    found = completion_logps(model, *left(), outputs=("entropy",))
    p = model(input_ids=IDS, attention_mask=MASK).logits.softmax(-1)
    entropy = -(p * p.log()).sum(-1)[:, :-1].masked_fill(LABELS[:, 1:] == -100, 0)
    torch.testing.assert_close(found.entropy.sum(1), entropy.sum(1))
    assert_same(model, found.logps, of_model(model))
    assert "BertLMHeadModel's own logits, because attach: BertLMHeadModel changes hidden states" in said.text
    assert not is_attached(model)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_virtual_tokens(kind, said):
    peft = pytest.importorskip("peft")
    if kind == "PrefixTuningConfig":
        pytest.importorskip("peft", minversion="0.18")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model(), config)
    logits = model(input_ids=IDS, attention_mask=MASK).logits[:, -IDS.shape[1] :]
    found = completion_logps(model, *ROWS)
    assert_same(model, found.logps, in_the_field(logits, LABELS))
    assert "own logits, because attach: the adapter" in said.text


def test_rows_that_a_hook_spreads_over_devices_are_refused():
    """As sequence parallelism does it: each rank's backbone sees a part of each row."""
    model = tiny_model()
    model.model.norm.register_forward_hook(lambda _module, _args, out: out[:, :3])
    with pytest.raises(ValueError, match="sequence parallel"):
        completion_logps(model, *ROWS)


# --- wrappers --------------------------------------------------------------------------------------------------------


class Actor(torch.nn.Module):
    """As a framework's own module: another forward, the model in an attribute."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, sequences, action_mask=None):
        raise AssertionError("an actor's own forward is not asked for")


def test_an_actor_around_the_model():
    model = tiny_model()
    true, actor, ran = of_model(model), Actor(model), []
    actor.register_forward_hook(lambda *_: ran.append("its hooks run"))
    assert_same(model, completion_logps(actor, *ROWS).logps, true)
    assert ran and "forward" not in vars(actor)
    with pytest.raises(AssertionError, match="own forward"):
        actor(IDS)


def test_an_actors_forward_comes_back_after_an_error():
    actor = Actor(tiny_model())
    actor.forward = own = lambda *_: None
    with pytest.raises(ValueError, match="token id 99999"):
        completion_logps(actor, IDS.masked_fill(IDS == 8, 99999), MASK, LABELS)
    assert actor.forward is own


def test_lora_and_its_disabled_adapter():
    peft = pytest.importorskip("peft")
    base = tiny_model()
    true = of_model(base)
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert_same(model, completion_logps(model, *ROWS).logps, of_model(model))
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(completion_logps(model, *ROWS).logps, true)


def test_accelerates_autocast_is_kept_where_it_prepared_first():
    """As in a trainer's loop: the model is attached by its first call, when it was prepared long ago."""
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(tiny_model())
        forward, dtypes = model.forward, []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _m, _a, out: dtypes.append(out.dtype))
        true = of_model(model)
        found = completion_logps(model, *ROWS)
        assert set(dtypes) == {torch.bfloat16} and found.logps.dtype == torch.float32
        torch.testing.assert_close(found.logps, true, rtol=2e-2, atol=2e-2)
        assert detach(model).forward == forward
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_a_deep_copy_has_its_own():
    model = tiny_model()
    completion_logps(model, *ROWS)
    other = copy.deepcopy(model)
    other.lm_head.weight.data.neg_()
    assert_same(other, completion_logps(other, *ROWS).logps, of_model(other))


# --- get_batch_logps -------------------------------------------------------------------------------------------------


def logits_of(dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(4, 6, 31) * 3).to(dtype).requires_grad_()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("pad", [-100, 0, 7])
def test_get_batch_logps_as_in_the_original_repository(average, pad):
    labels = LABELS.masked_fill(LABELS == -100, pad)
    mine, theirs = logits_of(), logits_of()
    found, true = get_batch_logps(mine, labels, average, pad), in_the_field(theirs, labels, average, pad)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, 4)
    for x, y in ((found, mine), (true, theirs)):
        (x * weights).sum().backward()
        assert y.grad.shape == y.shape
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    again, lengths = get_batch_logps(
        mine, labels, average_log_prob=average, label_pad_token_id=pad, return_lengths=True
    )
    assert torch.equal(again, found) and torch.equal(lengths, (labels[:, 1:] != pad).sum(1))


def test_get_batch_logps_on_examples_by_hand():
    """Of uniform logits each token has -log V; the label of the first position is not scored."""
    logits = torch.zeros(2, 4, 8)
    labels = torch.tensor([[1, 2, 3, 4], [-100, -100, 5, 6]])
    log8 = torch.tensor(8.0).log()
    torch.testing.assert_close(get_batch_logps(logits, labels), torch.stack([-3 * log8, -2 * log8]))
    torch.testing.assert_close(get_batch_logps(logits, labels, True), torch.stack([-log8, -log8]))


def test_get_batch_logps_leaves_its_arguments():
    logits, labels = logits_of(), LABELS.clone()
    before = logits.detach().clone()
    get_batch_logps(logits, labels).sum().backward()
    assert torch.equal(logits, before) and torch.equal(labels, LABELS)


def test_get_batch_logps_over_the_logits():
    hidden, weight = torch.randn(4, 6, 8), torch.randn(31, 8, requires_grad=True)
    true = gradient_of(get_batch_logps(hidden @ weight.T, LABELS), weight)
    logits = hidden @ weight.T
    found = gradient_of(get_batch_logps(logits, LABELS, inplace_backward=True), weight)
    assert torch.equal(found, true) and (logits[:, -1] == 0).all()  # the gradient lies where they were


def gradient_of(value, leaf):
    (found,) = torch.autograd.grad(value.sum(), leaf)
    return found


def test_get_batch_logps_asks_no_device(monkeypatch):
    from dpo_fast.ops import dispatch

    monkeypatch.setattr(dispatch, "_HOST_DEVICES", ())
    with counted_reads() as (reads, _):
        get_batch_logps(logits_of(), LABELS, average_log_prob=True, return_lengths=True)[0].sum().backward()
    assert not reads


@pytest.mark.parametrize("dtype, wide", [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_get_batch_logps_dtypes(dtype, wide):
    logits = logits_of(dtype)
    found = get_batch_logps(logits, LABELS.int())
    found.sum().backward()
    assert found.dtype == wide and logits.grad.dtype == dtype
    torch.testing.assert_close(found, in_the_field(logits.detach().to(wide), LABELS), rtol=1e-5, atol=1e-5)


def test_a_row_without_labels():
    labels = LABELS.clone()
    labels[1] = -100
    assert get_batch_logps(logits_of(), labels)[1] == 0
