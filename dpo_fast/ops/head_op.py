"""The registered ops of level 2, by plan (plan.py). No (N, V) tensor exists in any.

score      one GEMM a tile, nothing kept
frozen     the forward keeps d logp / d hidden, (N, H); the backward scales its rows
recompute  the forward keeps two floats a token; the backward rebuilds the logits, vocabulary slice by slice
"""

import os

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .call import Call, Head, Transform
from .checks import refuse_statistics, without_derivative
from .gemm import (
    aligned,
    blocks_of_columns,
    column_of,
    fp16_lift,
    fp16_weighted,
    gemm_operand,
    logits_buffer,
    logits_into,
    logits_view,
    mm_into,
    times_right,
)
from .tile import Factors, make_tile, scored_rows, usable_labels


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
    results = _empty_results(hidden, down, call)
    logps, partition, extras, *directions = (x.zero_() for x in results)
    rows = scored_rows(labels, call.ignore_index)
    N = hidden.shape[0] if rows is None else rows.numel()
    if N == 0:
        return results
    sizes = call.sizes(weight, N)
    with torch.autocast(hidden.device.type, enabled=False):
        if (
            down is None
            and call.plan == "score"
            and call.impl == "triton"
            and os.environ.get("DPO_FAST_FUSED_SCORE") == "1"
        ):
            _score_without_tile(Factors(head, call.gemm_dtype).rows(slice(None))[0], bias, labels, call, results)
            return results
        tile = make_tile(call, head, min(N, sizes.chunk_rows), sizes.chunk_columns)
        for start in range(0, N, sizes.chunk_rows):
            part = slice(start, min(start + sizes.chunk_rows, N))
            index = part if rows is None else rows[part]
            out = tile.fold(index, labels, gradient=call.plan == "frozen")
            logps[index] = out["logps"]
            partition[0, index], partition[1, index] = out["row_max"], out["log_sum"]
            for k, name in enumerate(call.outputs):
                extras[k, index] = out[name]
            if call.plan == "frozen":
                coefficient = tile.scored(torch.ones_like(out["logps"]))
                for k in range(len(tile.chunk)):
                    directions[k][index] = tile.d_left(k, coefficient)
    return results


def _score_without_tile(factor, bias, labels, call: Call, results) -> None:
    """One kernel, GEMM and softmax together. Opt-in until it is measured: cuBLAS may be faster for wide models, and
    its sums are grouped differently from those of the other plans, which policy and reference should share."""
    from dpo_fast.kernels.linear_score import linear_score_fwd

    hidden, weight = factor
    logps, partition, extras, *_ = results
    out = {"logps": logps, "row_max": partition[0], "log_sum": partition[1]}
    out.update(zip(call.outputs, extras.unbind(0), strict=True))
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.stride(-1) != 1:
            raise ValueError(f"DPO_FAST_FUSED_SCORE=1 needs {name} with contiguous columns, got strides {x.stride()}")
    bias = None if bias is None else bias.contiguous()
    knobs = dict(ignore_index=call.ignore_index, **call.transform.knobs)
    linear_score_fwd(hidden, weight, labels.contiguous(), bias, out, **knobs)


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
    results = tuple(x.zero_() for x in _empty_gradients(head, needs))
    rows, transform = scored_rows(labels, call.ignore_index), call.transform
    with torch.autocast(hidden.device.type, enabled=False):
        factors = Factors(head, call.gemm_dtype)
        if rows is not None:
            factors.lefts = [left[rows] for left in factors.lefts]
            labels, partition, d_logps = labels[rows], partition[:, rows], d_logps[rows]
        N, V = labels.numel(), weight.shape[0]
        if N == 0:
            return results
        _, ignored, _ = usable_labels(labels, call.ignore_index, V)
        chunk = factors.rows(slice(None), ignored)
        wide, operand = partition.dtype, gemm_operand(chunk[0][0][:0]).dtype
        coefficient = d_logps.to(wide).masked_fill(labels == call.ignore_index, 0)
        inside, d_left_scale, d_right_scale = coefficient, None, None  # what D is multiplied by, and what its products
        weighted = [gemm_operand(left).to(operand) for left, _ in chunk]
        if operand == torch.float16:
            lift = fp16_lift(transform)
            inside, d_left_scale = torch.full_like(coefficient, lift), coefficient.unsqueeze(1) / lift
            weighted, largest = zip(*(fp16_weighted(left, coefficient.unsqueeze(1)) for left, _ in chunk), strict=True)
            d_right_scale = largest[0] / lift
        in_place = [rows is None and result.dtype == wide for result in results]
        d_lefts = [
            None if not needs[k] else results[k] if in_place[k] else left.new_zeros(left.shape, dtype=wide)
            for k, left in zip((0, 3), factors.lefts, strict=False)
        ]
        step = call.sizes(weight, N, "torch").slice_columns
        buffer = logits_buffer(N, step, partition)
        d_buffer = None if operand == wide else aligned(N, step, operand, hidden.device)
        for start in range(0, V, step):
            part = slice(start, min(start + step, V))
            rights = [(left, right[part]) for left, right in chunk]
            tile = logits_into(logits_view(buffer, N, part.stop - start), rights, None if bias is None else bias[part])
            d = _slice_direction_(tile, labels.long() - start, partition, inside, transform)
            if d_buffer is not None:
                d = d_buffer[:, : part.stop - start].copy_(tile)
            for k, (_, right) in enumerate(rights):
                if needs[0 if k == 0 else 3]:
                    times_right(d, right, d_lefts[k], accumulate=True)
                if needs[1 if k == 0 else 4]:
                    target = results[1 if k == 0 else 4][part]
                    product = target if target.dtype == wide else torch.empty_like(target, dtype=wide)
                    mm_into(product, d.T, weighted[k])
                    if d_right_scale is not None:
                        product.mul_(d_right_scale)
                    if product is not target:
                        target.copy_(product)
            if needs[2]:
                d_bias = tile.sum(0) if d_left_scale is None else d_left_scale.T @ tile
                results[2][part] = d_bias.view(-1).to(results[2].dtype)
    for k, d_left in zip((0, 3), d_lefts, strict=False):
        if needs[k]:
            d_left = d_left if d_left_scale is None else d_left.mul_(d_left_scale)
            if not in_place[k]:
                results[k][slice(None) if rows is None else rows] = d_left.to(results[k].dtype)
    return results


def _slice_direction_(tile, local_labels, partition, coefficient, transform: Transform) -> Tensor:
    """Turn raw logits (N, V') of a slice into diag(c) D in place; labels count from the slice's first column."""
    row_max, log_sum = partition.unsqueeze(2)
    log_sum = log_sum.masked_fill(log_sum == -torch.inf, 0)
    scale = coefficient.unsqueeze(1) * -transform.slope
    for start, z in blocks_of_columns(tile, copied=transform.softcap is not None):
        t = transform.apply_(z)
        z.sub_(row_max).sub_(log_sum).exp_()
        here, inside = column_of(local_labels.unsqueeze(1) - start, z.shape[1])
        z.scatter_add_(1, here, -inside.to(z.dtype))
        z.mul_(scale)
        if t is not None:
            z.addcmul_(z, t.square_(), value=-1)
    return tile


@torch.library.custom_op("dpo_fast::linear_token_logps_scale", mutates_args=())
def _scale_rows(direction: Tensor, d_logps: Tensor) -> Tensor:
    """An op, so that a gradient of this gradient raises: autograd does not see that `direction` depends on hidden."""
    return direction * d_logps.unsqueeze(1)


@_scale_rows.register_fake
def _(direction, d_logps):
    return torch.empty_like(direction)


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
                gradient = _scale_rows(direction, d_logps).to(dtype)
                gradients[k] = without_derivative("linear_token_logps", gradient, edge)
    elif ctx.plan == "recompute":
        *tensors, partition = ctx.saved_tensors
        found = _recompute(*tensors, partition, d_logps.contiguous(), needs, *ctx.call)
        found = [without_derivative("linear_token_logps", d, *tensors) for d in found]
        gradients[:5] = [d if need else None for d, need in zip(found, needs, strict=True)]
    return tuple(gradients)


head_forward.register_autograd(_differentiate, setup_context=_save)


# A counter sees a registered op as one piece. What it holds is counted in tests/test_ops_linear.py.


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
