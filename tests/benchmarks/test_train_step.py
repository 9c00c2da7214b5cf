"""benchmarks.train_step: its inputs, its sums, and one tiny run of all trainers."""

import importlib.util
import json
import random
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl.trainer")

from benchmarks.train_step import inputs, profile, worker
from benchmarks.train_step import run as train_step


def test_pairs_have_the_lengths_of_their_mix():
    rng = random.Random(0)
    prompts, chosen, rejected = zip(*(inputs.MIXES["chat"].lengths(rng, 2048) for _ in range(2000)), strict=True)
    for values, median in ((prompts, 150), (chosen, 200), (rejected, 200)):
        assert sorted(values)[1000] == pytest.approx(median, rel=0.1)
        assert max(values) > 4 * median
    assert max(p + max(c, r) for p, c, r in zip(prompts, chosen, rejected, strict=True)) <= 2048


def test_token_counts():
    lengths = [(3, 2, 5), (1, 4, 1)]
    assert inputs.real_tokens(lengths) == (3 + 2) + (3 + 5) + (1 + 4) + (1 + 1)
    assert inputs.padded_tokens(lengths) == 4 * 8
    assert inputs.packed_tokens(lengths) == 10 + 6


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


def test_the_second_row_of_trl_scores_completion_tokens_only(monkeypatch):
    """As the first row does where Triton runs; the switch does not reach TRL's kernels."""
    from tiny import tiny_model

    chunked_logprob = pytest.importorskip("trl.kernels.chunked_logprob")
    from trl.trainer import utils

    if reason := worker.reason_against("trl-compact"):
        pytest.skip(reason)
    rows, original = [], utils._ChunkedLogProbFunction
    head = SimpleNamespace(apply=lambda hidden, *rest: (rows.append(len(hidden)), original.apply(hidden, *rest))[1])
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", head)
    monkeypatch.setattr(utils, "_use_triton", utils._use_triton)  # puts it back afterwards
    model = tiny_model("llama")
    utils.add_fused_lm_head(model)
    ids = torch.arange(1, 21).view(2, 10)
    labels = ids.clone()
    labels[:, :7] = -100
    plain = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    worker.score_completions_only()
    compact = model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    assert rows == [2 * 9, 2 * 3]
    torch.testing.assert_close(compact, plain)
    assert not chunked_logprob._use_triton(torch.device("cpu"))


def test_providers_that_cannot_run_are_left_out_with_a_reason(monkeypatch, capsys):
    pytest.importorskip("datasets")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else find(name))
    assert train_step.parse([]).providers == ["FastDPOTrainer"]
    assert "trl-compact: left out, trl not installed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        train_step.parse(["--providers", "trl"])
    assert stopped.value.code == 2 and "trl: left out, trl not installed" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train_step.main(["--no-save"]) == 0
    assert "nothing was measured: no trainer can run here" in capsys.readouterr().out


def test_factors_are_medians_over_steps_on_the_same_batches():
    def found(*seconds):
        steps = [{"wall_s": s, "processor_s": s} for s in (99.0, *seconds)]
        ready = {"imported_mib": 1, "setup": {"wall_s": 1}}
        return {"steps": steps, "done": {"peak_process_mib": 10 * seconds[0]}, "ready": ready}

    seconds = {"trl": (8.0, 16.0, 9.0), "trl-compact": (4.0, 8.0, 3.0), "FastDPOTrainer": (2.0, 2.0, 3.0)}
    rounds = [{provider: found(*each) for provider, each in seconds.items()}]
    lengths = [[(1, 1, 1)]] * 3
    trl, compact, ours = train_step.summarize(rounds, lengths, slice(1, None))
    assert (ours["times_faster"], ours["times_faster_min"], ours["times_faster_max"]) == (4.0, 3.0, 8.0)
    assert (ours["times_faster_compact"], ours["times_faster_compact_max"]) == (2.0, 4.0)
    assert (ours["peak_ratio"], ours["peak_ratio_compact"], compact["times_faster"]) == (0.25, 0.5, 2.0)


def test_on_a_gpu_one_provider_at_a_time_is_kept_and_one_that_fails_does_not_end_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step, "write_inputs", lambda *_: {"pairs": 4, "lengths": [(3, 2, 2)] * 4})
    arguments = train_step.parse(["--smoke"])
    arguments.steps, arguments.warmup, arguments.providers = 1, 1, ["trl", "dpo_fast.trl", "FastDPOTrainer"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def run(jobs, folder):
        (job,) = jobs
        if job.provider == "dpo_fast.trl":
            raise train_step.WorkerFailed("dpo_fast.trl: no 'step', it ended")
        log = dict.fromkeys(train_step.CURVES, 1.0)
        done = {"logs": [log, log], "peak_process_mib": 1.0, "peak_device_mib": 2.0}
        ready = {"imported_mib": 1.0, "setup": {"wall_s": 1.0}}
        return {job.provider: {"ready": ready, "steps": [{"wall_s": 1.0, "processor_s": 1.0}] * 2, "done": done}}

    monkeypatch.setattr(train_step, "run_together", run)
    kept = []
    result = train_step.bench(arguments, tmp_path, lambda result: kept.append([r["provider"] for r in result["rows"]]))
    assert kept == [["trl"], ["trl", "FastDPOTrainer"]] and result["failed"] == ["dpo_fast.trl"]
    assert result["rows"][1]["times_faster"] == 1.0 and result["rows"][1]["peak_mib"] == 2.0
    assert "dpo_fast.trl: no speed, dpo_fast.trl: no 'step'" in capsys.readouterr().out


def test_on_a_gpu_that_holds_them_all_they_run_together(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_step, "write_inputs", lambda *_: {"pairs": 4, "lengths": [(3, 2, 2)] * 4})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    arguments = train_step.parse(["--smoke", "--together", "--providers", "trl", "FastDPOTrainer"])
    groups = []

    def run(jobs, folder):
        groups.append([job.provider for job in jobs])
        raise train_step.WorkerFailed("trl: no 'ready', out of memory")

    monkeypatch.setattr(train_step, "run_together", run)
    result = train_step.bench(arguments, tmp_path)
    assert groups == [["trl", "FastDPOTrainer"]] and result["failed"] == groups[0] and result["rows"] == []
    assert "trl, FastDPOTrainer: no speed, trl: no 'ready', out of memory" in capsys.readouterr().out


def test_factors_are_compared_with_ours():
    arguments = train_step.parse(["--factors"])
    assert arguments.providers == ["FastDPOTrainer", *worker.FACTORS]
    assert train_step.baseline_of(arguments.providers) == "FastDPOTrainer"
    assert train_step.baseline_of(worker.PROVIDERS) == "trl"
    assert train_step.result_name(arguments).endswith("-factors")


def test_without_sharing_each_sequence_has_its_prompt_and_the_same_is_scored():
    from dpo_fast.layout import shared_prefix_batch
    from dpo_fast.training.data import Truncation

    rows = [
        {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9], "rejected_ids": [10, 11, 12]},
        {"prompt_ids": [4], "chosen_ids": [3, 4, 5], "rejected_ids": [6]},
    ]
    batch = worker.unshared(Truncation(), rows)
    assert batch.input_ids[0].tolist() == [5, 6, 7, 8, 9, 5, 6, 7, 10, 11, 12, 4, 3, 4, 5, 4, 6]
    shared = shared_prefix_batch([Truncation()(row) for row in rows])
    for name in ("targets", "sequence_ids", "lengths"):
        assert torch.equal(batch[name], shared[name]), name
    assert shared.layout.length == batch.layout.length - 3 - 1


def test_shares_of_a_profile():
    kernels = [
        (2.0, ("nvjet_tst", "aten::mm", "PairwiseLossFunction")),
        (1.0, ("triton_poi", "dpo_fast::linear_token_logps_fwd")),
        (1.0, ("cutlass", "aten::mm", "ChunkedLogProbFunctionBackward", "autograd::engine::evaluate_function")),
        (1.0, ("flash_fwd_kernel", "aten::_flash_attention_forward")),
        (3.0, ("nvjet_tst", "aten::mm", "aten::linear")),
        (2.0, ("multi_tensor_apply", "aten::_fused_adamw_", "Optimizer.step#AdamW.step")),
    ]
    found = profile.shares(kernels, busy=8.0, whole=10.0)
    expected = {"optimizer": 0.16, "head": 0.32, "attention": 0.08, "rest": 0.24, "idle": 0.2}
    assert found == pytest.approx(expected)
    assert profile.covered([(0, 4), (1, 2), (3, 6), (8, 9)]) == 7


def test_a_profile_sees_what_runs():
    query = torch.randn(1, 4, 256, 64)
    looked = profile.Profile()
    start = time.perf_counter()
    for _ in range(3):
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    found = looked.shares(time.perf_counter() - start)
    assert found["attention"] > 0 and found["head"] == found["optimizer"] == 0
    assert sum(found.values()) == pytest.approx(1.0)


@pytest.mark.slow
def test_all_trainers_take_turns_and_agree(tmp_path):
    words = ["--smoke", "--profile", "1", "--allow-dirty", "--name", "smoke"]
    assert train_step.main([*words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/smoke.json")
    result = json.loads(path.read_text(encoding="utf-8"))
    providers = train_step.parse([]).providers
    assert [row["provider"] for row in result["rows"]] == providers and len(providers) >= 3
    assert all(len(row["steps"][0]) == 4 and row["peak_mib"] > row["imported_mib"] for row in result["rows"])
    assert all(row["shares"]["rest"] > 0 for row in result["rows"])
    assert result["versions"]["trl"] and result["complete"]
    for provider in providers[1:]:
        assert all(value < 1e-4 for value in result["differences"][provider].values()), provider
    losses = result["curves"]["trl"]["loss"]
    assert len(losses) == 4 and losses[2] != losses[0]


def test_largest_batches_are_compared_and_other_failures_are_not_mistaken_for_memory(tmp_path, monkeypatch):
    arguments = train_step.parse(["--smoke"])
    arguments.providers = list(worker.PROVIDERS)
    limits = {"trl": 5, "trl-compact": 5, "dpo_fast.trl": 10, "FastDPOTrainer": 12}
    message = "torch.OutOfMemoryError: CUDA out of memory"

    def run(jobs, folder):
        if jobs[0].pairs_per_step > limits[jobs[0].provider]:
            raise train_step.WorkerFailed(message)
        return {jobs[0].provider: {"steps": [{"wall_s": 9.0}, {"wall_s": 2.0}]}}

    monkeypatch.setattr(train_step, "run_together", run)
    rows = train_step.largest_batch(arguments, tmp_path, most=64)["rows"]
    assert [row["largest_batch"] for row in rows] == [5, 5, 10, 12]
    assert [row["times_larger"] for row in rows] == [1, 1, 2, 12 / 5]
    assert rows[0]["pairs_per_s"] == 2.5
    message = "ValueError: something else"
    with pytest.raises(train_step.WorkerFailed, match="something else"):
        train_step.largest_batch(arguments, tmp_path, most=64)
