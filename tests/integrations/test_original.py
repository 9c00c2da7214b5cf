"""The original DPO repository's loop, as benchmarks/interop/original.py has it, and with our functions in it."""

import pytest
import torch
from tiny import tiny_model, tiny_pairs
from torch.nn.utils.rnn import pad_sequence

from benchmarks.interop import original
from dpo_fast import get_batch_logps


class Clock:
    def step(self) -> None:
        pass


def batch_of(seed: int, pairs: int = 3) -> dict[str, torch.Tensor]:
    """Chosen and rejected are padded to lengths of their own."""
    found, batch = tiny_pairs(pairs, seed=seed), {}
    for side in ("chosen", "rejected"):
        both = [(pair.chosen_prompt, getattr(pair, side)) for pair in found]
        rows = {
            "input_ids": ([torch.tensor(prompt + completion) for prompt, completion in both], 0),
            "attention_mask": ([torch.ones(len(p) + len(c), dtype=torch.int64) for p, c in both], 0),
            "labels": ([torch.tensor([-100] * len(p) + c) for p, c in both], -100),
        }
        for name, (of_rows, pad) in rows.items():
            batch[f"{side}_{name}"] = pad_sequence(of_rows, batch_first=True, padding_value=pad)
    return batch


def test_two_steps_are_the_same():
    batches, found = [batch_of(seed) for seed in range(2)], {}
    for way in ("before", "after"):
        trainer = original.Trainer(tiny_model(), tiny_model(seed=1), Clock(), way)
        trainer.train(batches)
        found[way] = trainer.curves, dict(trainer.policy.named_parameters())
    (before, theirs), (after, ours) = found["before"], found["after"]
    assert before.keys() == after.keys() and len(set(before["loss"])) == 2
    for name in before:
        assert after[name] == pytest.approx(before[name], abs=1e-5, rel=1e-5)
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("average_log_prob", [False, True])
def test_its_function_by_our_name(average_log_prob):
    batch = original.concatenated_inputs(batch_of(0))
    ids, labels = batch["concatenated_input_ids"], batch["concatenated_labels"]
    with torch.no_grad():
        logits = tiny_model()(ids, attention_mask=batch["concatenated_attention_mask"]).logits
    grads, kept = [], labels.clone()
    for function in (original._get_batch_logps, get_batch_logps):
        mine = logits.clone().requires_grad_()
        logps = function(mine, labels, average_log_prob)
        assert logps.shape == (6,) and torch.equal(labels, kept)
        logps.square().sum().backward()
        grads.append((logps.detach(), mine.grad))
    for theirs, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused_by_both():
    logits, labels = torch.zeros(2, 5, 7), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(AssertionError):
        original._get_batch_logps(logits, labels)
    with pytest.raises(ValueError, match="labels"):
        get_batch_logps(logits, labels)
