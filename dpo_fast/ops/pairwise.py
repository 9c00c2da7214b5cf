"""Level 3's core: hidden states to the loss of P pairs and every gradient, in the forward, with three GEMMs.

The tile of a chunk of whole groups is scored; their losses give g = d loss / d sequence log-prob on the spot; the
same tile then yields d_hidden and its share of d_weight. What a loss is, this file does not know: it is handed a
function of sequence log-probs.

    pairwise  chunks of whole groups: a pair, or more sequences that comparisons connect
    pending   a pair longer than a tile: D^T (w hidden) of each of its two sequences is summed over its chunks without
              g, which is applied once, when both are scored
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comparisons import Compared, Comparisons, Groups
from .call import Call, Head
from .checks import edge_of, without_derivative
from .dispatch import free_to_look, implementation
from .sequence import sequence_sums
from .tile import Tile, scored_rows

_OP = "linear_preference_loss"


@dataclass(frozen=True)
class Tokens:
    """N tokens and where they belong, sorted by group and within a group by sequence.

    order: (n,) int64 positions in the caller's order, or None where that is sorted already.
    sizes: host-side token counts, of each group's sequences.
    """

    labels: Tensor  # (N,) int64, in the caller's order
    ranks: Tensor  # (n,) int64, of their sequences, sorted
    weights: Tensor | None  # (n,) fp32 token weights, sorted: sequence log-prob = sum of weight x token log-prob
    order: Tensor | None
    sizes: tuple[tuple[int, ...], ...]
    groups: Groups
    comparisons: Comparisons
    all_compared: Compared  # sequences and their ranks, by group

    def compared(self, groups: slice) -> Compared:
        """The comparisons of some groups; places are ranks."""
        ends = self.groups.comparison_ends
        return Compared(*(x[:, ends[groups.start] : ends[groups.stop]] for x in self.all_compared))

    def in_callers_order(self, losses: Tensor) -> Tensor:
        """(C,) by group -> in the order of the comparisons, which that of pairs is already."""
        return (
            losses
            if self.comparisons.host is None
            else torch.empty_like(losses).index_copy_(0, self.groups.order, losses)
        )


# (sequence log-probs (S,), token values by name (n,), ranks of sequences (n,), token index, compared) -> losses (c,)
PairLosses = Callable[[Tensor, dict[str, Tensor], Tensor, "Tensor | slice", Compared], Tensor]


def group_tokens(
    labels: Tensor,
    scored: Tensor,
    sequence_ids: Tensor,
    comparisons: Comparisons,
    weights: Tensor | None,
    lengths: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
) -> Tokens:
    """Sort the `scored` tokens, (N,) bool, by group. Counting them reads the ids on the host: free on CPU, one
    synchronisation elsewhere, none where `lengths`, the token count of each of the S sequences (ignored tokens
    included), is given. sequences: in the order of their tokens, each one run of them; tokens that these say to be
    sorted are not sorted again."""
    groups = comparisons.groups()
    ranks = groups.rank[sequence_ids]
    order = scored_rows(scored)
    if order is not None:
        ranks = ranks[order]
    if lengths is not None and order is None:
        counts = [lengths[s] for s in groups.sequences]
    else:
        counts = torch.bincount(ranks, minlength=comparisons.num_sequences).tolist()
    sizes = tuple(tuple(counts[a:b]) for a, b in itertools.pairwise(groups.sequence_ends))
    if sequences is None:
        in_order = free_to_look(ranks) and bool((ranks.diff() >= 0).all())
    else:
        in_order = list(sequences) == groups.sequences
    if not in_order:
        ranks, by_rank = ranks.sort(stable=True)
        order = by_rank if order is None else order[by_rank]
    if order is not None and weights is not None:
        weights = weights[order]
    index = comparisons.index if comparisons.host is None else comparisons.index[groups.order]
    compared = Compared(index.t(), groups.rank[index.t()])
    return Tokens(labels, ranks, weights, order, sizes, groups, comparisons, compared)


def chunks_of_groups(sizes: Sequence[tuple[int, ...]], rows: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive groups whose tokens fit `rows`, as (groups, tokens); a longer group comes alone."""
    first = start = taken = 0
    for group, size in enumerate(map(sum, sizes)):
        if group > first and taken + size > rows:
            yield slice(first, group), slice(start, start + taken)
            first, start, taken = group, start + taken, 0
        taken += size
    yield slice(first, len(sizes)), slice(start, start + taken)


class PairwiseLossFunction(torch.autograd.Function):
    """(hidden, weight, bias, down, up) -> loss (), losses (C,), token log-probs (N,), statistics (len(stats), N).

    Only the loss, the mean of the losses, has a gradient: a backward by way of the others raises. The gradients are
    computed in the forward, in fp32, and handed over by the first backward, which scales and rounds them once; a second
    one raises. rows: of a tile. `own` is filled for `OwnLeaves`: leaf -> gradient.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, down, up, tokens: Tokens, call: Call, rows: int, pair_losses, own: dict):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        inputs = Head(hidden, weight, bias, down, up)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        needs = [need and x is not None for x, need in zip(inputs, ctx.needs_input_grad[:5], strict=True)]
        run = _Run(inputs, needs, tokens, call, rows, pair_losses, own)
        with torch.autocast(hidden.device.type, enabled=False):
            losses = tokens.in_callers_order(torch.cat(list(run.losses())))
        gradients, values = run.gradients(), run.in_callers_order()
        ctx.gradients, ctx.edge = gradients, edge_of(*inputs)
        loss = (losses.double() if wide == torch.float64 or hidden.device.type != "mps" else losses).mean().to(wide)
        ctx.set_materialize_grads(False)
        return loss, losses, values[0], values[1:]

    @staticmethod
    def backward(ctx, d_loss, *others):
        if any(d is not None for d in others):
            raise RuntimeError(
                "linear_preference_loss: a gradient by way of log-probs, statistics or losses of single pairs. Where "
                "the head trains, `loss` alone has one: name the term as a loss, as in loss=['sigmoid', 'sft'], put a "
                "function of pairs there, or compose linear_token_logps and preference_loss"
            )
        if ctx.gradients is None:
            raise RuntimeError(
                "linear_preference_loss: a second backward. Its gradients are computed in the forward and handed over "
                "by the first backward; call the function again, or compose linear_token_logps and preference_loss"
            )
        gradients, ctx.gradients = ctx.gradients, None
        handed = [
            None if d is None else without_derivative(_OP, _scaled(d, d_loss.detach(), dtype), ctx.edge)
            for d, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *handed, None, None, None, None, None


def _scaled(d: Tensor, d_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """d x d_loss in `dtype`; d is not needed any more."""
    if free_to_look(d_loss):
        return (d if d_loss == 1 else d.mul_(d_loss)).to(dtype)
    # One pass: multiplied in fp32 and rounded once, where an accelerator needs no copy for that as a CPU does
    return torch.mul(d, d_loss, out=d if dtype == d.dtype else torch.empty_like(d, dtype=dtype))


class OwnLeaves(torch.autograd.Function):
    """(loss, gradients, *leaves) -> loss: adds d loss / d leaf of what a loss function brought along, a learned beta.

    `PairwiseLossFunction` differentiates the losses in its forward, and finds such leaves only there.
    """

    @staticmethod
    def forward(ctx, loss, gradients, *leaves):
        ctx.gradients, ctx.leaves = gradients, leaves
        return loss.clone()

    @staticmethod
    def backward(ctx, d_loss):
        own = (without_derivative(_OP, d * d_loss.detach().to(d.dtype), *ctx.leaves) for d in ctx.gradients)
        return d_loss, None, *own


def leaves_of(result: Tensor) -> list[Tensor]:
    """The leaves of the graph of `result`, each once: what a backward from it would add a `.grad` to."""
    found, seen, ahead = {}, set(), [result.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # AccumulateGrad's
        if leaf is not None:
            found[id(leaf)] = leaf
        ahead += [parent for parent, _ in node.next_functions]
    return list(found.values())


_BIAS = 2


class _Total:
    """(V, K): the gradient of a factor's right side, or (V, 1) of the bias, which chunks are added to. The first is
    written over whatever the memory holds."""

    def __init__(self, memory: Tensor):
        self.sum, self.begun = memory, False

    def add(self, tile: Tile, left: Tensor, coefficient: Tensor) -> None:
        tile.add_d_right(left, coefficient, self.sum, accumulate=self.begun)
        self.begun = True

    def add_scaled(self, other: "_Total", scale: Tensor) -> None:
        if other.begun:
            self.sum.addcmul_(other.sum, scale) if self.begun else torch.mul(other.sum, scale, out=self.sum)
            self.begun = True

    def finish(self) -> Tensor:
        return self.sum if self.begun else self.sum.zero_()


class _Run:
    """One forward pass: the buffers that its chunks share. Token values are sorted as `Tokens` are, gradients of left
    sides are in the caller's order."""

    def __init__(
        self, head: Head, needs: list[bool], tokens: Tokens, call: Call, rows: int, pair_losses: PairLosses, own: dict
    ):
        self.tokens, self.call, self.rows, self.pair_losses = tokens, call, rows, pair_losses
        self.own = own  # leaf -> gradient
        self.like = head.hidden.new_empty(0, dtype=torch.promote_types(head.hidden.dtype, torch.float32))
        self.names = ("logps", *call.outputs)
        self.values = self.like.new_empty((len(self.names), len(tokens.ranks)))
        # By factor; the bias is a right side of one column
        lefts, rights = {0: head.hidden, 1: head.down}, {0: head.weight, 1: head.up, _BIAS: head.bias}
        of_lefts, of_rights = {0: needs[0], 1: needs[3]}, {0: needs[1], 1: needs[4], _BIAS: needs[2]}
        self.d_lefts = {k: self.like.new_zeros(x.shape) for k, x in lefts.items() if x is not None and of_lefts[k]}
        self.rights = {k: x for k, x in rights.items() if x is not None and of_rights[k]}
        self.totals = self.new_totals()
        self.chunks = list(chunks_of_groups(tokens.sizes, rows))
        most, V = min(rows, max(part.stop - part.start for _, part in self.chunks)), len(head.weight)
        self.tile = implementation(call.impl).Tile(call, head, tokens.labels, most, V)
        self.ones = self.like.new_ones((most, 1))
        self.share = self.like.new_full((), 1 / len(tokens.comparisons.index))

    def new_totals(self) -> dict[int, _Total]:
        return {k: _Total(self.like.new_empty((len(x), x[0].numel()))) for k, x in self.rights.items()}

    def gradients(self) -> list[Tensor | None]:
        """Of hidden, weight, bias, down, up."""
        found = {k: total.finish().view(self.rights[k].shape) for k, total in self.totals.items()}
        return [self.d_lefts.get(0), found.get(0), found.get(_BIAS), self.d_lefts.get(1), found.get(1)]

    def in_callers_order(self) -> Tensor:
        """(1 + k, N) token log-probs and statistics."""
        if self.tokens.order is None:
            return self.values
        values = self.values.new_zeros((len(self.values), len(self.tokens.labels)))
        values[:, self.tokens.order] = self.values
        return values

    def losses(self) -> Iterator[Tensor]:
        """Of the comparisons, by group."""
        for groups, part in self.chunks:
            compared = self.tokens.compared(groups)
            if not compared.places.shape[1]:  # nothing compares them: they are scored
                self.score_alone(part)
            elif part.stop - part.start > self.rows:
                yield self.long_pair(groups.start, compared, part)
            else:
                yield self.chunk(compared, part)

    def index(self, part: slice) -> "Tensor | slice":
        return part if self.tokens.order is None else self.tokens.order[part]

    def weights(self, part: slice) -> Tensor | None:
        return None if self.tokens.weights is None else self.tokens.weights[part]

    def score(self, part: slice) -> None:
        """Fill the tile with some tokens and note their values."""
        self.tile.fold(self.index(part), dict(zip(self.names, self.values[:, part].unbind(0), strict=True)))

    def score_alone(self, part: slice) -> None:
        for first in range(part.start, part.stop, self.rows):
            self.score(slice(first, min(first + self.rows, part.stop)))

    def losses_and_slopes(self, compared: Compared, part: slice) -> tuple[Tensor, Tensor]:
        """Losses (c,), and d mean loss / d sequence log-prob (S,) by rank, 0 for sequences of other chunks."""
        comparisons, ranks = self.tokens.comparisons, self.tokens.ranks[part]
        values = dict(zip(self.names, self.values[:, part].unbind(0), strict=True))
        sums = sequence_sums(values["logps"], ranks, comparisons.num_sequences, self.weights(part), self.call.impl)
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            losses = self.pair_losses(leaf, values, ranks, self.index(part), compared)
            if not losses.requires_grad:
                raise RuntimeError("linear_preference_loss: the loss does not depend on pairs.chosen or pairs.rejected")
            own = [x for x in leaves_of(losses) if x is not leaf]
            # What `own` has a graph in common with, the next chunk needs, too
            slopes, *theirs = torch.autograd.grad(
                losses,
                [leaf, *own],
                self.share.to(losses.dtype).expand_as(losses),
                allow_unused=True,
                retain_graph=bool(own),
                materialize_grads=True,
            )
        for x, d in zip(own, theirs, strict=True):
            self.own[x] = self.own[x] + d if x in self.own else d
        return losses.detach(), slopes

    def chunk(self, compared: Compared, part: slice) -> Tensor:
        """Whole groups that fit the tile."""
        if part.start == part.stop:
            return self.losses_and_slopes(compared, part)[0]
        self.score(part)
        losses, slopes = self.losses_and_slopes(compared, part)
        # A pair beyond a hinge's margin owes nothing; looking is free on CPU only
        if self.tile.on_host and not slopes.any():
            return losses
        coefficient, weights = slopes[self.tokens.ranks[part]], self.weights(part)
        self.add_gradients(coefficient if weights is None else coefficient * weights, self.totals)
        return losses

    def add_gradients(self, coefficient: Tensor, totals: dict[int, _Total]) -> None:
        """Of the tokens in the tile, for coefficients (n,)."""
        coefficient = self.tile.scored(coefficient)
        for k, (left, _) in enumerate(self.tile.chunk):
            if k in self.d_lefts:
                self.tile.put_d_left(k, coefficient, self.d_lefts[k])
            if k in totals:
                totals[k].add(self.tile, left, coefficient)
        if _BIAS in totals:
            totals[_BIAS].add(self.tile, self.ones[: len(coefficient)], coefficient)

    def long_pair(self, group: int, compared: Compared, part: slice) -> Tensor:
        """One pair over several tiles: unit coefficients first, g at its end."""
        start, of_sequences = part.start, []
        for size in self.tokens.sizes[group]:
            of_sequences.append(self.new_totals())
            for first in range(start, start + size, self.rows):
                some = slice(first, min(first + self.rows, start + size))
                self.score(some)
                unit, weights = self.ones[: some.stop - some.start, 0], self.weights(some)
                self.add_gradients(unit if weights is None else unit * weights, of_sequences[-1])
            start += size
        losses, slopes = self.losses_and_slopes(compared, part)
        index, slope_of_token = self.index(part), slopes[self.tokens.ranks[part]].unsqueeze(1)
        for d_left in self.d_lefts.values():
            if isinstance(index, slice):
                d_left[index].mul_(slope_of_token)
            else:
                d_left[index] = d_left[index] * slope_of_token
        first = self.tokens.groups.sequence_ends[group]
        for slope, totals in zip(slopes[first : first + len(of_sequences)], of_sequences, strict=True):
            for k, total in self.totals.items():
                total.add_scaled(totals[k], slope)
        return losses
