"""Random calls of the functions that take stacked rows, as training loops hold them: see fuzz.py."""

import copy
import functools
from dataclasses import dataclass

import torch
from fuzz_inputs import (
    OUTPUTS,
    Input,
    Layout,
    backward,
    call,
    common,
    draw_labels,
    dtypes,
    layouts,
    normal,
    raises,
    within,
)
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor

import dpo_fast
from dpo_fast.ops.oracle import oracle_token_stats
from dpo_fast.testing import gamma, make_generator, token_bounds


@dataclass(frozen=True)
class BatchLogits:
    """get_batch_logps"""

    seed: int
    rows: int
    width: int
    vocab: int
    dtype: str
    std: float
    layout: Layout
    labels_layout: Layout
    average: bool
    again: str
    ignore_index: int
    ignored: float
    label_dtype: str

    @staticmethod
    @st.composite
    def drawn(draw, op: str, mode: str):
        shared = common(op)
        return BatchLogits(
            rows=draw(st.integers(0, 4)),
            width=draw(st.integers(1, 6)),
            vocab=draw(st.integers(1, 40) | st.sampled_from([130, 257])),
            dtype=draw(dtypes(mode)),
            std=draw(st.sampled_from([0.1, 1.0, 4.0, 30.0])),
            layout=draw(layouts(3)),
            labels_layout=draw(layouts(2, any_strides=False)),
            average=draw(st.booleans()),
            again=draw(st.sampled_from(["once", "twice"])),
            **{name: draw(shared[name]) for name in ("seed", "ignore_index", "ignored", "label_dtype")},
        )

    def check(self, mode: str) -> None:
        generator, shape = make_generator(self.seed), (self.rows, self.width)
        labels = draw_labels(generator, shape, self.vocab, self)
        x = Input(normal(generator, *shape, self.vocab, std=self.std, dtype=self.dtype), self.layout, True)

        def op(logits, labels):
            return dpo_fast.get_batch_logps(logits, labels, self.average, self.ignore_index, return_lengths=True)

        ignored = labels[:, 1:] == self.ignore_index
        counts = (~ignored).sum(1)
        if self.average and mode != "compiled" and not counts.all():
            raises("labels have no scored token in row", lambda: op(x.view, labels))
            return
        try:
            logps, lengths = call(op, mode, x.view, labels)
        except ValueError as error:  # such strides are the kernels' limit
            assert "cannot be walked as two dimensions of rows" in str(error) and mode == "interpreter", error
            return
        wide = torch.promote_types(x.values.dtype, torch.float32)
        assert logps.dtype == wide and torch.equal(lengths, counts) and logps.shape == (self.rows,)
        c = normal(generator, self.rows, dtype=str(wide)[6:])
        times = backward((logps * c)[counts > 0].sum(), "once" if mode == "compiled" else self.again)

        y = labels[:, 1:].long().masked_fill(ignored, -1).flatten()
        z = x.values[:, :-1].reshape(-1, self.vocab)
        exact = z.double().requires_grad_()
        tokens = oracle_token_stats(exact, y, ignore_index=-1, logit_softcap=None, temperature=1.0).logps
        truth = tokens.view(ignored.shape).sum(1) / (counts if self.average else 1)
        weight = c.double().masked_fill(counts == 0, 0) / (counts.clamp(min=1) if self.average else 1)
        (true,) = torch.autograd.grad((truth.masked_fill(counts == 0, 0) * c.double()).sum(), exact)
        bounds = token_bounds(z, y, ignore_index=-1)
        # Tokens' errors add up in fp64; the sum is rounded, and so is the mean
        size = bounds["logps"].view(ignored.shape).sum(1) / (counts.clamp(min=1) if self.average else 1)
        some = counts > 0
        within(logps[some], truth[some].detach(), (size + gamma(2) * truth.detach().abs())[some], "logps")
        d = x.gradient(times)
        assert (d[:, -1:] == 0).all() and (d[:, :-1][ignored] == 0).all(), "gradients of what is not scored"
        of_tokens = weight.repeat_interleave(self.width - 1)
        limit = of_tokens.abs().unsqueeze(1) * bounds["direction"] + gamma(2) * true.abs()
        within(d[:, :-1].reshape(z.shape), true, limit, "d_logits")


ROUNDING = 64 * torch.finfo(torch.float32).eps


@functools.cache
def _model(kind: str) -> torch.nn.Module:
    return tiny_model(kind).double()


@st.composite
def _scored(draw, length: int) -> tuple[bool, ...]:
    """A completion, mostly; of several turns, sometimes; nothing, seldom."""
    prompt, turns = draw(st.integers(0, max(length - 2, 0))), draw(st.lists(st.integers(0, 8), max_size=2))
    return tuple(t >= prompt and t not in turns for t in range(length))


@dataclass(frozen=True)
class Rows:
    """completion_logps of fp64 models, whose norms and rotations compute in fp32: that is all that may differ."""

    kind: str
    sequences: tuple[tuple[int, ...], ...]  # token ids; the second half is the first one's partners
    before: tuple[int, ...]  # padding
    scored: tuple[tuple[bool, ...], ...]
    pad: int
    pairs: bool
    outputs: tuple[str, ...]
    ld_alpha: float | None
    seed: int

    @staticmethod
    @st.composite
    def drawn(draw, op: str, mode: str):
        few = draw(st.sampled_from([2, 3, 30]))  # of few tokens, many begin alike
        rows, pairs = 2 * draw(st.integers(1, 3)), draw(st.booleans())
        rows -= 0 if pairs else draw(st.integers(0, 1))
        begin = draw(st.lists(st.integers(1, few), max_size=4))
        some = st.lists(st.integers(1, few), min_size=1, max_size=7)
        sequences = [(*(begin if draw(st.booleans()) else ()), *draw(some)) for _ in range(rows)]
        return Rows(
            kind=draw(st.sampled_from(["llama", "gpt2", "gemma2", "qwen3"])),
            sequences=tuple(sequences),
            before=tuple(draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows))),
            scored=tuple(draw(_scored(len(sequence))) for sequence in sequences),
            pad=draw(st.integers(0, 2)),
            pairs=pairs,
            outputs=draw(OUTPUTS),
            ld_alpha=draw(st.none() | st.sampled_from([0.0, 0.3, 1.0])) if pairs else None,
            seed=draw(st.integers(0, 2**20)),
        )

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        width = max(b + len(s) for b, s in zip(self.before, self.sequences, strict=True))
        ids = torch.full((len(self.sequences), width), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for i, (begin, sequence, scored) in enumerate(zip(self.before, self.sequences, self.scored, strict=True)):
            tokens, place = torch.tensor(sequence), slice(begin, begin + len(sequence))
            ids[i, place], mask[i, place] = tokens, 1
            labels[i, place] = tokens.masked_fill(~torch.tensor(scored), -100)
        return ids, mask, labels

    def check(self, mode: str) -> None:
        ids, mask, labels = self.rows()
        model = copy.deepcopy(_model(self.kind))

        def op():
            return dpo_fast.completion_logps(
                model, ids, mask, labels, outputs=self.outputs, ld_alpha=self.ld_alpha, pairs=self.pairs
            )

        if not all(any(scored[1:]) for scored in self.scored):
            raises("labels have no scored token in row", op)
            return
        found = op()
        generator = make_generator(self.seed)
        c = normal(generator, *found.token_logps.shape, dtype="float64")
        (found.token_logps * c).sum().backward(retain_graph=True)
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])

        exact = copy.deepcopy(_model(self.kind))
        names, width = ("logps", *self.outputs), ids.shape[1] - 1
        stats = {name: torch.zeros(len(ids), width, dtype=torch.float64) for name in names}
        for i, (begin, sequence, scored) in enumerate(zip(self.before, self.sequences, self.scored, strict=True)):
            if len(sequence) == 1:
                continue
            x, kept = torch.tensor(sequence), torch.tensor(scored)[1:]
            logits = exact(input_ids=x[None], use_cache=False).logits[0, :-1]
            truth = oracle_token_stats(logits, x[1:].masked_fill(~kept, -1), ignore_index=-1,
                logit_softcap=None, temperature=1.0)  # fmt: skip
            for name in names:
                value = getattr(truth, name).masked_fill(~kept, 0).double()
                stats[name] = stats[name].index_put((torch.tensor(i), torch.arange(len(value)) + begin), value)
        (stats["logps"] * c).sum().backward()
        true = torch.cat([p.grad.flatten() for p in exact.parameters()])
        assert (gradient - true).norm() <= ROUNDING * (1 + true.norm()), "gradients"
        for name in names:
            value = found.token_logps if name == "logps" else getattr(found, name)
            if name == "is_top1":
                assert value.dtype == torch.bool and torch.equal(value, stats[name].bool())
            else:
                torch.testing.assert_close(value.double(), stats[name], rtol=ROUNDING, atol=ROUNDING)
        kept = labels[:, 1:] != -100
        assert torch.equal(found.lengths, (kept & (mask[:, :-1] == 1)).sum(1))
        weights = torch.ones_like(stats["logps"])
        if self.ld_alpha is not None:
            shorter = torch.minimum(*found.lengths.chunk(2)).repeat(2)
            number = (stats["logps"] != 0).cumsum(1)
            weights = torch.where(number <= shorter[:, None], 1.0, self.ld_alpha)
        torch.testing.assert_close(
            found.logps.double(), (stats["logps"] * weights).sum(1), rtol=ROUNDING, atol=ROUNDING
        )
        assert torch.equal(found.mean_logps, found.logps / found.lengths)
