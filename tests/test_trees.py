"""Rows of trees that are not pairs through models: hidden states and gradients are those of separate rows."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig
from trees import TREES, places

from dpo_fast import attention
from dpo_fast.layout import SharedPrefixLayout, pack, row_length, shared_with_before

SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
MODELS = {
    "Llama": lambda: LlamaConfig(**SIZES, num_key_value_heads=1),
    "Gemma-2": lambda: Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, sliding_window=4),
    "GPT-2": lambda: GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    ),
}


def tokens(seed, count):
    return random.Random(seed).choices(range(64), k=count)


def completions_of_a_prompt():
    prompt = tokens(0, 7)
    return [[prompt + [k] + tokens(k, k) for k in range(1, 5)]]


def system_prompt_over_prompts():
    system = tokens(5, 6)
    return [[system + [p] + tokens(p, 4) + [k] + tokens(9 * p + k, 2 + k) for k in range(2)] for p in range(3)]


def nested_and_equal():
    return [[tokens(8, n)] for n in (3, 6, 6, 9, 2)]


GROUPS = {
    "four completions of a prompt": (completions_of_a_prompt(), False, 21),
    "a system prompt over three prompts": (system_prompt_over_prompts(), True, 42),
    "prompts that do not share across": (system_prompt_over_prompts(), False, 54),
    "nested and equal sequences": (nested_and_equal(), True, 9),
    "all in one row": (completions_of_a_prompt() + system_prompt_over_prompts() + nested_and_equal(), True, None),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", GROUPS)
def test_a_row_gives_hidden_states_and_gradients_of_separate_rows(name, kind):
    groups, across, _ = GROUPS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[kind]()).double()
    attention.enable(model)
    ids, layout = pack(groups, across=across)
    positions = layout.positions.long().unsqueeze(0)
    inputs = attention.model_inputs(layout, torch.device("cpu"))
    row = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **inputs)[0][0]
    found = row[layout.index]
    sequences = [s for group in groups for s in group]
    true = torch.cat([model.base_model(input_ids=torch.tensor([s]), use_cache=False)[0][0] for s in sequences])
    # Softmax is in fp32 where a model has a soft-cap
    assert (found - true).norm() <= 1e-6 * true.norm()
    cotangent = torch.randn(true.shape, dtype=true.dtype, generator=torch.Generator().manual_seed(1))
    parameters = list(model.base_model.parameters())
    for ours, theirs in zip(
        *(torch.autograd.grad((x * cotangent).sum(), parameters) for x in (found, true)), strict=True
    ):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", GROUPS)
def test_a_row_holds_each_shared_token_once(name):
    groups, across, length = GROUPS[name]
    ids, layout = pack(groups, across=across)
    assert row_length(groups, across) == layout.length == ids.shape[1] and layout.length == (length or layout.length)
    flat = [token for group in groups for s in group for token in s]
    assert ids[0][layout.index].tolist() == flat
    assert layout.lengths == tuple(len(s) for group in groups for s in group)


@pytest.mark.parametrize("lengths, shared", TREES.values(), ids=TREES)
def test_index_positions_and_counts(lengths, shared):
    layout = SharedPrefixLayout.make(lengths, shared)
    true = places(lengths, shared)
    assert layout.index.tolist() == [at for sequence in true for at in sequence]
    for sequence in true:
        assert layout.positions[sequence].tolist() == list(range(len(sequence)))
    counts = [sum(at in sequence for sequence in true) for at in range(layout.length)]
    assert layout.sequences_per_token().tolist() == counts
    assert layout.longest == (max(n - k for n, k in zip(lengths, shared, strict=True)), max(lengths))


def test_neighbours_share_only_within_a_group_unless_asked():
    groups = [[[1, 2, 3], [1, 2, 4]], [[1, 2], [1, 5]]]
    assert shared_with_before(groups) == [0, 2, 0, 1]
    assert shared_with_before(groups, across=True) == [0, 2, 2, 1]


@pytest.mark.parametrize(
    "lengths, shared", [([3], [1]), ([3, 2], [0, 3]), ([3, 5], [0, 4]), ([3, 5], [0, -1]), ([3, 5], [0])]
)
def test_shares_that_no_sequence_has(lengths, shared):
    with pytest.raises(ValueError, match="shares between 0 and all tokens"):
        SharedPrefixLayout.make(lengths, shared)
