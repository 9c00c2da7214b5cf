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
from .tile import scored_rows

_OP = "linear_preference_loss"


@dataclass(frozen=True)
class Tokens:
    """N tokens and where they belong, sorted by group and within a group by sequence.

    order: (N,) int64 positions in the caller's order, or None where that is sorted already.
    sizes: host-side token counts, of each group's sequences.
    """

    labels: Tensor  # (N,) int64, in the caller's order as everything else here
    ranks: Tensor  # (N,) int64, of their sequences
    weights: Tensor | None  # (N,) fp32 token weights: sequence log-prob = sum of weight x token log-prob
    order: Tensor | None
    sizes: tuple[tuple[int, ...], ...]
    groups: Groups
    comparisons: Comparisons

    def compared(self, groups: slice) -> tuple[Tensor, Compared]:
        """(c,) the comparisons of some groups, and their sequences' places among these groups'."""
        ends = self.groups.comparison_ends
        which = self.groups.order[ends[groups.start] : ends[groups.stop]]
        sequences = self.comparisons.index[which].t()
        return which, Compared(sequences, self.groups.rank[sequences] - self.groups.sequence_ends[groups.start])


# (sequence log-probs (s,), token values by name (n,), local sequence ids (n,), token index, compared) -> losses (c,)
PairLosses = Callable[[Tensor, dict[str, Tensor], Tensor, "Tensor | slice", Compared], Tensor]


def group_tokens(
    labels: Tensor,
    scored: Tensor,
    sequence_ids: Tensor,
    comparisons: Comparisons,
    weights: Tensor | None,
    lengths: Sequence[int] | None = None,
) -> Tokens:
    """Sort the `scored` tokens, (N,) bool, by group. Counting them reads the ids on the host: free on CPU, one
    synchronisation elsewhere, none where `lengths`, the token count of each of the S sequences (ignored tokens
    included), is given."""
    groups = comparisons.groups()
    ranks = key = groups.rank[sequence_ids]
    rows = scored_rows(scored)
    if rows is not None:
        key = key[rows]
    if lengths is not None and rows is None:
        counts = [lengths[s] for s in groups.sequences]
    else:
        counts = torch.bincount(key, minlength=comparisons.num_sequences).tolist()
    sizes = tuple(tuple(counts[a:b]) for a, b in itertools.pairwise(groups.sequence_ends))
    in_order = free_to_look(key) and bool((key.diff() >= 0).all())
    order = rows if in_order else key.argsort(stable=True) if rows is None else rows[key.argsort(stable=True)]
    return Tokens(labels, ranks, weights, order, sizes, groups, comparisons)


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
        N, C = hidden.shape[0], len(tokens.comparisons.index)
        inputs = Head(hidden, weight, bias, down, up)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        gradients = [
            torch.zeros(x.shape, dtype=wide, device=x.device) if need and x is not None else None
            for x, need in zip(inputs, ctx.needs_input_grad[:5], strict=True)
        ]
        values = hidden.new_zeros((1 + len(call.outputs), N), dtype=wide)
        run = _Run(inputs, gradients, tokens, call, rows, pair_losses, values, own)
        losses = hidden.new_zeros((C,), dtype=wide)
        with torch.autocast(hidden.device.type, enabled=False):
            for groups, part in run.chunks:
                which, compared = tokens.compared(groups)
                if not len(which):  # nothing compares them: they are scored
                    run.score_alone(part)
                    continue
                long = part.stop - part.start > rows
                losses[which] = (run.long_pair if long else run.chunk)(groups, compared, part)
        ctx.gradients, ctx.edge = gradients, edge_of(*inputs)
        loss = (losses.double() if wide == torch.float64 or hidden.device.type != "mps" else losses).mean().to(wide)
        ctx.set_materialize_grads(False)
        return loss, losses, run.values[0], run.values[1:]

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
        d_loss = d_loss.detach()
        scaled = not free_to_look(d_loss) or d_loss != 1  # looking is free on CPU only
        handed = [
            None if d is None else without_derivative(_OP, (d.mul_(d_loss) if scaled else d).to(dtype), ctx.edge)
            for d, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *handed, None, None, None, None, None


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


class _Run:
    """One forward pass: the buffers that its chunks share."""

    def __init__(
        self, head: Head, gradients, tokens: Tokens, call: Call, rows: int, pair_losses: PairLosses, values, own: dict
    ):
        self.tokens, self.call, self.rows, self.pair_losses, self.values = tokens, call, rows, pair_losses, values
        self.own = own  # leaf -> gradient
        d_hidden, d_weight, self.d_bias, d_down, d_up = gradients
        self.d_lefts, self.d_rights = [d_hidden, d_down], [d_weight, d_up]
        self.chunks = list(chunks_of_groups(tokens.sizes, rows))
        most = min(rows, max(part.stop - part.start for _, part in self.chunks))
        self.tile = implementation(call.impl).Tile(call, head, most, head.weight.shape[0])

    def index(self, part: slice) -> "Tensor | slice":
        return part if self.tokens.order is None else self.tokens.order[part]

    def score(self, index) -> None:
        """Fill the tile with the tokens at `index` and note their values."""
        out = self.tile.fold(index, self.tokens.labels)
        for row, name in enumerate(("logps", *self.call.outputs)):
            self.values[row, index] = out[name]

    def score_alone(self, part: slice) -> None:
        for first in range(part.start, part.stop, self.rows):
            self.score(self.index(slice(first, min(first + self.rows, part.stop))))

    def losses_and_slopes(
        self, groups: slice, compared: Compared, index
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Losses (c,), d mean loss / d sequence log-prob (s,), the tokens' local sequence ids and weights (n,)."""
        ends = self.tokens.groups.sequence_ends
        local = self.tokens.ranks[index] - ends[groups.start]
        values = dict(zip(("logps", *self.call.outputs), self.values[:, index].unbind(0), strict=True))
        weights = None if self.tokens.weights is None else self.tokens.weights[index]
        sums = sequence_sums(values["logps"], local, ends[groups.stop] - ends[groups.start], weights, self.call.impl)
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            losses = self.pair_losses(leaf, values, local, index, compared)
            if not losses.requires_grad:
                raise RuntimeError("linear_preference_loss: the loss does not depend on pairs.chosen or pairs.rejected")
            own = [x for x in leaves_of(losses) if x is not leaf]
            # What `own` has a graph in common with, the next chunk needs, too
            slopes, *theirs = torch.autograd.grad(
                losses.sum() / len(self.tokens.comparisons.index),
                [leaf, *own],
                allow_unused=True,
                retain_graph=bool(own),
                materialize_grads=True,
            )
        for x, d in zip(own, theirs, strict=True):
            self.own[x] = self.own[x] + d if x in self.own else d
        return losses.detach(), slopes, local, weights

    def chunk(self, groups: slice, compared: Compared, part: slice) -> Tensor:
        """Whole groups that fit the tile."""
        index = self.index(part)
        if part.start == part.stop:
            return self.losses_and_slopes(groups, compared, index)[0]
        self.score(index)
        losses, slopes, local, weights = self.losses_and_slopes(groups, compared, index)
        # A pair beyond a hinge's margin owes nothing; looking is free on CPU only
        if self.tile.on_host and not slopes.any():
            return losses
        coefficient = slopes[local] if weights is None else slopes[local] * weights
        self.add_gradients(index, coefficient, self.d_rights, self.d_bias)
        return losses

    def add_gradients(self, index, coefficient: Tensor, d_rights, d_bias) -> None:
        coefficient = self.tile.scored(coefficient)
        for k, (left, _) in enumerate(self.tile.chunk):
            if self.d_lefts[k] is not None:
                self.d_lefts[k][index] = self.tile.d_left(k, coefficient)
            if d_rights[k] is not None:
                self.tile.add_d_right(left, coefficient, d_rights[k])
        if d_bias is not None:
            self.tile.add_d_right(coefficient.new_ones(coefficient.shape), coefficient, d_bias.unsqueeze(1))

    def long_pair(self, groups: slice, compared: Compared, part: slice) -> Tensor:
        """One pair over several tiles: unit coefficients first, g at its end."""
        rows, start, totals = self.rows, part.start, []
        for size in self.tokens.sizes[groups.start]:
            d_rights = [None if d is None else torch.zeros_like(d) for d in self.d_rights]
            d_bias = None if self.d_bias is None else torch.zeros_like(self.d_bias)
            for first in range(start, start + size, rows):
                index = self.index(slice(first, min(first + rows, start + size)))
                self.score(index)
                weights = self.tokens.weights
                unit = torch.ones_like(self.values[0, index])
                unit = unit if weights is None else unit * weights[index]  # in fp64 for fp64 tensors
                self.add_gradients(index, unit, d_rights, d_bias)
            totals.append([*d_rights, d_bias])
            start += size
        index = self.index(part)
        losses, slopes, local, _ = self.losses_and_slopes(groups, compared, index)
        for d_left in self.d_lefts:
            if d_left is not None:
                d_left[index] = d_left[index] * slopes[local].unsqueeze(1)
        for sequence, parts in enumerate(totals):
            for total, d in zip([*self.d_rights, self.d_bias], parts, strict=True):
                if d is not None:
                    total.addcmul_(d, slopes[sequence])
        return losses
