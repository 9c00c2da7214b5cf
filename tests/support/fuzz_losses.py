"""Random calls of the ops that end in a loss: see fuzz.py."""

from dataclasses import dataclass, field

import torch
from fuzz_heads import Head, gradients_of
from fuzz_inputs import (
    AGAIN,
    FLOATS,
    MODES,
    Input,
    Layout,
    backward,
    between,
    call,
    layouts,
    no_derivative,
    normal,
    within,
)
from fuzz_logits import check_stats
from hypothesis import assume
from hypothesis import strategies as st
from loss_cases import SMOOTHING
from preference_bounds import LOSS_ROUNDINGS, bounds_of, loss_bounds
from torch import Tensor

import dpo_fast
from dpo_fast import LOSSES, Objective
from dpo_fast.logps import PairLogps
from dpo_fast.losses import F_DIVERGENCES
from dpo_fast.ops.oracle import oracle_logits, oracle_token_stats
from dpo_fast.testing import EPS, make_generator


@st.composite
def objectives(draw) -> dict:
    """Names, weights and knobs of losses that fit together."""
    names = draw(st.lists(st.sampled_from(sorted(LOSSES)), min_size=1, max_size=2, unique=True))
    least = max(SMOOTHING["exo_pair"] if "exo_pair" in names else 0.0, 0.0)
    divergences = F_DIVERGENCES if all(LOSSES[name].f_divergence for name in names) else F_DIVERGENCES[:1]
    return dict(
        loss=names[0] if len(names) == 1 and draw(st.booleans()) else names,
        loss_weights=draw(st.none() | st.lists(between(-1, 2), min_size=len(names), max_size=len(names))),
        beta=draw(between(0.01, 2)),
        label_smoothing=draw(st.just(least) | between(least, 0.4)),
        f_divergence_type=draw(st.sampled_from(divergences)),
        f_alpha_divergence_coef=draw(between(0, 2)),
        discopop_tau=draw(between(0.02, 2)),
        simpo_gamma=draw(between(0, 2)),
        cpo_alpha=draw(between(0, 2)),
    )


def objective_of(knobs: dict, use_weighting: bool) -> Objective:
    knobs = dict(knobs, use_weighting=use_weighting, weights=knobs["loss_weights"])
    return Objective(knobs.pop("loss"), **{k: v for k, v in knobs.items() if k != "loss_weights"})


def far_from_one(objective: Objective, logps: Tensor, counts: Tensor) -> bool:
    """orpo's odds of a completion of probability 1 are kept finite at a number that depends on the dtype."""
    return "orpo" not in objective.names or bool((logps < -1e-3 * counts).all() and (counts > 0).all())


@dataclass(frozen=True)
class Preference(Head):
    """linear_preference_loss"""

    lengths: tuple[int, ...] = ()  # of the 2P sequences
    objective: dict = field(default_factory=dict)
    as_object: bool = False
    reference: str | None = None
    reference_dtype: str = "float32"
    ld_alpha: float | None = None
    use_weighting: bool = False
    told_lengths: bool = False
    mean_chosen_length: float | None = None
    scale: float = 1.0  # of the loss

    @staticmethod
    @st.composite
    def drawn(draw, op: str, mode: str):
        pairs = draw(st.integers(1, 4))
        lengths = draw(st.lists(st.integers(0, 5), min_size=2 * pairs, max_size=2 * pairs))
        knobs = draw(Head.knobs(op, mode, sum(lengths)))
        given = draw(objectives())
        parts = objective_of(given, False)
        references = ["sums", "pair", "tokens", *([] if parts.must_have_reference else [None])]
        return Preference(
            **dict(knobs, logit_std=min(knobs["logit_std"], 4.0)),
            lengths=tuple(lengths),
            objective=given,
            as_object=draw(st.booleans()),
            reference=draw(st.sampled_from(references)),
            reference_dtype=draw(st.sampled_from(FLOATS)),
            ld_alpha=None if any(LOSSES[n].likelihood for n in parts.names) else draw(st.none() | between(0, 1)),
            use_weighting=not parts.couples_pairs and draw(st.booleans()),
            told_lengths=draw(st.booleans()),
            mean_chosen_length=draw(st.none() | between(1, 9)),
            scale=draw(st.sampled_from([1.0, 0.5, -4.0])),
        )

    def references(self, generator, sums: Tensor, ids: Tensor) -> dict:
        """Around what the oracle's policy finds."""
        dtype, P = getattr(torch, self.reference_dtype), len(self.lengths) // 2
        near = (sums + normal(generator, 2 * P, std=2.0, dtype="float64")).float().to(dtype)
        if self.reference == "tokens":
            return dict(reference_token_logps=normal(generator, self.N, std=3.0).abs().neg().to(dtype))
        if self.reference == "pair":
            return dict(reference_logps=(near[:P], near[P:]))
        return dict(reference_logps=near) if self.reference else {}

    def check(self, mode: str) -> None:
        generator, P = make_generator(self.seed), len(self.lengths) // 2
        inputs, labels = self.make(generator)
        ids = torch.repeat_interleave(torch.arange(2 * P), torch.tensor(self.lengths))
        ids = ids[torch.randperm(self.N, generator=generator)]
        ignored = labels == self.ignore_index
        y = labels.long().masked_fill(ignored, -1)
        tensors = self.clean(inputs, ignored)
        exact = {k: x.double().requires_grad_(k in self.needs) for k, x in tensors.items()}
        logits = oracle_logits(**self.arguments({k: x.detach() for k, x in exact.items()}))
        first = oracle_token_stats(logits, y, ignore_index=-1, **self.transform).logps
        sums = torch.zeros(2 * P, dtype=torch.float64).index_add_(0, ids, first)
        counts = torch.bincount(ids[~ignored], minlength=2 * P)
        objective = objective_of(self.objective, self.use_weighting)
        assume(far_from_one(objective, sums, counts))

        references = self.references(generator, sums, ids)
        knobs = dict(references, **self.transform, outputs=self.outputs or (), ld_alpha=self.ld_alpha)
        knobs["mean_chosen_length"] = self.mean_chosen_length
        ours = dict(knobs, ignore_index=self.ignore_index, tile_mib=self.tile_mib, impl=MODES[mode])
        if self.told_lengths:
            ours["sequence_lengths"] = list(self.lengths)
        given = dict(loss=objective) if self.as_object else dict(self.objective, use_weighting=self.use_weighting)

        def op(views, labels, ids):
            arguments = dict(self.arguments(views), labels=labels, sequence_ids=ids, num_pairs=P)
            return dpo_fast.linear_preference_loss(**arguments, **ours, **given)

        with self.around(mode):
            out = call(op, mode, {name: x.view for name, x in inputs.items()}, labels, ids)
        truth = dpo_fast.linear_preference_loss(
            **self.arguments(exact), labels=y, sequence_ids=ids, num_pairs=P, ignore_index=-1, loss=objective,
            impl="reference", **knobs,
        )  # fmt: skip
        wide = torch.promote_types(inputs["hidden"].values.dtype, torch.float32)
        assert {x.dtype for x in (out.loss, out.losses, out.chosen_logps, out.chosen_rewards)} == {wide}, "dtypes"
        times, again = 0, "once" if mode == "compiled" else self.again
        if self.needs:
            refused = "a second backward" if out.plan.name in ("pairwise", "pending") else None
            with self.around(mode):
                times = backward(out.loss * self.scale, again, refused)
        true = gradients_of(truth.loss * self.scale, exact, self.needs)
        bounds = bounds_of(tensors, y, ids, truth, objective, ignore_index=-1, **self.transform)
        either = self.undecided(tensors, logits, y.clamp(min=0), ignored)
        check_stats(out.stats, truth.stats, bounds, either, self.outputs or (), ignored)
        beta = self.objective["beta"]
        for names, bound in (
            (("chosen_logps", "rejected_logps"), bounds["sums"]),
            (("chosen_rewards", "rejected_rewards"), beta * bounds["sums"]),
        ):
            for name, half in zip(names, bound.tensor_split(2), strict=True):
                within(getattr(out, name), getattr(truth, name), half, name)
        within(out.losses, truth.losses, bounds["losses"], "losses")
        within(out.loss, truth.loss, bounds["losses"].mean() * (1 + EPS), "loss")
        self.check_gradients(inputs, times, true, {k: abs(self.scale) * bounds[k] for k in self.needs}, ignored)
        if self.needs and again == "derivative":
            no_derivative(inputs.values())


@dataclass(frozen=True)
class Losses:
    """preference_loss"""

    seed: int
    pairs: int
    objective: dict
    dtype: str
    reference_dtype: str | None
    lengths_dtype: str
    weights_dtype: str | None
    layouts: tuple[Layout, Layout]
    reduction: str
    std: float
    again: str

    @staticmethod
    @st.composite
    def drawn(draw, op: str, mode: str):
        given = draw(objectives())
        parts = objective_of(given, False)
        return Losses(
            seed=draw(st.integers(0, 2**20)),
            pairs=draw(st.integers(1, 6)),
            objective=given,
            dtype=draw(st.sampled_from(FLOATS)),
            reference_dtype=draw(st.sampled_from(FLOATS if parts.must_have_reference else [None, *FLOATS])),
            lengths_dtype=draw(st.sampled_from(["int64", "int32", "float32"])),
            weights_dtype=None if parts.couples_pairs else draw(st.none() | st.sampled_from(FLOATS)),
            layouts=(draw(layouts(1, any_strides=False)), draw(layouts(1, any_strides=False))),
            reduction=draw(st.sampled_from(["none", "mean", "sum"])),
            std=draw(st.sampled_from([0.3, 3.0, 30.0])),
            again=draw(st.sampled_from(AGAIN[:2])),
        )

    def check(self, mode: str) -> None:
        generator, P = make_generator(self.seed), self.pairs
        halves = [
            Input(normal(generator, P, std=self.std).sub(20).to(getattr(torch, self.dtype)), layout, True)
            for layout in self.layouts
        ]
        near = [x.values.float() + normal(generator, P, std=self.std) for x in halves]
        kind = self.reference_dtype
        references = [None, None] if kind is None else [x.to(getattr(torch, kind)) for x in near]
        lengths = torch.randint(1, 12, (2, P), generator=generator).to(getattr(torch, self.lengths_dtype))
        weights = None
        if self.weights_dtype is not None:
            weights = torch.rand(P, generator=generator).to(getattr(torch, self.weights_dtype))
        counts = dict(zip(("chosen_lengths", "rejected_lengths"), lengths, strict=True))
        objective = objective_of(self.objective, weights is not None)
        values = [x.values.double().requires_grad_() for x in halves]
        assume(far_from_one(objective, torch.cat(values).detach(), lengths.reshape(-1)))

        def op(*logps):
            given = dict(self.objective, **counts, weights=weights, reduction=self.reduction)
            return dpo_fast.preference_loss(*logps, *references, **given)

        loss = call(op, mode, *(x.view for x in halves))
        times = backward(loss.sum(), "once" if mode == "compiled" else self.again)
        pairs = PairLogps(
            *values, *(None if x is None else x.double() for x in references), *lengths,
            None if weights is None else weights.double(),
        )  # fmt: skip
        losses = objective(pairs)
        truth = losses if self.reduction == "none" else getattr(losses, self.reduction)()
        true = torch.autograd.grad(truth.sum(), values, materialize_grads=True, allow_unused=True)
        _, d_losses, c, d_c = loss_bounds(pairs, objective)
        factor = 1 if self.reduction == "mean" else P
        d_losses = {"none": d_losses, "mean": d_losses.mean(), "sum": d_losses.sum()}[self.reduction]
        d_losses = d_losses + LOSS_ROUNDINGS * EPS * truth.detach().abs()
        exact = {self.dtype, kind or "float64", self.weights_dtype or "float64"} == {"float64"}
        within(loss, truth, d_losses, "loss", exact)
        for x, d, bound in zip(halves, true, (d_c + EPS * c).tensor_split(2), strict=True):
            within(x.gradient(times), d, factor * bound, "gradient", exact)
