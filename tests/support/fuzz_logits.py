"""Random calls of the ops that take rows of logits, and of sequence sums: see fuzz.py."""

from dataclasses import dataclass

import torch
from fuzz_inputs import (
    AGAIN,
    MODES,
    Input,
    Layout,
    backward,
    call,
    common,
    draw_labels,
    dtypes,
    layouts,
    no_derivative,
    normal,
    raises,
    somewhat,
    spoil,
    weights_of_tokens,
    within,
)
from hypothesis import strategies as st
from torch import Tensor

import dpo_fast
from dpo_fast import TokenStats
from dpo_fast.ops.oracle import oracle_sequence_logps, oracle_token_stats, oracle_transform
from dpo_fast.ops.stats import STATS
from dpo_fast.testing import assert_within_budget, gamma, make_generator, token_bounds


def check_stats(stats: TokenStats, truth: TokenStats, bounds, undecided: Tensor, outputs, ignored: Tensor) -> None:
    """Flat ones; truth: the oracle's; bounds: those of `token_bounds`; undecided: where `is_top1` may be either."""
    for name in ("logps", *outputs):
        value = getattr(stats, name).reshape(-1)
        assert (value[ignored] == 0).all(), f"{name} of ignored tokens"
        if name == "is_top1":
            assert value.dtype == torch.bool and not ((value != truth.is_top1) & ~undecided).any(), name
        else:
            within(value, getattr(truth, name), bounds[name], name)
    for name in set(STATS) - set(outputs):
        assert getattr(stats, name) is None, name


def undecided(z: Tensor, labels: Tensor, bounds_of_labels) -> Tensor:
    """Where the label's and the best other logit, after the transform, are nearer than the errors of both.

    z: (N, V) fp64; bounds_of_labels: labels (N,) -> bounds of their log-probs."""
    if z.shape[1] == 1:
        return torch.zeros(labels.shape, dtype=torch.bool)
    best = z.scatter(1, labels.unsqueeze(1), -torch.inf).max(1)
    gap = (z.gather(1, labels.unsqueeze(1)).squeeze(1) - best.values).abs().nan_to_num(nan=0.0)
    return gap <= bounds_of_labels(labels) + bounds_of_labels(best.indices)


def plain(z: Tensor, labels: Tensor, ignored: Tensor, **transform) -> Tensor:
    """Log-probs (N,) as a user writes them, in the dtype of z."""
    z = z * transform.get("logit_scale", 1.0)
    if (cap := transform["logit_softcap"]) is not None:
        z = cap * torch.tanh(z / cap)
    log_p = torch.log_softmax(z / transform["temperature"], -1)
    return log_p.gather(1, labels.unsqueeze(1)).squeeze(1).masked_fill(ignored, 0)


def many(*tensors: Tensor) -> bool:
    """Whether there are rows enough, which are not all zero, for a verdict by the budget."""
    return all(x.numel() and int((x != 0).view(len(x), -1).any(1).sum()) >= 256 for x in tensors)


def scored(stats: TokenStats, ignored: Tensor) -> TokenStats:
    return TokenStats(*(getattr(stats, name).masked_fill(ignored, 0) for name in ("logps", *STATS)))


@dataclass(frozen=True)
class Logits:
    """logits_token_logps where `outputs` is None, else logits_token_stats."""

    seed: int
    rows: tuple[int, ...]
    vocab: int
    dtype: str
    std: float
    forbidden: float  # share of columns that are -inf
    layout: Layout
    labels_layout: Layout
    leaf: bool
    inplace_backward: bool
    coefficient: str
    again: str
    ignore_index: int
    ignored: float
    label_dtype: str
    outputs: tuple | None
    logit_softcap: float | None
    temperature: float

    @staticmethod
    @st.composite
    def drawn(draw, op: str, mode: str):
        several = st.lists(st.integers(2, 4), min_size=2, max_size=3)
        rows = draw(st.lists(st.integers(0, 4), max_size=3) | several | somewhat(mode).map(lambda n: [n]))
        return Logits(
            rows=tuple(rows),
            vocab=draw(st.integers(1, 40) | st.sampled_from([64, 130, 257])),
            dtype=draw(dtypes(mode)),
            std=draw(st.sampled_from([0.1, 1.0, 4.0, 30.0])),
            forbidden=draw(st.sampled_from([0.0, 0.0, 0.3])),
            layout=draw(layouts(len(rows) + 1)),
            labels_layout=draw(layouts(len(rows), any_strides=False)),
            leaf=draw(st.booleans()),
            inplace_backward=draw(st.booleans()),
            **{name: draw(values) for name, values in common(op).items()},
        )

    def make(self, generator) -> tuple[Input, Tensor]:
        labels = draw_labels(generator, self.rows, self.vocab, self)
        x = normal(generator, *self.rows, self.vocab, std=self.std, dtype=self.dtype)
        if self.layout.strides is None:
            columns = torch.rand(self.vocab, generator=generator) < self.forbidden
            columns[0] = False
            x = x.masked_fill(columns, -torch.inf)
        return Input(spoil(x, labels == self.ignore_index, self.layout), self.layout, True, self.leaf), labels

    def check(self, mode: str) -> None:
        generator = make_generator(self.seed)
        logits, labels = self.make(generator)
        transform = dict(logit_softcap=self.logit_softcap, temperature=self.temperature)
        knobs = dict(transform, inplace_backward=self.inplace_backward, impl=MODES[mode])

        def op(logits, labels):
            if self.outputs is None:
                return TokenStats(dpo_fast.logits_token_logps(logits, labels, ignore_index=self.ignore_index, **knobs))
            return dpo_fast.logits_token_stats(
                logits, labels, outputs=self.outputs, ignore_index=self.ignore_index, **knobs
            )

        if self.inplace_backward and not self.layout.distinct(logits.shape):
            raises("needs logits with memory of their own", lambda: op(logits.view, labels))
            return
        try:
            stats = call(op, mode, logits.view, labels)
        except (ValueError, RuntimeError) as error:  # the latter is the compiler's, around the former
            # Told by the strides alone, and some interleave without sharing a place
            own = "needs logits with memory of their own" in str(error)
            walked = "cannot be walked as two dimensions of rows" in str(error)
            assert own and self.inplace_backward and self.layout.strides or walked and mode == "interpreter", error
            return
        wide = torch.promote_types(logits.view.dtype, torch.float32)
        assert stats.logps.dtype == wide and stats.logps.shape == labels.shape
        c = weights_of_tokens(generator, self.coefficient, self.rows, wide)
        inplace = self.inplace_backward and mode != "compiled"
        again = self.again if mode != "compiled" and not (inplace and self.again == "derivative") else "once"
        refused = "modified by an inplace operation" if inplace else None
        times = backward((stats.logps * c).nan_to_num(neginf=0.0).sum(), again, refused)

        # Flat from here, and clean where tokens are ignored
        y = labels.reshape(-1).long()
        ignored = y == self.ignore_index
        z, y = logits.values.reshape(-1, self.vocab).masked_fill(ignored.unsqueeze(1), 0), y.masked_fill(ignored, 0)
        exact = z.double().requires_grad_()
        truth = scored(oracle_token_stats(exact, y, ignore_index=-1, **transform), ignored)
        c = c.reshape(-1).double().masked_fill(truth.logps.isinf(), 0)
        (true,) = torch.autograd.grad((truth.logps.nan_to_num(neginf=0.0) * c).sum(), exact)

        def bounds(labels):
            found = token_bounds(z, labels, ignore_index=-1, **transform)
            return {name: x.masked_fill(ignored.view(-1, *[1] * (x.ndim - 1)), 0) for name, x in found.items()}

        limits = bounds(y)
        either = undecided(oracle_transform(exact.detach(), **transform), y, lambda labels: bounds(labels)["logps"])
        check_stats(stats, truth, limits, either, self.outputs or (), ignored)
        d = logits.gradient(times).reshape(-1, self.vocab)
        assert (d[ignored] == 0).all(), "gradients of ignored rows"
        within(d, true, c.abs().unsqueeze(1) * limits["direction"], "d_logits")
        if again == "derivative":
            no_derivative([logits])
        if inplace:
            assert torch.equal(logits.view.detach(), logits.seen[0]), "the gradient lies where the logits were"
        if many(truth.logps, true) and self.dtype != "float64" and not logits.repeated:
            leaf = z.clone().requires_grad_()
            logps = plain(leaf.float(), y, ignored, **transform)
            (peer,) = torch.autograd.grad((logps * c).sum(), leaf)
            assert_within_budget(stats.logps.reshape(-1), logps, truth.logps, what="logps")
            assert_within_budget(d, peer, true, what="d_logits")


@dataclass(frozen=True)
class Sums:
    """sequence_logps"""

    seed: int
    tokens: int
    sequences: int
    dtype: str
    weights_dtype: str | None
    impossible: float  # share of tokens whose log-prob is -inf
    layout: Layout
    ids_layout: Layout
    weights_layout: Layout
    again: str

    @staticmethod
    @st.composite
    def drawn(draw, op: str, mode: str):
        sequences = draw(st.integers(0, 7))
        return Sums(
            seed=draw(st.integers(0, 2**20)),
            tokens=draw(st.integers(0, 40) | st.just(700)) if sequences else 0,
            sequences=sequences,
            dtype=draw(dtypes(mode)),
            weights_dtype=draw(st.none() | dtypes(mode)),
            impossible=draw(st.sampled_from([0.0, 0.0, 0.1])),
            layout=draw(layouts(1)),
            ids_layout=draw(layouts(1, any_strides=False)),
            weights_layout=draw(layouts(1)),
            again=draw(st.sampled_from(AGAIN[:2])),
        )

    def check(self, mode: str) -> None:
        generator, N, S = make_generator(self.seed), self.tokens, self.sequences
        values = normal(generator, N, std=4.0, dtype=self.dtype).abs().neg()
        if self.weights_dtype is None:
            values = values.masked_fill(torch.rand(N, generator=generator) < self.impossible, -torch.inf)
        x = Input(values, self.layout, True)
        ids = torch.randint(max(S, 1), (N,), generator=generator)
        ids = self.ids_layout.of(self.ids_layout.base(ids), (N,))
        weights = None
        if self.weights_dtype is not None:  # which are taken in the dtype of the sums
            drawn = normal(generator, N, dtype=self.dtype).to(getattr(torch, self.weights_dtype))
            weights = Input(drawn, self.weights_layout, True)

        def op(values, ids, weights):
            return dpo_fast.sequence_logps(values, ids, S, weights=weights, impl=MODES[mode])

        sums = call(op, mode, x.view, ids, None if weights is None else weights.view)
        wide = torch.promote_types(values.dtype, torch.float32)
        assert sums.dtype == wide and sums.shape == (S,)
        c = normal(generator, S, dtype=str(wide)[6:])
        times = backward(
            (sums * c).nan_to_num(neginf=0.0, posinf=0.0).sum(), "once" if mode == "compiled" else self.again
        )

        exact, w = x.values.double().requires_grad_(), None if weights is None else weights.values
        truth = oracle_sequence_logps(exact, ids, S, w) if S else torch.zeros(0, dtype=torch.float64)
        terms = exact.detach().abs() if w is None else (exact.detach() * w.double()).abs()
        size = torch.zeros(S, dtype=torch.float64).index_add_(0, ids, terms).nan_to_num(posinf=0.0)
        within(sums, truth, 0.0 if wide == torch.float32 else gamma(N + 2) * size, "sums")  # rounded once
        true = c.masked_fill(truth.isinf(), 0)[ids].double()
        true = true if w is None else true * w.double()
        within(x.gradient(times), true, 0.0, "d_token_logps")
        assert weights is None or weights.base.grad is None, "weights are not differentiated"
