"""What is neither GEMM nor attention: sums over sequences, losses of pairs, the collation of a batch."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.groups import CUDA, optional, take_turns
from benchmarks.train_step.inputs import MIXES, make_pairs
from dpo_fast import preference_loss, sequence_logps
from dpo_fast.testing import assert_within_bound, gamma
from dpo_fast.training.data import PairCollator

DEVICE = "cuda" if CUDA else "cpu"
ROUNDS = 30

# --- sums over sequences -------------------------------------------------------------------------------------------

PAIRS, LENGTH = 512, 200


def sums() -> dict:
    """Token log-probs (N,) -> (2P,), all of one length, so that a padded mask is no more work than the tokens."""
    torch.manual_seed(0)
    logps = -torch.rand(2 * PAIRS * LENGTH, device=DEVICE) * 5
    ids = torch.arange(2 * PAIRS, device=DEVICE).repeat_interleave(LENGTH)
    lengths, mask = ids.bincount(), torch.ones(2 * PAIRS, LENGTH, device=DEVICE)
    truth = logps.double().view(2 * PAIRS, LENGTH).sum(1)
    bound = gamma(LENGTH) * truth.abs()

    def check(name, result):
        assert_within_bound(result, truth, bound, what=name)

    members = {
        "ours": lambda: sequence_logps(logps, ids, 2 * PAIRS),
        "eager": lambda: logps.new_zeros(2 * PAIRS).index_add(0, ids, logps),
        "torch": lambda: torch.segment_reduce(logps, "sum", lengths=lengths),
        "trl": lambda: (logps.view(2 * PAIRS, LENGTH) * mask).sum(-1),  # as its trainer does
    }
    return take_turns(members, check, ROUNDS)


@pytest.mark.parametrize("member", ["ours", "eager", "torch", "trl"])
def test_sequence_sums(measured, speed, member):
    group = f"sums of {2 * PAIRS} sequences of {LENGTH} tokens"
    speed(group, member, measured(group, sums))


# --- losses --------------------------------------------------------------------------------------------------------

MANY, BETA = 8192, 0.1
FORMULAS = {  # of the margin between the log-ratios
    "sigmoid": lambda margin: -F.logsigmoid(BETA * margin),
    "hinge": lambda margin: torch.relu(1 - BETA * margin),
    "ipo": lambda margin: (margin - 1 / (2 * BETA)) ** 2,
}


def losses(name: str) -> dict:
    torch.manual_seed(0)
    logps = [torch.randn(MANY, device=DEVICE) * 20 - 200 for _ in range(4)]
    ones = torch.ones(MANY, device=DEVICE)

    def eager(chosen, rejected, ref_chosen, ref_rejected):
        return FORMULAS[name]((chosen - rejected) - (ref_chosen - ref_rejected))

    def ours(*logps):
        lengths = dict(chosen_lengths=ones, rejected_lengths=ones) if name == "ipo" else {}
        return preference_loss(*logps, loss=name, beta=BETA, **lengths)

    def member(function, dtype=torch.float32):
        values = [x.to(dtype) for x in logps]
        leaves = [x.clone().requires_grad_() for x in values[:2]]

        def run():
            loss = function(*leaves, *values[2:])
            return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

        return run

    truth = member(eager, torch.float64)()
    # A margin is three differences of numbers below 300, and no slope or curvature here is above 2 |margin| + 1 / beta
    rounding = 3 * gamma(1) * 300
    slope = (2 * (logps[0] - logps[1] - logps[2] + logps[3]).double().abs() + 2 / BETA) * rounding
    bounds = [slope + gamma(8) * truth[0].abs(), *(2 * rounding + gamma(8) * d.abs() for d in truth[1:])]

    def check(name, result):
        for found, exact, bound in zip(result, truth, bounds, strict=True):
            jump = (truth[0] < 2 * rounding) if name == "hinge" else torch.zeros_like(exact, dtype=torch.bool)
            assert_within_bound(found[~jump], exact[~jump], bound[~jump], what=name)

    return take_turns({"ours": member(ours), "eager": member(eager)}, check, ROUNDS)


@pytest.mark.parametrize("member", ["ours", "eager"])
@pytest.mark.parametrize("loss", FORMULAS)
def test_loss(measured, speed, loss, member):
    group = f"loss of {MANY} pairs, {loss}, forward + backward"
    speed(group, member, measured(group, losses, loss))


# --- collation -----------------------------------------------------------------------------------------------------

BATCH, LONGEST, VOCAB = 64, 1024, 32_000


def load_trl_collator():
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0)


def collation() -> dict:
    rows = make_pairs(MIXES["chat"], BATCH, LONGEST, VOCAB, seed=0)
    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in rows]
    whole = [torch.tensor(row["prompt_ids"] + row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    completions = torch.tensor([t for side in ("chosen_ids", "rejected_ids") for row in rows for t in row[side]])

    def check(name, batch):
        if name == "ours-packed":
            ids = torch.tensor([t for row in rows for part in row.values() for t in part])
            assert torch.equal(batch["input_ids"][0], ids), name
        else:
            for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], whole, strict=True):
                assert torch.equal(ids[mask.bool()], row), name
        scored = batch["targets"] if name.startswith("ours") else batch["input_ids"][batch["completion_mask"].bool()]
        assert torch.equal(scored.sort().values, completions.sort().values), name

    collators = {"ours": PairCollator(0), "ours-packed": PairCollator(0, layout="shared_prefix")}
    collators |= optional([("trl", load_trl_collator)])
    members = {
        name: collator if isinstance(collator, ImportError) else (lambda collator=collator: collator(rows))
        for name, collator in collators.items()
    }
    return take_turns(members, check, ROUNDS)


@pytest.mark.parametrize("member", ["ours", "ours-packed", "trl"])
def test_collation(measured, speed, member):
    group = f"collation of {BATCH} pairs, chat lengths"
    speed(group, member, measured(group, collation))
