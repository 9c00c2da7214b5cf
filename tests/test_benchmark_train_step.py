"""benchmarks.train_step: its inputs, its sums, and one tiny run of all three trainers."""

import json
import random

import pytest

pytest.importorskip("trl")

from benchmarks import train_step, train_step_inputs


def test_pairs_have_the_lengths_of_their_mix():
    rng = random.Random(0)
    prompts, chosen, rejected = zip(
        *(train_step_inputs.MIXES["chat"].lengths(rng, 2048) for _ in range(2000)), strict=True
    )
    for values, median in ((prompts, 150), (chosen, 200), (rejected, 200)):
        assert sorted(values)[1000] == pytest.approx(median, rel=0.1)
        assert max(values) > 4 * median
    assert max(p + max(c, r) for p, c, r in zip(prompts, chosen, rejected, strict=True)) <= 2048


def test_token_counts():
    lengths = [(3, 2, 5), (1, 4, 1)]
    assert train_step_inputs.real_tokens(lengths) == (3 + 2) + (3 + 5) + (1 + 4) + (1 + 1)
    assert train_step_inputs.padded_tokens(lengths) == 4 * 8
    assert train_step_inputs.packed_tokens(lengths) == 10 + 6


def test_differences():
    ours, theirs = ({name: [1.0, 2.0] for name in train_step.CURVES} for _ in range(2))
    ours["loss"] = [1.0, 2.5]
    ours["grad_norm"] = [1.5, 2.0]
    found = train_step.differences(ours, theirs)
    assert (found["loss"], found["grad_norm (relative)"], found["rewards/margins"]) == (0.5, 0.5, 0.0)
    with pytest.raises(ValueError, match="1 steps to compare with 2"):
        train_step.differences({**ours, "loss": [1.0]}, theirs)


def test_a_curve_that_is_not_a_number_does_not_coincide():
    theirs = {name: [1.0, 2.0] for name in train_step.CURVES}
    found = train_step.differences({**theirs, "loss": [1.0, float("nan")]}, theirs)
    assert found["loss"] == float("inf")


@pytest.mark.parametrize("limit", [0, 1, 3, 8, 37, 200, 512, 1000])
def test_the_largest_batch_is_found_to_an_eighth(limit):
    found = train_step.search(lambda pairs: pairs <= limit, 8, 512)
    assert limit * 7 / 8 - 1 < found <= limit or found == 512 < limit


def test_a_worker_that_dies_says_why(tmp_path):
    arguments = train_step.parse(["--smoke"])
    (tmp_path / "pairs.jsonl").write_text("", encoding="utf-8")  # and no model
    job = train_step.make_job(arguments, "FastDPOTrainer", tmp_path, 1)
    with pytest.raises(train_step.WorkerFailed, match="(?s)FastDPOTrainer: no 'ready'.*Error"):
        train_step.run_together([job], tmp_path)


@pytest.mark.slow
def test_three_trainers_take_turns_and_agree(tmp_path):
    assert train_step.main(["--smoke", "--name", "smoke", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/smoke.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    assert [row["provider"] for row in result["rows"]] == ["trl", "dpo_fast.trl", "FastDPOTrainer"]
    assert all(len(row["steps"][0]) == 3 and row["peak_mib"] > row["imported_mib"] for row in result["rows"])
    assert result["commit"] and result["versions"]["trl"]
    for provider in ("dpo_fast.trl", "FastDPOTrainer"):
        assert all(value < 1e-4 for value in result["differences"][provider].values()), provider
    losses = result["curves"]["trl"]["loss"]
    assert len(losses) == 3 and losses[2] != losses[0]


def test_largest_batches_are_compared_and_other_failures_are_not_mistaken_for_memory(tmp_path, monkeypatch):
    arguments = train_step.parse(["--smoke"])
    limits = {"trl": 5, "dpo_fast.trl": 10, "FastDPOTrainer": 12}
    message = "torch.OutOfMemoryError: CUDA out of memory"

    def run(jobs, folder):
        if jobs[0].pairs_per_step > limits[jobs[0].provider]:
            raise train_step.WorkerFailed(message)
        return {jobs[0].provider: {"steps": [{"wall_s": 9.0}, {"wall_s": 2.0}]}}

    monkeypatch.setattr(train_step, "run_apart", run)
    rows = train_step.largest_batch(arguments, tmp_path, most=64)["rows"]
    assert [row["largest_batch"] for row in rows] == [5, 10, 12]
    assert [row["times_larger"] for row in rows] == [1, 2, 12 / 5]
    assert rows[0]["pairs_per_s"] == 2.5
    message = "ValueError: something else"
    with pytest.raises(train_step.WorkerFailed, match="something else"):
        train_step.largest_batch(arguments, tmp_path, most=64)
