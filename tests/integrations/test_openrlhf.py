"""OpenRLHF's trainer with our forward: a trainer of its signatures in its module's place, as it is not installed."""

import importlib
import sys
import types

import pytest
import torch
from tiny import tiny_model, tiny_pairs
from torch import nn
from torch.nn.utils.rnn import pad_sequence


class Actor(nn.Module):
    """Answers as OpenRLHF's: log-probs of each next token, and the model's output."""

    def __init__(self, model: nn.Module, temperature: float = 1.0):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, sequences, attention_mask=None, return_output=False, return_logprobs=False, ring_attn_group=None):
        assert return_output and return_logprobs
        output = self.model(sequences, attention_mask=attention_mask)
        logps = output.logits[:, :-1].log_softmax(-1)
        return logps.gather(2, sequences[:, 1:].unsqueeze(2)).squeeze(2), output


class Theirs:
    """What the swap uses of OpenRLHF's DPOTrainer, and what it replaces."""

    def __init__(self, model, ref_model, strategy, tokenizer, optim, *loaders, beta=0.01):
        self.strategy, self.tokenizer = strategy, tokenizer

    def concatenated_inputs(self, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        width = max(chosen_ids.shape[1], reject_ids.shape[1])

        def rows(chosen, rejected, pad):
            return torch.cat([nn.functional.pad(x, (0, width - x.shape[1]), value=pad) for x in (chosen, rejected)])

        pad = self.tokenizer.pad_token_id
        return rows(chosen_ids, reject_ids, pad), rows(c_mask, r_mask, 0), prompt_id_lens * 2

    def concatenated_forward(self, model, chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens):
        ids, masks, lengths = self.concatenated_inputs(chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens)
        logps, output = model(ids, attention_mask=masks, return_output=True, return_logprobs=True)
        scored = masks.bool()
        for row, length in zip(scored, lengths, strict=True):
            row[:length] = False
        sums, pairs = (logps * scored[:, 1:]).sum(1), len(chosen_ids)
        means = sums / scored[:, 1:].sum(1)
        aux_loss = output.aux_loss if "aux_loss" in output else []
        return sums[:pairs], sums[pairs:], aux_loss, -means[:pairs].mean()


@pytest.fixture
def ours(monkeypatch):
    """The class to import, as it is where OpenRLHF is installed."""
    name = "dpo_fast.integrations.openrlhf"
    trainer = types.ModuleType("openrlhf.trainer.dpo_trainer")
    trainer.DPOTrainer = Theirs
    package = types.ModuleType("openrlhf.trainer")
    package.dpo_trainer = trainer
    for module in (types.ModuleType("openrlhf"), package, trainer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name).DPOTrainer
    sys.modules.pop(name)


STRATEGY = types.SimpleNamespace(ring_attn_group=None)
TOKENIZER = types.SimpleNamespace(pad_token_id=0)


def batch_of(pairs: int = 3) -> tuple:
    """chosen_ids, c_mask, reject_ids, r_mask, prompt_id_lens, each side padded on the right to its own length."""
    found, sides = tiny_pairs(pairs), []
    for side in ("chosen", "rejected"):
        rows = [torch.tensor(pair.chosen_prompt + getattr(pair, side)) for pair in found]
        sides.append(pad_sequence(rows, batch_first=True))
        sides.append(pad_sequence([torch.ones_like(row) for row in rows], batch_first=True))
    return *sides, [len(pair.chosen_prompt) for pair in found]


def test_the_same_numbers(ours):
    """Of a mixture of experts, which has a balancing loss, too."""
    found, grads = [], []
    for trainer in (Theirs, ours):
        actor = Actor(tiny_model("mixtral", num_local_experts=4, output_router_logits=True))
        out = trainer(actor, None, STRATEGY, TOKENIZER, None).concatenated_forward(actor, *batch_of())
        chosen, rejected, aux_loss, nll = out
        (nll + (rejected - chosen).mean() + aux_loss).backward()
        found.append([x.detach() for x in out])
        grads.append([p.grad for p in actor.parameters() if p.grad is not None])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=0)
    for x, y in zip(*grads, strict=True):
        assert (x - y).norm() <= 1e-5 * x.norm()


def test_what_cannot_be_scored_is_refused(ours):
    actor = Actor(nn.Identity())
    with pytest.raises(ValueError, match="ring_attn_size spreads a row over devices"):
        ours(actor, None, types.SimpleNamespace(ring_attn_group=object()), TOKENIZER, None)
    with pytest.raises(ValueError, match="temperature must be 1 where it is trained, got 0.7"):
        ours(actor, Actor(nn.Identity(), temperature=0.7), STRATEGY, TOKENIZER, None)
