"""The forward-only fused head against the fp64 oracle: what it returns, what it must not touch, that it repeats itself.

bf16 runs on a GPU only: the interpreter's `tl.dot` is wrong for bf16 operands.
"""

import pytest
import torch

from dpo_fast.kernels.numerics import Knobs
from dpo_fast.ops.oracle import oracle_token_stats
from dpo_fast.ops.stats import STATS
from dpo_fast.testing import (
    assert_within_bound,
    assert_within_budget,
    errors,
    fp32_linear,
    head_bounds,
    make_generator,
    rms,
)

triton = pytest.importorskip("triton")
from dpo_fast.kernels import linear_score  # noqa: E402
from dpo_fast.kernels.linear_score import linear_score_config, linear_score_fwd, split_vocabulary  # noqa: E402
from dpo_fast.kernels.tuned import RELATIVES  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRANSFORMS = [
    {},
    {"logit_softcap": 5.0},
    {"logit_scale": 0.25, "temperature": 0.7},
    {"logit_softcap": 30.0, "logit_scale": 2.0, "temperature": 1.3},
]
# A tile so small that few columns make many tiles and several runs of two
SMALL = dict(BLOCK_N=16, BLOCK_V=16, BLOCK_H=16, FOLD_V=8, num_warps=4, num_stages=2)


def make_head(rows, width, vocab, *, dtype=torch.float32, bias=False, ignored=0.2, seed=0, device=DEVICE):
    """hidden, weight of logits with standard deviation 3, labels, bias or None."""
    generator = make_generator(seed)
    hidden = torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocab, width, generator=generator) * 3 / width**0.5
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    b = torch.randn(vocab, generator=generator).to(device, dtype) if bias else None
    return hidden.to(device, dtype), weight.to(device, dtype), labels.to(device), b


def score(hidden, weight, labels, bias=None, outputs=STATS, config=None, allow_tf32=False, **transform):
    names = ("logps", "row_max", "log_sum", *outputs)
    out = {name: torch.full(labels.shape, torch.nan, device=labels.device) for name in names}
    knobs = Knobs(
        logit_scale=transform.get("logit_scale", 1.0),
        softcap=transform.get("logit_softcap"),
        temperature=transform.get("temperature", 1.0),
    )
    linear_score_fwd(hidden, weight, labels, bias, out, knobs, config=config, allow_tf32=allow_tf32)
    return out


def oracle_of(hidden, weight, labels, bias=None, **transform):
    logits = hidden.double() @ weight.double().T
    return oracle_token_stats(logits if bias is None else logits + bias.double(), labels, **transform)


def eager_of(hidden, weight, labels, bias=None, logit_scale=1.0, logit_softcap=None, temperature=1.0):
    """Plain PyTorch from logits in fp32."""
    z = fp32_linear(hidden, weight, bias) * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    log_p = torch.log_softmax(z / temperature, dim=-1)
    ignored = labels == -100
    found = {
        "logps": log_p.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1),
        "entropy": -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(-1),
        "mean_logits": (z / temperature).mean(-1),
        "log_sum_sq_probs": torch.logsumexp(2 * log_p, -1),
    }
    return {name: value.masked_fill(ignored, 0) for name, value in found.items()}


def check(hidden, weight, labels, bias=None, *, config=None, **transform):
    """Every value within its bound, and for many rows within the budget."""
    found = score(hidden, weight, labels, bias, config=config, **transform)
    oracle = oracle_of(hidden, weight, labels, bias, **transform)
    bounds = head_bounds(hidden, weight, labels, bias=bias, **transform)
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        assert_within_bound(found[name], getattr(oracle, name), bounds[name], what=name)
    if len(labels) >= 400:
        for name, eager in eager_of(hidden, weight, labels, bias, **transform).items():
            assert_within_budget(found[name], eager, getattr(oracle, name), what=name)
    assert torch.equal(found["is_top1"] != 0, oracle.is_top1)
    for name in ("logps", "row_max", "log_sum", *STATS):
        assert (found[name][labels == -100] == 0).all(), name
    return found


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 5), (3, 16, 127), (17, 40, 301)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_values_and_statistics_are_within_their_bounds(dtype, shape, transform, bias):
    check(*make_head(*shape, dtype=dtype, bias=bias, ignored=0.0 if shape[0] == 1 else 0.2), **transform)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_and_statistics_are_within_the_budget(dtype, transform):
    """For fp16 inputs, too, against logits in fp32: the accumulator is never rounded."""
    check(*make_head(500, 16, 127, dtype=dtype, bias=dtype == torch.float16), **transform)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 16), (5, 20, 2101)], ids=str)
def test_many_tiles_and_runs(shape):
    splits, columns = split_vocabulary(shape[2], SMALL["FOLD_V"])
    assert (splits, columns) == ((66, 32) if shape[2] == 2101 else (1, 16))
    check(*make_head(*shape, bias=True, ignored=0.0), config=SMALL)
    check(*make_head(*shape, ignored=0.3, seed=1), config={**SMALL, "FOLD_V": 16}, logit_softcap=4.0)


@pytest.mark.parametrize("V", [1, 16, 17, 2048, 2049, 50_257, 131_072, 256_000])
@pytest.mark.parametrize("fold", [8, 32, 64, 128])
def test_runs_cover_the_vocabulary(V, fold):
    splits, columns = split_vocabulary(V, fold)
    assert 1 <= splits <= linear_score.MAX_SPLITS and columns % (2 * fold) == 0
    assert (splits - 1) * columns < V <= splits * columns


def test_a_row_does_not_depend_on_its_neighbours_nor_on_the_order_of_programs(monkeypatch):
    hidden, weight, labels, _ = make_head(37, 24, 301, ignored=0.0)
    together = score(hidden, weight, labels, config=SMALL)
    for again in (score(hidden, weight, labels, config=SMALL), score(hidden[16:], weight, labels[16:], config=SMALL)):
        for name, value in again.items():
            assert torch.equal(value, together[name][-len(value) :]), name
    monkeypatch.setattr(linear_score, "GROUP_BYTES", 2 * 16 * 24 * 4)  # two blocks of rows per group, then one
    for name, value in score(hidden, weight, labels, config=SMALL).items():
        assert torch.equal(value, together[name]), name


def test_each_statistic_alone_equals_all_together():
    inputs = make_head(5, 24, 301)
    together = score(*inputs)
    for outputs in ((), *((name,) for name in STATS)):
        for name, value in score(*inputs, outputs=outputs).items():
            assert torch.equal(value, together[name]), (outputs, name)


def test_labels_out_of_range_give_nan_and_harm_nobody():
    hidden, weight, _, _ = make_head(5, 16, 20)
    labels = torch.tensor([3, 20, -1, 2**40, -100], device=DEVICE)
    below_zero = torch.full((20,), -50.0, device=DEVICE)  # a target that was never found must not look like the best
    found = score(hidden, weight, labels, below_zero)
    assert found["logps"].isnan().tolist() == [False, True, True, True, False]
    assert found["is_top1"].tolist()[1:] == [0, 0, 0, 0]
    narrow = score(hidden, weight, labels.clamp(max=2**31 - 1).int(), below_zero)
    assert torch.equal(narrow["logps"].nan_to_num(7.0), found["logps"].nan_to_num(7.0))
    torch.testing.assert_close(found["logps"][:1], oracle_of(hidden[:1], weight, labels[:1]).logps.float())


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning:triton.*")
def test_ignored_rows_may_hold_anything():
    hidden, weight, labels, _ = make_head(40, 16, 50, ignored=0.0)
    labels[3], labels[16:33] = -100, -100  # one among others, and a whole block
    expected = score(hidden, weight, labels, config=SMALL)
    hidden[labels == -100] = torch.nan
    for name, value in score(hidden, weight, labels, config=SMALL).items():
        assert torch.equal(value, expected[name]), name
        assert (value[labels == -100] == 0).all() and torch.isfinite(value).all()


def test_infinite_logits():
    """-inf columns, as a bias makes them for padded vocabularies, and rows of nothing else."""
    hidden, weight, labels, _ = make_head(4, 16, 70, ignored=0.0)
    labels[:] = torch.tensor([0, 5, 60, 69])
    bias = torch.zeros(70, device=DEVICE)
    bias[40:] = -torch.inf
    found = score(hidden, weight, labels, bias, config=SMALL)
    oracle = oracle_of(hidden, weight[:40], labels.clamp(max=39))
    assert found["logps"][2:].tolist() == [-torch.inf, -torch.inf]
    torch.testing.assert_close(found["logps"][:2], oracle.logps[:2].float())
    torch.testing.assert_close(found["entropy"], oracle.entropy.float())
    nothing = score(hidden, weight, labels, torch.full_like(bias, -torch.inf), config=SMALL)
    assert nothing["logps"].tolist() == [-torch.inf] * 4 and nothing["is_top1"].tolist() == [0.0] * 4


def test_padding_columns_do_not_count():
    """Columns past the end repeat the last one, and a soft-cap makes -cap of a -inf: neither may enter the sum."""
    hidden, weight = torch.zeros(1, 8, device=DEVICE), torch.zeros(5, 8, device=DEVICE)
    found = score(hidden, weight, torch.tensor([4], device=DEVICE), logit_softcap=1.0)
    torch.testing.assert_close(found["logps"], -torch.log(torch.tensor([5.0], device=DEVICE)))
    torch.testing.assert_close(found["mean_logits"], torch.zeros(1, device=DEVICE))


def test_top1_of_a_tie_is_the_first():
    hidden, weight = torch.ones(3, 8, device=DEVICE), torch.zeros(40, 8, device=DEVICE)
    weight[[7, 21]] = 1.0  # in different tiles and runs
    found = score(hidden, weight, torch.tensor([7, 21, 3], device=DEVICE), config=SMALL)
    assert found["is_top1"].tolist() == [1.0, 0.0, 0.0]


def test_row_strides_and_poisoned_neighbours():
    hidden, weight, labels, bias = make_head(9, 24, 61, bias=True)
    expected = score(hidden, weight, labels, bias)
    wide_hidden, wide_weight = (torch.full((2 * len(x), 40), torch.nan, device=DEVICE) for x in (hidden, weight))
    wide_hidden[::2, 8:32], wide_weight[::2, 8:32] = hidden, weight
    for name, value in score(wide_hidden[::2, 8:32], wide_weight[::2, 8:32], labels, bias).items():
        assert torch.equal(value, expected[name]), name


def test_columns_that_are_not_contiguous_are_refused():
    hidden, weight, labels, _ = make_head(4, 16, 20)
    with pytest.raises(AssertionError):
        score(hidden, weight.T.contiguous().T, labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("softcap", [False, True])
@pytest.mark.parametrize("target", [*linear_score.HALF, *RELATIVES, "cuda:75", "hip:gfx1100"])
def test_tiles_with_statistics_fold_the_same_columns(target, softcap, tf32, dtype):
    plain, stats = (
        linear_score_config(target, dtype, softcap=softcap, stats=stats, allow_tf32=tf32) for stats in (False, True)
    )
    assert {k: v for k, v in plain.items() if k != "BLOCK_V"} == {k: v for k, v in stats.items() if k != "BLOCK_V"}
    assert stats["BLOCK_V"] == stats["FOLD_V"] and plain["BLOCK_V"] in (stats["FOLD_V"], 2 * stats["FOLD_V"])


@pytest.mark.gpu
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_real_head(dtype, transform):
    inputs = make_head(1000, 2048, 50_257, dtype=dtype, device="cuda")
    found = check(*inputs, **transform)
    assert all(torch.equal(value, found[name]) for name, value in score(*inputs, **transform).items())


@pytest.mark.gpu
def test_statistics_change_no_bit_of_the_rest():
    inputs = make_head(300, 1024, 32_000, dtype=torch.bfloat16, device="cuda")
    together = score(*inputs)
    for name, value in score(*inputs, outputs=()).items():
        assert torch.equal(value, together[name]), name


@pytest.mark.gpu
def test_tf32_is_taken_only_when_asked_for():
    inputs = make_head(256, 1024, 8192, device="cuda")
    oracle = oracle_of(*inputs).logps
    exact, fast = (score(*inputs, allow_tf32=tf32)["logps"] for tf32 in (False, True))
    assert_within_bound(exact, oracle, head_bounds(*inputs[:3])["logps"])
    # operands of 10 bits instead of 23
    assert rms(errors(fast, oracle)) > 2**8 * rms(errors(exact, oracle)), "the tensor cores were asked for"


@pytest.mark.gpu
def test_a_weight_of_more_than_two_to_the_31_elements():
    rows, width, vocab = 400, 4096, 2**19 + 2**10 + 1
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(rows, width, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(vocab, width, generator=generator, device="cuda", dtype=torch.bfloat16) / 16
    labels = torch.randint(vocab - 2000, vocab, (rows,), generator=generator, device="cuda")
    labels[0] = vocab - 1
    logits = torch.cat([hidden.double() @ part.double().T for part in weight.split(8192)], dim=1)
    oracle = logits.gather(-1, labels[:, None])[:, 0] - logits.logsumexp(-1)
    eager = torch.log_softmax(fp32_linear(hidden, weight), -1).gather(-1, labels[:, None])[:, 0]
    assert_within_budget(score(hidden, weight, labels, outputs=())["logps"], eager, oracle)


@pytest.mark.gpu
def test_seventy_thousand_rows():
    hidden, weight, labels, _ = make_head(70_001, 64, 1000, dtype=torch.bfloat16, device="cuda")
    check(hidden, weight, labels)
