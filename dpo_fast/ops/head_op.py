"""The registered ops of level 2, by plan (plan.py). No (N, V) tensor exists in any.

score      one GEMM per tile, nothing kept
frozen     the forward keeps d logp / d hidden, (N, H); the backward scales its rows
recompute  the forward keeps two floats per token; the backward rebuilds the logits, vocabulary slice by slice
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import liger
from .call import Call, Head
from .checks import refuse_statistics, without_derivative
from .dispatch import implementation
from .gemm import fp16_lift, fp16_weighted, mm_into, times_right
from .tile import Known, scored_rows


@torch.library.custom_op("dpo_fast::linear_token_logps_fwd", mutates_args=())
def head_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    floats: list[float],
    ints: list[int],
    text: str,
    edge: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logps (N,), [row_max, log_sum] (2, N), statistics (k, N), and the directions d logp / d hidden and d logp /
    d down where the plan is `frozen`, else empty. floats, ints, text: a `Call`, flat. edge: `edge_of` what `frozen`
    does not keep."""
    call, head = Call.unflat(floats, ints, text), Head(hidden, weight, bias, down, up)
    head.check_values("linear_token_logps", labels, call.ignore_index)
    rows = scored_rows(labels != call.ignore_index)
    N = hidden.shape[0] if rows is None else rows.numel()
    results = _empty_results(hidden, down, call)
    if N < hidden.shape[0]:
        for x in results:
            x.zero_()
    if N == 0:
        return results
    logps, partition, extras, *directions = results
    values = dict(zip(("logps", "row_max", "log_sum", *call.outputs), (logps, *partition, *extras), strict=True))
    found = values if rows is None else {name: x.new_empty(N) for name, x in values.items()}
    sizes = call.sizes(weight, N, hidden_grad=call.plan == "frozen")
    with torch.autocast(hidden.device.type, enabled=False):
        if call.plan == "score" and liger.asked():
            logps.copy_(liger.score("linear_token_logps", call, head, labels))
            partition.zero_()
            return results
        tile = implementation(call.impl).Tile(call, head, labels, min(N, sizes.chunk_rows), sizes.chunk_columns)
        ones = logps.new_ones(tile.sizes[0]) if call.plan == "frozen" else None
        for start in range(0, N, sizes.chunk_rows):
            part = slice(start, min(start + sizes.chunk_rows, N))
            out = {name: x[part] for name, x in found.items()}
            tile.fold(part if rows is None else rows[part], out, gradient=ones is not None)
            if ones is not None:
                coefficient = tile.scored(ones[: part.stop - part.start])
                for k in range(len(tile.chunk)):
                    tile.put_d_left(k, coefficient, directions[k])
    if rows is not None:
        for name, x in values.items():
            x[rows] = found[name]
    return results


def _empty_results(hidden, down, call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    keep = call.plan == "frozen"
    return (
        hidden.new_empty((N,), dtype=dtype),
        hidden.new_empty((2, N), dtype=dtype),
        hidden.new_empty((len(call.outputs), N), dtype=dtype),
        # In fp32: rounded here and again when scaled, a 16-bit direction would err more than eager does
        hidden.new_empty(hidden.shape if keep else (0,), dtype=dtype),
        hidden.new_empty((0,) if down is None or not keep else down.shape, dtype=dtype),
    )


@head_forward.register_fake
def _(hidden, weight, bias, down, up, labels, floats, ints, text, *_):
    return _empty_results(hidden, down, Call.unflat(floats, ints, text))


@torch.library.custom_op("dpo_fast::linear_token_logps_bwd", mutates_args=())
def _recompute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    partition: Tensor,
    d_logps: Tensor,
    needs: list[bool],
    floats: list[float],
    ints: list[int],
    text: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias, down, up); those that `needs` does not ask for are empty.

    Vocabulary slice by slice, all tokens at once: a slice's d_weight is one GEMM with one rounding."""
    call, head = Call.unflat(floats, ints, text), Head(hidden, weight, bias, down, up)
    results = _empty_gradients(head, needs)
    rows = scored_rows(labels != call.ignore_index)
    index = slice(None) if rows is None else rows
    known, N, V, wide = Known(*partition[:, index]), len(labels[index]), weight.shape[0], partition.dtype
    if N < len(labels) or N == 0:
        for x in results:
            x.zero_()
    if N == 0:
        return results
    with torch.autocast(hidden.device.type, enabled=False):
        width = call.sizes(weight, N, hidden_grad=needs[0] or needs[3]).slice_columns
        tile = implementation(call.impl).Tile(call, head, labels, N, width)
        tile.take(index)
        coefficient = tile.scored(d_logps[index].to(wide))
        lift = fp16_lift(call.transform) if tile.operand == torch.float16 else None
        inside = coefficient if lift is None else torch.full_like(coefficient, lift)
        lefts = [_DLeft.of(results[k], rows, wide) if needs[k] else None for k in _LEFTS[: len(tile.chunk)]]
        rights = [
            _DRight(results[k], left, tile.operand, coefficient, lift) if needs[k] else None
            for k, (left, _) in zip(_RIGHTS, tile.chunk, strict=False)
        ]
        if needs[2] and lift is not None:  # else a sum, which is more exact than a product with ones
            rights.append(
                _DRight(results[2].unsqueeze(1), torch.ones_like(coefficient), tile.operand, coefficient, lift)
            )
        for start in range(0, V, width):
            part = slice(start, min(start + width, V))
            d = tile.open(part, known, inside)
            for d_left, (_, right) in zip(lefts, tile.chunk, strict=True):
                if d_left is not None:
                    times_right(d, right[part], d_left.total, accumulate=start > 0)
            for d_right in rights:
                if d_right is not None:
                    d_right.write(d, part)
            if needs[2] and lift is None:
                results[2][part] = d.sum(0, dtype=wide).to(results[2].dtype)
    for d_left in lefts:
        if d_left is not None:
            d_left.finish(None if lift is None else coefficient / lift)
    return results


# Where the sides of the head's factors are in a `Head`
_LEFTS, _RIGHTS = (0, 3), (1, 4)


class _DLeft(NamedTuple):
    """The gradient of a factor's left side, summed over slices in fp32: in its place where that is possible. The first
    slice is written, the others are added."""

    result: Tensor  # (N, K)
    rows: Tensor | None  # of it that are scored, None for all
    total: Tensor  # (n, K) fp32

    @classmethod
    def of(cls, result: Tensor, rows: Tensor | None, wide: torch.dtype) -> "_DLeft":
        if rows is None and result.dtype == wide:
            return cls(result, rows, result)
        return cls(result, rows, result.new_empty((len(result if rows is None else rows), result.shape[1]), dtype=wide))

    def finish(self, scale: Tensor | None) -> None:
        if scale is not None:
            self.total.mul_(scale)
        if self.rows is not None:
            self.result[self.rows] = self.total.to(self.result.dtype)
        elif self.total is not self.result:
            self.result.copy_(self.total)


class _DRight:
    """The gradient of a factor's right side, slice by slice: each is one product, rounded once."""

    def __init__(self, result: Tensor, left: Tensor, operand: torch.dtype, coefficient: Tensor, lift: float | None):
        self.result, self.wide, self.scale = result, coefficient.dtype, None
        if lift is None:
            self.left = left.to(operand)
        else:
            self.left, largest = fp16_weighted(left, coefficient)
            self.scale = largest / lift

    def write(self, d: Tensor, part: slice) -> None:
        target = self.result[part]
        product = target if target.dtype == self.wide else torch.empty_like(target, dtype=self.wide)
        mm_into(product, d.T, self.left)
        if self.scale is not None:
            product.mul_(self.scale)
        if product is not target:
            target.copy_(product)


@torch.library.custom_op("dpo_fast::linear_token_logps_scale", mutates_args=())
def _scale_rows(direction: Tensor, d_logps: Tensor, dtype: torch.dtype) -> Tensor:
    """In one pass, rounded once to `dtype`. An op, so that a gradient of this gradient raises: autograd does not see
    that `direction` depends on hidden."""
    return torch.mul(direction, d_logps.unsqueeze(1), out=torch.empty_like(direction, dtype=dtype))


@_scale_rows.register_fake
def _(direction, d_logps, dtype):
    return torch.empty_like(direction, dtype=dtype)


def _empty_gradients(inputs, needs):
    hidden = inputs[0]
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else hidden.new_empty((0,))
        for x, need in zip(inputs, needs, strict=True)
    )


@_recompute.register_fake
def _(hidden, weight, bias, down, up, labels, partition, d_logps, needs, *_):
    return _empty_gradients((hidden, weight, bias, down, up), needs)


def _save(ctx, inputs, output):
    *tensors, floats, ints, text, edge = inputs
    ctx.call, ctx.plan = (floats, ints, text), Call.unflat(floats, ints, text).plan
    _, partition, _, d_hidden, d_down = output
    ctx.mark_non_differentiable(partition, d_hidden, d_down)
    ctx.set_materialize_grads(False)
    if ctx.plan == "frozen":  # hidden is not kept
        ctx.save_for_backward(d_hidden, d_down, edge)
        ctx.dtypes = (tensors[0].dtype, tensors[0].dtype if tensors[3] is None else tensors[3].dtype)
    elif ctx.plan == "recompute":
        ctx.save_for_backward(*tensors, partition)


def _differentiate(ctx, d_logps, _d_partition, d_stats, *_):
    gradients = [None] * 10
    d_logps = refuse_statistics("linear_token_stats", d_stats, d_logps)
    if d_logps is None:
        return tuple(gradients)
    needs = list(ctx.needs_input_grad[:5])
    if ctx.plan == "frozen":
        *directions, edge = ctx.saved_tensors
        for k, direction, dtype in zip((0, 3), directions, ctx.dtypes, strict=True):
            if needs[k]:
                gradient = _scale_rows(direction, d_logps, dtype)
                gradients[k] = without_derivative("linear_token_logps", gradient, edge)
    elif ctx.plan == "recompute":
        *tensors, partition = ctx.saved_tensors
        found = _recompute(*tensors, partition, d_logps.contiguous(), needs, *ctx.call)
        found = [without_derivative("linear_token_logps", d, *tensors) for d in found]
        gradients[:5] = [d if need else None for d, need in zip(found, needs, strict=True)]
    return tuple(gradients)


head_forward.register_autograd(_differentiate, setup_context=_save)


# A counter sees a registered op as one piece. What it holds is counted in tests/ops/test_linear.py.


def _gemm_flops(hidden, weight, down, gemms: float) -> int:
    (N, H), V = hidden, weight[0]
    return int(gemms * 2 * N * V * (H + (down[1] if down is not None else 0)))


@register_flop_formula(torch.ops.dpo_fast.linear_token_logps_fwd)
def _(hidden, weight, bias, down, up, labels, floats, ints, text, *_, **__) -> int:
    return _gemm_flops(hidden, weight, down, 2 if Call.unflat(floats, ints, text).plan == "frozen" else 1)


@register_flop_formula(torch.ops.dpo_fast.linear_token_logps_bwd)
def _(hidden, weight, bias, down, up, labels, partition, d_logps, needs, *_, **__) -> int:
    return _gemm_flops(hidden, weight, None, 1 + needs[0] + needs[1]) + (
        0 if down is None else _gemm_flops((hidden[0], 0), weight, down, 1 + needs[3] + needs[4])
    )
