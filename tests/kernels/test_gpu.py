"""On a GPU: kernels and ops against fp64 at real sizes. `pytest -m gpu`."""

import copy
import importlib

import head_oracle
import pytest
import torch
from tiny import QUIET, tiny_model, tiny_pairs, tiny_rows, tiny_tokenizer

import dpo_fast
from dpo_fast import attach, linear_preference_loss, linear_token_logps, logits_token_logps, sequence_logps
from dpo_fast.forward import reasons_against_packed_rows
from dpo_fast.layout import shared_prefix_batch
from dpo_fast.ops import dispatch
from dpo_fast.ops import plan as plans
from dpo_fast.ops.gemm import aligned, mm_into
from dpo_fast.testing import (
    EPS,
    assert_within_bound,
    assert_within_budget,
    fp32_linear,
    head_bounds,
    make_logits,
    token_bounds,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def oracle_logps(logits, labels, rows=256):
    """fp64, a few rows at a time."""
    parts = []
    for start in range(0, len(labels), rows):
        log_p = logits[start : start + rows].double().log_softmax(-1)
        y = labels[start : start + rows]
        parts.append(log_p.gather(1, y.clamp(min=0)[:, None])[:, 0].masked_fill(y == -100, 0))
    return torch.cat(parts)


def eager_logps(logits, labels):
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0].masked_fill(labels == -100, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [32_000, 50_257, 128_256])
def test_level_1(dtype, V):
    logits, labels = make_logits(512, V, dtype=dtype, device="cuda")
    results = []
    for function, x in (
        (logits_token_logps, logits),
        (eager_logps, logits),
        (oracle_logps, logits.double()),
    ):
        leaf = x.clone().requires_grad_()
        logps = function(leaf, labels)
        results.append((logps.detach(), torch.autograd.grad(logps.sum(), leaf)[0]))
    (ours, d), (eager, d_eager), (true, d_true) = results
    assert_within_budget(ours, eager, true, what="logps")
    assert_within_budget(d, d_eager, d_true, what="d_logits")
    bounds = token_bounds(logits, labels)
    assert_within_bound(ours, true, bounds["logps"], what="logps")
    assert_within_bound(d, d_true, bounds["direction"], what="d_logits")


def test_70_001_rows():
    logits, labels = make_logits(70_001, 130, device="cuda")
    assert_within_budget(logits_token_logps(logits, labels), eager_logps(logits, labels), oracle_logps(logits, labels))


def test_more_than_2_31_elements():
    """Row offsets of 64 bits, forward and backward, the gradient written over the logits."""
    rows, V = 17_000, 131_072
    if torch.cuda.mem_get_info()[0] < 3 * rows * V * 2:
        pytest.skip("needs 13 GiB of free memory")
    logits = torch.empty(rows, V, dtype=torch.bfloat16, device="cuda").normal_()
    labels = torch.randint(V, (rows,), device="cuda")
    last = slice(rows - 64, rows)
    kept, expected = logits[last].clone(), oracle_logps(logits[last], labels[last])
    logits.requires_grad_()
    logps = logits_token_logps(logits * 1, labels, inplace_backward=True)
    bounds = token_bounds(kept, labels[last])
    assert_within_bound(logps[last], expected, bounds["logps"], what="logps")
    (d,) = torch.autograd.grad(logps.sum(), logits)
    p = kept.double().softmax(-1)
    true = -p.scatter_add(1, labels[last, None], torch.full((64, 1), -1.0, dtype=torch.float64, device="cuda"))
    assert_within_bound(d[last], true, bounds["direction"], what="d_logits")


def test_sequence_sums_are_exact_and_reproducible():
    values = -torch.rand(100_000, device="cuda") * 4
    ids = torch.randint(64, (100_000,), device="cuda")
    sums = [sequence_logps(values, ids, 64) for _ in range(2)]
    exact = torch.zeros(64, dtype=torch.float64).index_add_(0, ids.cpu(), values.double().cpu())
    assert torch.equal(*sums) and torch.equal(sums[0].cpu(), exact.float())


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needs", [(), ("hidden",), ("hidden", "weight")], ids=["score", "frozen", "recompute"])
def test_level_2(dtype, needs, impl):
    N, H, V = 700, 1024, 50_257
    torch.manual_seed(0)
    inputs = {"hidden": torch.randn(N, H, device="cuda"), "weight": torch.randn(V, H, device="cuda") / 16}
    inputs = {k: v.to(dtype) for k, v in inputs.items()}
    labels = torch.randint(V, (N,), device="cuda")
    labels[::9] = -100
    g = torch.randn(N, device="cuda")
    results = []
    for kind in ("ours", "eager", "oracle"):
        leaves = {k: (v.double() if kind == "oracle" else v).clone() for k, v in inputs.items()}
        for name in needs:
            leaves[name].requires_grad_()
        if kind == "ours":
            logps = linear_token_logps(leaves["hidden"], leaves["weight"], labels, tile_mib=64, impl=impl)
        else:  # values against logits in fp32; gradients, whose GEMMs take a D of the model's dtype, against its own
            logits = leaves["hidden"] @ leaves["weight"].T if needs else fp32_linear(leaves["hidden"], leaves["weight"])
            logps = (oracle_logps if kind == "oracle" else eager_logps)(logits, labels)
        grads = torch.autograd.grad((logps * g).sum(), [leaves[k] for k in needs]) if needs else ()
        results.append((logps.detach(), *grads))
    for name, ours, eager, true in zip(("logps", *needs), *results, strict=True):
        assert_within_budget(ours, eager, true, what=name)
    bounds = head_bounds(**inputs, labels=labels, coefficient=g, operands=dtype)
    for name, ours, true in zip(("logps", *needs), results[0], results[2], strict=True):
        assert_within_bound(ours, true, bounds[name], what=name)


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("tile_mib", [16, 256], ids=["pending", "pairwise"])
def test_level_3(tile_mib, impl, monkeypatch):
    monkeypatch.setattr(plans, "pending_pays", lambda *_: True)
    length, pairs, H, V = 80, 4, 512, 32_000
    torch.manual_seed(0)
    hidden = torch.randn(2 * pairs * length, H, device="cuda").bfloat16()
    weight = (torch.randn(V, H, device="cuda") / 16).bfloat16()
    labels = torch.randint(V, (len(hidden),), device="cuda")
    ids = torch.arange(len(hidden), device="cuda") % (2 * pairs)
    reference = torch.zeros(2 * pairs, device="cuda")
    results = []
    for kind in (impl, "reference"):
        h, w = (x.double() if kind == "reference" else x for x in (hidden, weight))
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        out = linear_preference_loss(h, w, labels, ids, pairs, reference_logps=reference, impl=kind, tile_mib=tile_mib)
        results.append((out, *torch.autograd.grad(out.loss, (h, w))))
    (ours, dh, dw), (true, dh_true, dw_true) = results
    assert ours.plan.name == ("pending" if tile_mib == 16 else "pairwise")
    assert_within_budget(ours.stats.logps, eager_logps(fp32_linear(hidden, weight), labels), true.stats.logps)
    # The slope of a pair's loss is at most beta, its second derivative at most beta^2 / 4; the mean is over P pairs
    tokens = head_bounds(hidden, weight, labels)["logps"]
    d_margin = torch.zeros(pairs, dtype=torch.float64, device="cuda").index_add(0, ids % pairs, tokens)
    knobs = dict(
        coefficient=0.1 / pairs, d_coefficient=(0.1**2 / 4 / pairs * d_margin)[ids % pairs], operands=torch.bfloat16
    )
    bounds = head_bounds(hidden, weight, labels, **knobs)
    assert_within_bound(ours.loss.detach(), true.loss.detach(), 0.1 * d_margin.mean() + 32 * EPS)
    assert_within_bound(dh, dh_true, bounds["hidden"], what="d_hidden")
    assert_within_bound(dw, dw_true, bounds["weight"], what="d_weight")


@pytest.mark.parametrize("transform", head_oracle.TRANSFORMS)
@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", head_oracle.PLANS)
def test_every_plan_to_its_bounds(plan, dtype, impl, transform, monkeypatch):
    """What test_emulated_cuda.py executes on CPU, hidden states of ignored tokens that are NaN included."""
    rows = 8 if plan in ("pending", "recompute") else 12
    monkeypatch.setattr(plans, "TILE_ROWS", (rows,))
    monkeypatch.setattr(plans, "pending_pays", lambda *_: plan == "pending")
    p, needs, knobs = head_oracle.make(dtype), head_oracle.PLANS[plan], head_oracle.TRANSFORMS[transform]
    oracle = head_oracle.Oracle(p, head_oracle.dpo(p), **knobs)
    leaves = head_oracle.leaves_of(p, needs, "cuda")
    out = head_oracle.preference(p, leaves, impl=impl, **knobs)
    if needs:
        out.loss.backward()
    assert out.plan.name == plan
    assert (out.stats.logps.double().cpu() - oracle.logps).abs().max() <= 4 * oracle.logit_error
    head_oracle.check(leaves, oracle, needs, dtype)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_fp16_with_a_gradient_scaler(impl):
    p, needs = head_oracle.far_ahead(), head_oracle.PLANS["pairwise"]
    oracle, leaves = head_oracle.Oracle(p, head_oracle.dpo(p)), head_oracle.leaves_of(p, needs, "cuda")
    scaler = torch.amp.GradScaler("cuda")
    scaler.scale(head_oracle.preference(p, leaves, impl=impl).loss).backward()
    head_oracle.check(leaves, oracle, needs, torch.float16, scaler.get_scale())


def test_how_torch_multiplies_16_bits_into_32():
    """It does on NVIDIA; on torch 2.8 and 2.9 it does not add such products."""
    for dtype in (torch.bfloat16, torch.float16):
        assert dispatch.fp32_products(torch.device("cuda"), dtype)[0] or torch.version.hip


def test_a_tile_with_aligned_rows_is_filled_in_place():
    """An odd vocabulary: the GEMM writes rows that are farther apart than they are long, without a copy."""
    a, b = (torch.randn(rows, 256, device="cuda").bfloat16() for rows in (512, 50_257))
    tile = aligned(512, 50_257, torch.float32, a.device)
    tile.fill_(torch.nan)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mm_into(tile, a, b.T)
    assert torch.cuda.max_memory_allocated() - before < tile.numel()  # a copy would be four times that
    assert (tile.double() - a.double() @ b.double().T).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ligers_layers_with_our_head(dtype):
    """Its norm, MLP and rotary kernels in the packed row; as far from the model's own layers in fp64 as those are."""
    liger = pytest.importorskip("liger_kernel.transformers")
    plain = tiny_model(num_hidden_layers=2, hidden_size=256, intermediate_size=512).cuda()
    models = [copy.deepcopy(plain).to(d) for d in (dtype, dtype, torch.float64)]
    liger._apply_liger_kernel_to_instance(model=models[0], fused_linear_cross_entropy=False)
    batch = shared_prefix_batch(tiny_pairs(300, longest=40)).to("cuda")
    found = []
    for model in models:
        attach(model)
        assert reasons_against_packed_rows(model) == []
        logps = model(batch).logps
        found.append((logps.detach(), torch.autograd.grad(logps.sum(), model.model.layers[0].mlp.up_proj.weight)[0]))
    (ours, d), (eager, d_eager), (true, d_true) = found
    # Twice eager's error: theirs are kernels of their own, which round in other places
    assert (ours - true).double().square().mean() <= 4 * (eager - true).double().square().mean()
    assert (d - d_true).double().square().mean() <= 4 * (d_eager - d_true).double().square().mean()


@pytest.mark.parametrize("trainer_class", ["FastDPOTrainer", "DPOTrainer"])
def test_use_liger_kernel(trainer_class, tmp_path):
    """In both trainers: the curve of a training without it."""
    pytest.importorskip("liger_kernel.transformers")
    datasets, losses = pytest.importorskip("datasets"), []
    if trainer_class == "DPOTrainer":
        config = pytest.importorskip("trl").DPOConfig
        trainer_class = importlib.import_module("dpo_fast.trl").DPOTrainer
    else:
        config, trainer_class = dpo_fast.FastDPOConfig, dpo_fast.FastDPOTrainer
    for liger in (False, True):
        settings = {**QUIET, "use_cpu": False, "bf16": False, "tf32": False, "max_steps": 4, "learning_rate": 1e-3}
        args = config(output_dir=str(tmp_path), use_liger_kernel=liger, **settings)
        data = datasets.Dataset.from_list(tiny_rows(16))
        models = tiny_model(), tiny_model()
        trainer = trainer_class(*models, args=args, train_dataset=data, processing_class=tiny_tokenizer())
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and losses[0][-1] < losses[0][0]
