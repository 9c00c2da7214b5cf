"""Partial softmaxes: made elsewhere and combined, they are one."""

import pytest
import torch

from dpo_fast import linear_preference_loss, linear_token_logps, logits_token_logps
from dpo_fast.ops import impl_torch, softmax, tile
from dpo_fast.ops.call import Call, Head
from dpo_fast.ops.dispatch import implementation
from dpo_fast.ops.oracle import oracle_token_stats
from dpo_fast.ops.softmax import Partial, Transform
from dpo_fast.ops.stats import STATS

N, V = 12, 90


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels in each third of the columns; a row of -inf, thirds of -inf, ties of the largest within and across."""
    torch.manual_seed(0)
    x, label = torch.randn(N, V) * 4, torch.arange(N) * V // N
    x[0] = -torch.inf
    x[1, :30], x[2, 30:60] = -torch.inf, -torch.inf
    x[3, [5, 40, 80]] = 50.0
    x[4, [31, 32]] = 50.0
    label[3], label[4] = 40, 31
    x[5, label[5]] = 50.0
    return x, label.unsqueeze(1)


def folded(x, label, first: int, transform: Transform) -> Partial:
    partial = Partial(STATS)
    partial.fold_(x.clone(), label, first, transform)
    return partial


@pytest.mark.parametrize("transform", [Transform(), Transform(0.7, 5.0, 1.3)], ids=["plain", "soft-cap"])
@pytest.mark.parametrize("ends", [(30, 60), (1, 89), (45, 45 + 1)])
def test_slices_combined_are_one_softmax(transform, ends):
    x, label = rows()
    a, b = ends
    parts = [folded(x[:, start:stop], label, start, transform) for start, stop in ((0, a), (a, b), (b, V))]
    for part in parts[1:]:
        parts[0].combine(part)
    found, whole = parts[0].results(V, transform), folded(x, label, 0, transform).results(V, transform)
    scale, softcap, temperature = transform
    true = oracle_token_stats(x, label[:, 0], logit_softcap=softcap, temperature=temperature, logit_scale=scale)
    for name in ("logps", "row_max", "log_sum", "entropy", "mean_logits", "log_sum_sq_probs"):
        torch.testing.assert_close(found[name], whole[name], rtol=2e-6, atol=2e-6, equal_nan=True, msg=name)
    assert torch.equal(found["is_top1"], whole["is_top1"])
    assert torch.equal(found["is_top1"][1:] != 0, true.is_top1[1:])  # of no logit but -inf the first is the largest
    torch.testing.assert_close(found["logps"][1:].double(), true.logps[1:], rtol=2e-6, atol=2e-6)
    assert found["logps"][0] == -torch.inf or softcap is not None


def test_rescaling_moves_every_sum_to_the_larger_maximum():
    x, label = rows()
    partial, more = folded(x, label, 0, Transform()), folded(x, label, 0, Transform())
    more.rescale(more.row_max + 3)
    before, after = partial.results(V, Transform()), more.results(V, Transform())
    for name in ("logps", "entropy", "mean_logits", "log_sum_sq_probs"):
        torch.testing.assert_close(after[name][1:], before[name][1:], rtol=2e-6, atol=2e-5, msg=name)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opened_slices_are_the_derivative(impl, softcap):
    """Of columns some at a time: of all labels but one slice's own, the one-hot term lies elsewhere."""
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(6, 5), torch.randn(V, 5), torch.tensor([0, 33, 34, 67, 68, 89])
    transform = Transform(0.7, softcap, 1.3)
    head = Head.make("test", hidden, weight, None, None, labels)
    call = Call.of_head("test", head, (), transform, -100, None, impl)
    x = (hidden.double() @ weight.double().T).requires_grad_()
    stats = oracle_token_stats(x, labels, logit_softcap=softcap, temperature=1.3, logit_scale=0.7)
    c = torch.randn(6, 1)
    (true,) = torch.autograd.grad((stats.logps * c[:, 0]).sum(), x)
    opened = implementation(impl).Tile(call, head, labels, 6, 34)
    opened.take(slice(None))
    found = {name: torch.empty(6) for name in ("logps", "row_max", "log_sum")}
    implementation(impl).Tile(call, head, labels, 6, V).fold(slice(None), found)
    known = tile.Known(found["row_max"], found["log_sum"])
    for part in (slice(0, 34), slice(34, 68), slice(68, V)):
        d = opened.open(part, known, c)
        torch.testing.assert_close(d.double(), true[:, part], rtol=1e-5, atol=1e-6)


PASSES = {
    "level 1": lambda h, w, y: logits_token_logps(h @ w.T, y, impl="triton").sum(),
    "frozen": lambda h, w, y: linear_token_logps(h, w.detach(), y, impl="triton").sum(),
    "recompute": lambda h, w, y: linear_token_logps(h, w, y, impl="triton").sum(),
    "pairwise": lambda h, w, y: (
        linear_preference_loss(h, w, y, torch.arange(8) % 4, 2, loss="simpo", impl="triton").loss
    ),
    "couples pairs": lambda h, w, y: (
        linear_preference_loss(
            h, w, y, torch.arange(8) % 4, 2, loss="aot", reference_logps=torch.zeros(4), impl="triton"
        ).loss
    ),
}


@pytest.mark.parametrize("which", PASSES)
def test_an_explicit_implementation_runs_in_every_pass(which, monkeypatch):
    """Backwards included: none of the eager passes is left in, and the kernels run in both directions."""
    import dpo_fast.kernels.token_logps as kernels

    def never(*_, **__):
        raise AssertionError("an eager pass ran under impl='triton'")

    for module in (softmax, tile, impl_torch):
        monkeypatch.setattr(module, "Partial", never)
        monkeypatch.setattr(module, "d_columns_", never)
    ran = []
    for name in ("token_logps_fwd", "token_logps_bwd"):
        launch = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, _n=name, _l=launch, **k: (ran.append(_n), _l(*a, **k))[1])
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    PASSES[which](hidden, weight, torch.arange(8)).backward()
    assert ran == ["token_logps_fwd", "token_logps_bwd"]
