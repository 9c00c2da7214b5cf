"""Random calls of the ops that take hidden states and a head, as tensors or as a module: see fuzz.py."""

import contextlib
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest import mock

import torch
from fuzz_inputs import (
    FLOATS,
    MODES,
    Input,
    Layout,
    backward,
    between,
    call,
    common,
    draw_labels,
    dtypes,
    layouts,
    no_derivative,
    normal,
    somewhat,
    spoil,
    weights_of_tokens,
    within,
)
from fuzz_logits import check_stats, many, plain, scored, undecided
from hypothesis import strategies as st
from torch import Tensor, nn

import dpo_fast
from dpo_fast import TokenStats
from dpo_fast.forward import HeadTransform, score_hidden
from dpo_fast.ops import call as calls
from dpo_fast.ops import plan
from dpo_fast.ops.oracle import oracle_logits, oracle_token_stats, oracle_transform
from dpo_fast.testing import assert_within_budget, fp32_linear, head_bounds, make_generator


@dataclass(frozen=True)
class Head:
    """linear_token_logps where `outputs` is None, else linear_token_stats."""

    seed: int
    N: int
    H: int
    V: int
    rank: int | None
    dtypes: dict  # name -> dtype, for those that are there
    autocast: bool
    logit_std: float
    forbidden: float  # share of columns that a bias makes -inf
    layouts: dict  # name -> Layout
    labels_layout: Layout
    needs: tuple[str, ...]
    tile: tuple[int, int]  # at most so many rows, columns
    tile_mib: int | None
    coefficient: str
    again: str
    ignore_index: int
    ignored: float
    label_dtype: str
    outputs: tuple | None
    logit_softcap: float | None
    logit_scale: float
    temperature: float

    @classmethod
    def drawn(cls, op: str, mode: str):
        return cls.knobs(op, mode).map(lambda knobs: cls(**knobs))

    @staticmethod
    @st.composite
    def knobs(draw, op: str, mode: str, N: int | None = None):
        dtype, rank = draw(dtypes(mode)), draw(st.none() | st.integers(0, 3))
        kinds = {"hidden": dtype, "weight": dtype}
        if draw(st.booleans()):
            kinds["bias"] = draw(st.just(dtype) | st.sampled_from(FLOATS))
        if rank is not None:
            kinds |= {name: draw(st.just(dtype) | st.sampled_from(FLOATS)) for name in ("down", "up")}
        scale = draw(st.sampled_from([1.0, 1.0, 0.0]) | between(0.05, 2) | between(-2, -0.05))
        autocast = dtype == "float32" and mode != "compiled" and draw(st.booleans())
        return dict(
            N=draw(somewhat(mode)) if N is None else N,
            H=draw(st.integers(1, 9)),
            V=draw(st.integers(1, 40) | st.sampled_from([64, 130, 300])),
            rank=rank,
            dtypes=kinds,
            autocast=autocast,
            logit_std=draw(st.sampled_from([0.1, 1.0, 4.0, 20.0])),
            forbidden=draw(st.sampled_from([0.0, 0.0, 0.3])) if scale > 0 and "bias" in kinds else 0.0,
            layouts={name: draw(layouts(1 if name == "bias" else 2)) for name in kinds},
            labels_layout=draw(layouts(1, any_strides=False)),
            needs=tuple(draw(st.lists(st.sampled_from(sorted(kinds)), unique=True))),
            tile=(draw(st.integers(1, 12)), draw(st.integers(1, 50))),
            tile_mib=draw(st.none() | st.integers(1, 3)),
            logit_scale=scale,
            **{name: draw(values) for name, values in common(op).items()},
        )

    @property
    def transform(self) -> dict:
        return dict(logit_softcap=self.logit_softcap, logit_scale=self.logit_scale, temperature=self.temperature)

    def make(self, generator) -> tuple[dict[str, Input], Tensor]:
        labels = draw_labels(generator, (self.N,), self.V, self)
        shapes = dict(hidden=(self.N, self.H), weight=(self.V, self.H), bias=(self.V,))
        shapes |= dict(down=(self.N, self.rank), up=(self.V, self.rank))
        stds = dict(weight=self.logit_std / math.sqrt(self.H), up=0.3)
        inputs = {}
        for name, dtype in self.dtypes.items():
            # Others are taken in fp32 where hidden states are not in fp64
            x = normal(generator, *shapes[name], std=stds.get(name, 1.0), dtype=self.dtypes["hidden"])
            x = x.float().to(getattr(torch, dtype)) if name not in ("hidden", "weight") else x
            if name == "bias" and self.layouts[name].strides is None:
                columns = torch.rand(self.V, generator=generator) < self.forbidden
                columns[0], columns[labels[labels != self.ignore_index].long()] = False, False
                x = x.masked_fill(columns, -torch.inf)
            if name in ("hidden", "down"):
                x = spoil(x, labels == self.ignore_index, self.layouts[name])
            inputs[name] = Input(x, self.layouts[name], name in self.needs)
        return inputs, labels

    def clean(self, inputs: dict[str, Input], ignored: Tensor) -> dict[str, Tensor]:
        """The values that the GEMMs take, 0 for ignored tokens."""
        rounded = ("hidden", "weight", "down", "up") if self.autocast else ()
        values = {k: x.values.bfloat16().to(x.values.dtype) if k in rounded else x.values for k, x in inputs.items()}
        return {k: x.masked_fill(ignored.unsqueeze(1), 0) if k in ("hidden", "down") else x for k, x in values.items()}

    def arguments(self, tensors: dict) -> dict:
        low_rank = (tensors["down"], tensors["up"]) if "down" in tensors else None
        return dict(hidden=tensors["hidden"], weight=tensors["weight"], bias=tensors.get("bias"), low_rank=low_rank)

    @contextlib.contextmanager
    def around(self, mode: str):
        """Small tiles, and autocast."""

        def small(*sizes, **knobs):
            found = plan.plan_head(*sizes, **knobs)
            if torch.compiler.is_compiling():
                return found
            rows, columns = max(self.tile[0], self.N // 8), max(self.tile[1], self.V // 8)
            whole = knobs["device_type"] != "cpu" or found.name in ("pairwise", "pending")
            return replace(
                found,
                chunk_rows=min(found.chunk_rows, rows),
                chunk_columns=found.chunk_columns if whole else min(found.chunk_columns, columns),
                slice_columns=min(found.slice_columns, columns),
            )

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(calls, "plan_head", small))
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
            yield

    def bounds(self, tensors, labels: Tensor, ignored: Tensor, coefficient=0.0) -> dict[str, Tensor]:
        labels = labels.masked_fill(ignored, -1)
        knobs = dict(self.transform, ignore_index=-1, coefficient=coefficient)
        return head_bounds(**self.arguments(tensors), labels=labels, **knobs)

    def undecided(self, tensors, logits: Tensor, labels: Tensor, ignored: Tensor) -> Tensor:
        z = oracle_transform(logits.detach(), **self.transform)
        return undecided(z, labels, lambda labels: self.bounds(tensors, labels, ignored)["logps"])

    def check_gradients(self, inputs, times, true: dict, bounds: dict, ignored: Tensor) -> dict[str, Tensor]:
        found = {name: inputs[name].gradient(times) for name in self.needs}
        for name, gradient in found.items():
            if name in ("hidden", "down"):
                assert (gradient[ignored] == 0).all(), f"d_{name} of ignored tokens"
            within(gradient, true[name], bounds[name], f"d_{name}", self.dtypes["hidden"] == "float64")
        return found

    def check(self, mode: str) -> None:
        generator = make_generator(self.seed)
        inputs, labels = self.make(generator)
        knobs = dict(ignore_index=self.ignore_index, **self.transform, tile_mib=self.tile_mib, impl=MODES[mode])

        def op(views, labels):
            arguments = dict(self.arguments(views), labels=labels, **knobs)
            if self.outputs is None:
                return TokenStats(dpo_fast.linear_token_logps(**arguments))
            return dpo_fast.linear_token_stats(**arguments, outputs=self.outputs)

        with self.around(mode):
            stats = call(op, mode, {name: x.view for name, x in inputs.items()}, labels)
        wide = torch.promote_types(inputs["hidden"].values.dtype, torch.float32)
        assert stats.logps.dtype == wide and stats.logps.shape == (self.N,)
        c = weights_of_tokens(generator, self.coefficient, (self.N,), wide)
        assert stats.logps.requires_grad == bool(self.needs)
        times, again = 0, "once" if mode == "compiled" else self.again
        if self.needs:
            with self.around(mode):
                times = backward((stats.logps * c).nan_to_num(neginf=0.0).sum(), again)

        ignored = labels == self.ignore_index
        y = labels.long().masked_fill(ignored, 0)
        tensors = self.clean(inputs, ignored)
        exact = {k: x.double().requires_grad_(k in self.needs) for k, x in tensors.items()}
        z = oracle_logits(**self.arguments(exact))
        truth = scored(oracle_token_stats(z, y, ignore_index=-1, **self.transform), ignored)
        c = c.double()
        true = gradients_of((truth.logps * c).sum(), exact, self.needs)

        limits = self.bounds(tensors, y, ignored, c)
        either = self.undecided(tensors, z, y, ignored)
        check_stats(stats, truth, limits, either, self.outputs or (), ignored)
        found = self.check_gradients(inputs, times, true, limits, ignored)
        if self.needs and again == "derivative":
            no_derivative(inputs.values())
        if self.dtypes["hidden"] == "float64" or not many(truth.logps) or any(x.repeated for x in inputs.values()):
            return
        leaves = {k: x.clone().requires_grad_(k in self.needs) for k, x in tensors.items()}
        z = fp32_linear(leaves["hidden"], leaves["weight"])
        z = z if "down" not in leaves else z + leaves["down"].float() @ leaves["up"].float().T
        z = z if "bias" not in leaves else z + leaves["bias"].float()
        logps = plain(z, y, ignored, **self.transform)
        peer = gradients_of((logps * c).sum(), leaves, self.needs)
        assert_within_budget(stats.logps, logps, truth.logps, what="logps")
        for name, gradient in found.items():
            if many(true[name]):
                assert_within_budget(gradient, peer[name], true[name], what=f"d_{name}")


def gradients_of(loss: Tensor, leaves: dict[str, Tensor], needs) -> dict[str, Tensor]:
    if not needs:
        return {}
    found = torch.autograd.grad(loss, [leaves[name] for name in needs], allow_unused=True, materialize_grads=True)
    return dict(zip(needs, found, strict=True))


HOOKS = ("input", "output", "gradient")


@dataclass(frozen=True)
class Hooked(Head):
    """The head of a model that `attach` got, as a module: read where nothing hangs on it, called where hooks do. These
    double what they see."""

    hooks: tuple[str, ...] = ()

    @staticmethod
    @st.composite
    def drawn(draw, op: str, mode: str):
        knobs = draw(Head.knobs(op, mode))
        kinds = {k: v for k, v in knobs["dtypes"].items() if k not in ("down", "up")}
        # A called head's logits have its dtype, whose roundings are not ours
        dtype = "float64" if kinds["hidden"] == "float64" else "float32"
        fixed = dict(rank=None, autocast=False, temperature=1.0, ignore_index=-100, forbidden=0.0)
        knobs |= fixed | dict(
            dtypes=dict.fromkeys(kinds, dtype),
            logit_scale=draw(st.just(1.0) | between(0.1, 2)),
            layouts={name: knobs["layouts"][name] for name in kinds},
            needs=tuple(name for name in knobs["needs"] if name in kinds),
        )
        # A compiled graph has no place for a module's backward hooks
        hooks = draw(st.lists(st.sampled_from(HOOKS[: 2 if mode == "compiled" else 3]), unique=True))
        return Hooked(**knobs, hooks=tuple(hooks))

    def check(self, mode: str) -> None:
        generator = make_generator(self.seed)
        inputs, labels = self.make(generator)
        ignored = labels == self.ignore_index
        x = inputs["hidden"]
        if self.hooks:  # the product with what is ignored is the module's
            x = inputs["hidden"] = Input(self.clean(inputs, ignored)["hidden"], x.layout, "hidden" in self.needs)
        head = nn.Linear(self.H, self.V, bias="bias" in inputs, dtype=x.values.dtype)
        for name in inputs.keys() - {"hidden"}:
            setattr(head, name, nn.Parameter(inputs[name].view.detach(), requires_grad=name in self.needs))
        if "input" in self.hooks:
            head.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
        if "output" in self.hooks:
            head.register_forward_hook(lambda _module, _args, out: out * 2)
        if "gradient" in self.hooks:
            head.register_full_backward_hook(lambda _module, d_inputs, _d_outputs: tuple(
                None if d is None else d * 2 for d in d_inputs))  # fmt: skip
        transform = HeadTransform(scale=self.logit_scale, softcap=self.logit_softcap)
        state = SimpleNamespace(transform=transform, tile_mib=self.tile_mib, impl=MODES[mode])
        with self.around(mode):
            stats = call(
                lambda hidden, y: score_hidden(head, hidden, y, state, self.outputs or ()), mode, x.view, labels
            )
            c = weights_of_tokens(generator, self.coefficient, (self.N,), stats.logps.dtype)
            if self.needs:
                (stats.logps * c).sum().backward()

        before, after, back = (2 if kind in self.hooks else 1 for kind in HOOKS)
        y = labels.long().masked_fill(ignored, -1)
        tensors = self.clean(inputs, ignored)
        exact = {k: v.double().requires_grad_(k in self.needs) for k, v in tensors.items()}
        z = after * oracle_logits(before * exact["hidden"], exact["weight"], exact.get("bias"), None)
        truth = oracle_token_stats(z, y, ignore_index=-1, **self.transform)
        true = gradients_of((truth.logps * c.double()).sum(), exact, self.needs)
        knobs = dict(self.transform, logit_scale=after * self.logit_scale, ignore_index=-1)
        seen = dict(hidden=before * tensors["hidden"], weight=tensors["weight"], bias=tensors.get("bias"))
        limits = head_bounds(**seen, labels=y, coefficient=c.double(), **knobs)
        either = undecided(
            oracle_transform(z.detach(), **self.transform),
            y.clamp(min=0),
            lambda labels: head_bounds(**seen, labels=labels.masked_fill(ignored, -1), **knobs)["logps"],
        )
        check_stats(stats, truth, limits, either, self.outputs or (), ignored)
        for name in self.needs:
            found = x.gradient() if name == "hidden" else getattr(head, name).grad
            factor = before * back if name == "hidden" else 1
            within(found, true[name] * (back if name == "hidden" else 1), factor * limits[name], f"d_{name}")
