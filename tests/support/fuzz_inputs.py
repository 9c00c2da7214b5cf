"""What the random calls of fuzz.py have in common: tensors anywhere in memory, backwards, what every op is given.

A case is plain numbers and names, so that what is printed of it makes it again: `Logits(seed=3, ...).check("eager")`.
Its tensors lie somewhere in a larger one, whose other elements are NaN; rows of ignored tokens hold NaN and infinity.
"""

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from dpo_fast.ops.stats import STATS
from dpo_fast.testing import assert_within_bound

MODES = {"eager": "torch", "interpreter": "triton", "compiled": "torch"}  # -> impl
FLOATS = ("float32", "bfloat16", "float16", "float64")
BUDGET_ROWS = 300  # of the cases whose errors are compared with PyTorch's, too


@dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie in one dimension of memory. `strides` None: `order` lists its dimensions from the
    innermost; each steps over `step` times what the inner ones span, and `pad` elements more. Else any strides."""

    order: tuple[int, ...]
    step: tuple[int, ...]
    pad: tuple[int, ...]
    offset: int = 0
    strides: tuple[int, ...] | None = None

    def strides_of(self, shape) -> tuple[int, ...]:
        if self.strides is not None:
            return self.strides
        found, reach = [0] * len(shape), 1
        for d in self.order:
            found[d] = reach * self.step[d] + self.pad[d]
            reach = found[d] * max(shape[d], 1)
        return tuple(found)

    def base(self, x: Tensor) -> Tensor:
        """One-dimensional memory that holds x at `of`, NaN elsewhere; with any strides x's elements in some order."""
        strides = self.strides_of(x.shape)
        reach = self.offset + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True) if n) + 2
        if self.strides is not None and x.numel():
            return x.reshape(-1).repeat(math.ceil(reach / x.numel()))[:reach].clone()
        base = torch.full((reach,), torch.nan if x.is_floating_point() else 2**30, dtype=x.dtype)
        self.of(base, x.shape).copy_(x)
        return base

    def of(self, base: Tensor, shape) -> Tensor:
        return base.as_strided(shape, self.strides_of(shape), self.offset)

    def distinct(self, shape) -> bool:
        """Whether no two elements share a place."""
        reach = self.offset + sum((n - 1) * s for n, s in zip(shape, self.strides_of(shape), strict=True) if n) + 1
        places = self.of(torch.arange(reach), shape).reshape(-1)
        return places.unique().numel() == places.numel()


@st.composite
def layouts(draw, ndim: int, any_strides: bool = True):
    if draw(st.booleans()):  # contiguous
        return Layout(tuple(reversed(range(ndim))), (1,) * ndim, (0,) * ndim)
    few = st.integers(0, 3)
    drawn = Layout(
        tuple(draw(st.permutations(range(ndim)))),
        tuple(draw(st.lists(st.integers(1, 2), min_size=ndim, max_size=ndim))),
        tuple(draw(st.lists(few, min_size=ndim, max_size=ndim))),
        draw(few),
    )
    if any_strides and draw(st.booleans()):
        return replace(drawn, strides=tuple(draw(st.lists(st.integers(0, 9), min_size=ndim, max_size=ndim))))
    return drawn


class Input:
    """A differentiable tensor in memory of its own: `view` goes into the op, gradients arrive in `base`.

    A hook notes each gradient of the view and doubles what goes on."""

    def __init__(self, x: Tensor, layout: Layout, needs: bool, leaf: bool = True):
        self.layout, self.shape, self.seen = layout, x.shape, []
        self.repeated = layout.strides is not None  # rows may be equal, and their errors are
        self.base = layout.base(x).requires_grad_(needs)
        self.view = layout.of(self.base if leaf else self.base * 1, x.shape)
        self.values = self.view.detach().clone()
        if needs:
            self.view.register_hook(self._hook)

    def _hook(self, gradient: Tensor) -> Tensor:
        self.seen.append(gradient.clone())
        return gradient * 2

    def gradient(self, times: int = 1) -> Tensor:
        """Of the view, which came `times` times, always the same, and reached the base doubled."""
        if self.base.grad is None:  # the loss does not depend on it
            return torch.zeros_like(self.values)
        first = self.seen[0]
        assert len(self.seen) == times and all(torch.equal(first, other) for other in self.seen), "another gradient"
        assert first.dtype == self.base.dtype and first.shape == self.shape
        again = torch.zeros_like(self.base).requires_grad_()
        (expected,) = torch.autograd.grad(self.layout.of(again, self.shape), again, first * 2)
        torch.testing.assert_close(self.base.grad, expected * times, rtol=0, atol=0, equal_nan=True)  # inf in 16 bits
        return first


def normal(generator, *shape, std=1.0, dtype="float32") -> Tensor:
    """In fp32's precision where it is not asked for in fp64."""
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * std
    return (x if dtype == "float64" else x.float()).to(getattr(torch, dtype))


def spoil(x: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """x with NaN and infinities in `rows` (a mask), where those are no other rows' memory."""
    if layout.strides is not None:
        return x
    junk = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=x.dtype).repeat(x.shape[-1])[: x.shape[-1]]
    return torch.where(rows.unsqueeze(-1), junk, x)


def within(found: Tensor, truth: Tensor, bound, what: str, exact: bool | None = None) -> None:
    """exact: whether all is in fp64; None: where `found` is. The bounds are for fp32 and at least linear in its
    roundings; in fp64 the oracle has such errors of its own."""
    exact = found.dtype == torch.float64 if exact is None else exact
    over = found.isinf() & (truth.abs() > torch.finfo(found.dtype).max / 2)  # beyond the range of 16 bits
    found, truth = found.masked_fill(over, 0), truth.masked_fill(over, 0)
    assert_within_bound(found, truth, bound * 2.0**-28 if exact else bound, what=what)


AGAIN = ("once", "twice", "derivative")


def backward(loss: Tensor, again: str, refused: str | None = None) -> int:
    """-> how often the inputs' hooks were called. refused: what a second backward says where it raises."""
    if again == "derivative":
        loss.backward(create_graph=True)
        return 1
    loss.backward(retain_graph=again == "twice")
    if again == "once":
        return 1
    if refused is None:
        loss.backward()
        return 2
    raises(refused, loss.backward)
    return 1


def no_derivative(inputs) -> None:
    """After `backward(loss, "derivative")`: nobody takes the gradients for constants."""
    for x in inputs:
        if x.base.requires_grad and x.values.numel():
            assert x.base.grad.requires_grad, "a gradient that seems constant"
            raises("no derivative", x.base.grad.sum().backward)


def raises(said: str, function) -> None:
    try:
        function()
    except (RuntimeError, ValueError) as error:
        assert said in str(error), f"{said!r} was to be said, not {error}"
        return
    raise AssertionError(f"{said!r} was to be said")


def call(function, mode: str, *arguments):
    if mode != "compiled":
        return function(*arguments)
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)


def weights_of_tokens(generator, kind: str, shape, dtype) -> Tensor:
    """Coefficients of log-probs in a loss, with the strides in which their gradients will come."""
    if kind == "one":
        return torch.full((), 0.5, dtype=dtype).expand(shape)
    c = normal(generator, *reversed(shape), dtype=str(dtype)[6:])
    return c.permute(tuple(reversed(range(c.ndim)))) if kind == "transposed" else c.reshape(shape)


def draw_labels(generator, shape, vocab: int, case) -> Tensor:
    """In the case's layout; some are `ignore_index`, which may be a class."""
    labels = torch.randint(vocab, shape, generator=generator)
    labels = labels.masked_fill(torch.rand(shape, generator=generator) < case.ignored, case.ignore_index)
    labels = labels.to(getattr(torch, case.label_dtype))
    return case.labels_layout.of(case.labels_layout.base(labels), shape)


def somewhat(mode: str):
    small = st.integers(0, 6)
    return small | small | small | st.just(BUDGET_ROWS) if mode == "eager" else small


def dtypes(mode: str):
    return st.sampled_from(FLOATS[:3] if mode == "interpreter" else FLOATS)


def between(low: float, high: float):
    """Numbers with three decimals: fp32 knows them all from 0."""
    return st.integers(round(1000 * low), round(1000 * high)).map(lambda n: n / 1000)


OUTPUTS = st.lists(st.sampled_from(STATS), unique=True).map(tuple)


def common(op: str) -> dict:
    return dict(
        seed=st.integers(0, 2**20),
        again=st.sampled_from(AGAIN),
        coefficient=st.sampled_from(["one", "plain", "transposed"]),
        ignore_index=st.sampled_from([-100, -100, -1, 0, 3, 2**31 - 1]),
        ignored=st.sampled_from([0.0, 0.3, 0.3, 1.0]),
        label_dtype=st.sampled_from(["int64", "int32"]),
        outputs=st.none() if op.endswith("logps") else OUTPUTS,
        logit_softcap=st.none() | between(0.5, 50),
        temperature=st.just(1.0) | between(0.1, 10) | st.integers(1, 3),
    )
