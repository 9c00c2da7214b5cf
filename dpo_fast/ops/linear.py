"""Level 2: token log-probs from hidden states and the head. No (N, V) tensor exists, whatever the plan (plan.py).

score      one GEMM a tile, nothing kept
frozen     the forward keeps d logp / d hidden, (N, H); the backward scales its rows
recompute  the forward keeps two floats a token; the backward rebuilds the logits, vocabulary slice by slice
"""

import numbers
import os

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .checks import (
    FLOATS,
    INTEGERS,
    check_finite,
    check_ignore_index,
    check_labels,
    check_tensor,
    check_transform,
    checking,
    edge_of,
    refuse_statistics,
    without_derivative,
)
from .dispatch import choose_impl, device_memory, free_to_look, plan_device
from .head import (
    aligned,
    blocks_of_columns,
    column_of,
    fp16_lift,
    fp16_weighted,
    gemm_operand,
    logits_buffer,
    logits_into,
    logits_view,
    make_tile,
    mm_into,
    times_right,
)
from .logits_torch import Transform
from .plan import HeadPlan, plan_head
from .reference import logits_token_stats_reference
from .stats import STATS, TokenStats, check_outputs


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    tile_mib: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Log-probability of each label under softmax(hidden weight^T + bias), with every gradient.

    hidden: (N, H), weight: (V, H), both of one floating dtype (under autocast they are taken in its dtype); bias: (V,);
    labels: (N,) int64 or int32, in [0, V) or `ignore_index`.
    low_rank: (down, up) of shapes (N, r), (V, r): adds down up^T to the logits. For a LoRA-adapted head, down is
      scaling * lora_A(hidden) and up is lora_B's weight; both get gradients. Where they are in fp32 and hidden is not,
      their product is, too (not under autocast).
    The logits x become `softcap tanh(x scale / softcap) / temperature`. tile_mib: the budget for the one tile of logits
    that exists at a time (MiB); None: DPO_FAST_TILE_MIB, or what suits the device, see `ops.plan.plan_head`.

    Returns (N,) fp32 in nats, exactly 0 where ignored. Differentiable in hidden, weight, bias, down and up; where the
    head does not train, a backward costs no GEMM (its work is done in the forward, see `frozen`).

    Raises TypeError for dtypes, ValueError for shapes, devices, an `impl` that cannot run, and labels out of range.
    """
    stats = _token_stats(
        "linear_token_logps",
        hidden,
        weight,
        labels,
        outputs=(),
        bias=bias,
        low_rank=low_rank,
        ignore_index=ignore_index,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        tile_mib=tile_mib,
        impl=impl,
    )
    return stats.logps


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    outputs=STATS,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    tile_mib: int | None = None,
    impl: str = "auto",
) -> TokenStats:
    """As `linear_token_logps`, and from the same tiles the statistics named in `outputs` (see `TokenStats`)."""
    return _token_stats(
        "linear_token_stats",
        hidden,
        weight,
        labels,
        outputs=outputs,
        bias=bias,
        low_rank=low_rank,
        ignore_index=ignore_index,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        tile_mib=tile_mib,
        impl=impl,
    )


def check_tile_mib(op: str, tile_mib: int | None) -> int | None:
    """The budget for a tile in MiB; DPO_FAST_TILE_MIB stands in for None where it is set."""
    source = "tile_mib"
    if tile_mib is None and os.environ.get("DPO_FAST_TILE_MIB"):
        source, tile_mib = "DPO_FAST_TILE_MIB", os.environ["DPO_FAST_TILE_MIB"]
        tile_mib = int(tile_mib) if tile_mib.isdecimal() else tile_mib
    if tile_mib is None:
        return None
    if not isinstance(tile_mib, numbers.Integral) or isinstance(tile_mib, bool) or tile_mib < 1:
        raise ValueError(f"{op}: {source} must be an int of at least 1 or None, got {tile_mib!r}")
    return int(tile_mib)


def check_head(op: str, hidden, weight, labels, bias, low_rank) -> None:
    """Shapes, dtypes and devices of level 2 and 3."""
    check_tensor(op, "hidden", hidden, ("N", "H"), FLOATS)
    N, H = hidden.shape
    check_tensor(op, "weight", weight, ("V", H), FLOATS, hidden.device)
    V = weight.shape[0]
    if V < 1 or H < 1:
        raise ValueError(f"{op}: weight must have shape (V, H) with V, H >= 1, got {tuple(weight.shape)}")
    check_tensor(op, "labels", labels, (N,), INTEGERS, hidden.device)
    if bias is not None:
        check_tensor(op, "bias", bias, (V,), FLOATS, hidden.device)
    if low_rank is not None:
        if not isinstance(low_rank, (tuple, list)) or len(low_rank) != 2:
            raise ValueError(f"{op}: low_rank must be a pair (down, up), got {_said(low_rank)}")
        check_tensor(op, "low_rank[0]", low_rank[0], (N, "r"), FLOATS, hidden.device)
        check_tensor(op, "low_rank[1]", low_rank[1], (V, low_rank[0].shape[1]), FLOATS, hidden.device)
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(f"{op}: hidden is {hidden.dtype}, weight is {weight.dtype}; cast one, or enable autocast")


def _said(value) -> str:
    return f"{len(value)} elements" if isinstance(value, (tuple, list)) else type(value).__name__


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """What the GEMMs take: autocast's dtype inside autocast, which leaves fp64 alone, else the dtype of hidden."""
    device = hidden.device.type
    cast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if cast else hidden.dtype


def _token_stats(
    op,
    hidden,
    weight,
    labels,
    *,
    outputs,
    bias,
    low_rank,
    ignore_index,
    logit_softcap,
    logit_scale,
    temperature,
    tile_mib,
    impl,
) -> TokenStats:
    outputs = check_outputs(op, outputs)
    check_head(op, hidden, weight, labels, bias, low_rank)
    tile_mib = check_tile_mib(op, tile_mib)
    logit_softcap, temperature, logit_scale = check_transform(op, logit_softcap, temperature, logit_scale)
    ignore_index = check_ignore_index(op, ignore_index)
    impl = choose_impl(op, impl, hidden.device, hidden.dtype)
    if impl == "reference":
        check_head_values(op, hidden, weight, bias, low_rank, labels, ignore_index)
        logits = reference_logits(hidden, weight, bias, low_rank)
        knobs = dict(logit_softcap=logit_softcap, temperature=temperature, logit_scale=logit_scale)
        stats = logits_token_stats_reference(logits, labels, ignore_index=ignore_index, **knobs)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        found = {name: getattr(stats, name) for name in ("logps", *outputs)}
        return TokenStats(**{k: v if v.dtype == torch.bool else v.to(dtype) for k, v in found.items()})

    down, up = low_rank or (None, None)
    grad = torch.is_grad_enabled()
    hidden_grad = grad and (hidden.requires_grad or (down is not None and down.requires_grad))
    head_grad = grad and any(x is not None and x.requires_grad for x in (weight, bias, up))
    plan = "recompute" if head_grad else "frozen" if hidden_grad else "score"
    dtype = str(compute_dtype(hidden)).removeprefix("torch.")
    logps, _, extras, *_ = _forward(
        hidden,
        weight,
        bias,
        down,
        up,
        labels,
        ignore_index,
        logit_softcap,
        logit_scale,
        temperature,
        " ".join(outputs),
        plan,
        tile_mib,
        dtype,
        impl,
        edge_of(hidden, down) if plan == "frozen" else None,
    )
    found = dict(zip(outputs, extras.unbind(0), strict=True))
    if "is_top1" in found:
        found["is_top1"] = found["is_top1"] != 0
    return TokenStats(logps=logps, **found)


def reference_logits(hidden, weight, bias, low_rank) -> Tensor:
    """(N, V) fp64, the oracle's."""
    logits = hidden.double() @ weight.double().T
    if low_rank is not None:
        logits = logits + low_rank[0].double() @ low_rank[1].double().T
    return logits if bias is None else logits + bias.double()


def check_head_values(op: str, hidden, weight, bias, low_rank, labels: Tensor, ignore_index: int) -> None:
    if free_to_look(labels) or checking():
        check_labels(op, labels, weight.shape[0], ignore_index)
    if checking():
        down, up = low_rank or (None, None)
        check_finite(op, **{"hidden": hidden, "weight": weight, "bias": bias, "low_rank[0]": down, "low_rank[1]": up})


def scored_rows(labels: Tensor, ignore_index: int) -> Tensor | None:
    """Indices of the tokens that are scored, None for all. On CPU, where counting them costs no sync, an ignored token
    costs nothing; elsewhere its row is computed from zeros (`Factors.rows`)."""
    if not free_to_look(labels) or not (labels == ignore_index).any():
        return None
    return (labels != ignore_index).nonzero().squeeze(1)


def usable_labels(labels: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Labels that are safe to use as addresses, and where they were ignored or out of range: None on CPU, where
    `scored_rows` and `check_labels` have left neither."""
    if free_to_look(labels):
        return labels.long().contiguous(), None, None
    return mask_labels(labels, ignore_index, vocab)


def mask_labels(labels: Tensor, ignore_index: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    ignored = labels == ignore_index
    invalid = ~ignored & ((labels < 0) | (labels >= vocab))
    return labels.long().clamp(0, vocab - 1).contiguous(), ignored, invalid


class Factors:
    """The head's factors in the dtypes of their GEMMs: (hidden, weight), and (down, up) for a low-rank update."""

    def __init__(self, hidden, weight, bias, down, up, dtype: torch.dtype):
        self.lefts = [hidden] if down is None else [hidden, down]
        self.dtypes = [dtype] if down is None else [dtype, _low_rank_dtype(hidden, down, up, dtype)]
        # One conversion of the whole head on an accelerator, as autocast itself does; on CPU 16-bit weights are
        # converted slice by slice (head.py), never as a whole.
        rights = [weight] if up is None else [weight, up]
        self.rights = [right.to(dtype) for right, dtype in zip(rights, self.dtypes, strict=True)]
        self.bias = bias

    def rows(self, index, ignored: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """The factors of some tokens, a slice or an index tensor; zeros where a token is `ignored`: its hidden state
        may hold anything, and 0 times infinity is NaN, in its own gradient and in all of the weight's."""
        lefts = [left[index].to(dtype) for left, dtype in zip(self.lefts, self.dtypes, strict=True)]
        if ignored is not None:
            lefts = [left.masked_fill(ignored.unsqueeze(1), 0) for left in lefts]
        return list(zip(lefts, self.rights, strict=True))


def _low_rank_dtype(hidden, down, up, dtype: torch.dtype) -> torch.dtype:
    """That of the product down up^T: autocast's where that was asked for, else the wider one of its factors, as PEFT
    keeps an adapter in fp32 on a 16-bit head. It has few columns, so fp32 costs little; it ends in fp32 anyway."""
    if dtype != hidden.dtype:
        return dtype
    wide = torch.promote_types(torch.promote_types(down.dtype, up.dtype), dtype)
    return torch.float32 if wide == torch.float64 and dtype != torch.float64 else wide


def _plan(N: int, weight, name: str, tile_mib: int | None, dtype: torch.dtype, device_type: str) -> HeadPlan:
    V, H = weight.shape
    return plan_head(
        N,
        H,
        V,
        dtype,
        hidden_grad=name != "score",
        head_grad=name == "recompute",
        separable=False,
        tile_mib=tile_mib,
        device_type=device_type,
        device_memory=device_memory(weight.device),
    )


@torch.library.custom_op("dpo_fast::linear_token_logps_fwd", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    softcap: float | None,
    scale: float,
    temperature: float,
    stats: str,
    plan: str,
    tile_mib: int | None,
    dtype: str,
    impl: str,
    edge: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> logps (N,), [row_max, log_sum] (2, N), statistics (len(stats), N), and the directions d logp / d hidden and
    d logp / d down where the plan is `frozen`, else empty. edge: `edge_of` what `frozen` does not keep."""
    low_rank = None if down is None else (down, up)
    check_head_values("linear_token_logps", hidden, weight, bias, low_rank, labels, ignore_index)
    results = _empty_results(hidden, down, stats, plan)
    logps, partition, extras, *directions = (x.zero_() for x in results)
    rows = scored_rows(labels, ignore_index)
    N = hidden.shape[0] if rows is None else rows.numel()
    if N == 0:
        return results
    transform, names = Transform(scale, softcap, temperature), stats.split()
    sizes = _plan(N, weight, plan, tile_mib, getattr(torch, dtype), plan_device(impl, hidden.device))
    tile = None
    with torch.autocast(hidden.device.type, enabled=False):
        factors = Factors(hidden, weight, bias, down, up, getattr(torch, dtype))
        if plan == "score" and impl == "triton" and down is None and os.environ.get("DPO_FAST_FUSED_SCORE") == "1":
            _score_without_tile(factors.rows(slice(None))[0], bias, labels, ignore_index, transform, names, results)
            return results
        for start in range(0, N, sizes.chunk_rows):
            part = slice(start, min(start + sizes.chunk_rows, N))
            index = part if rows is None else rows[part]
            label, ignored, invalid = usable_labels(labels[index], ignore_index, weight.shape[0])
            chunk = factors.rows(index, ignored)
            tile = tile or make_tile(impl, min(N, sizes.chunk_rows), sizes.chunk_columns, chunk[0][0])
            out = tile.fold(chunk, bias, label, transform, names, gradient=plan == "frozen")
            if ignored is not None:
                for name in ("logps", "row_max"):  # the latter makes the gradients NaN, too
                    out[name].masked_fill_(invalid, torch.nan)
                for name in ("logps", *names):
                    out[name].masked_fill_(ignored, 0)
            logps[index] = out["logps"]
            partition[0, index], partition[1, index] = out["row_max"], out["log_sum"]
            for k, name in enumerate(names):
                extras[k, index] = out[name]
            if plan == "frozen":
                coefficient = logps.new_ones((label.numel(), 1))
                if ignored is not None:
                    coefficient.masked_fill_(ignored[:, None], 0).masked_fill_(invalid[:, None], torch.nan)
                for k, direction in enumerate(directions[: len(chunk)]):
                    direction[index] = tile.d_left(k, coefficient)
    return results


def _score_without_tile(factor, bias, labels, ignore_index, transform: Transform, names, results) -> None:
    """One kernel, GEMM and softmax together. Opt-in until it is measured: cuBLAS may be faster for wide models, and
    its sums are grouped differently from those of the other plans, which policy and reference should share."""
    from dpo_fast.kernels.linear_score import linear_score_fwd

    hidden, weight = factor
    logps, partition, extras, *_ = results
    out = {"logps": logps, "row_max": partition[0], "log_sum": partition[1]}
    out.update(zip(names, extras.unbind(0), strict=True))
    for name, x in (("hidden", hidden), ("weight", weight)):
        if x.stride(-1) != 1:
            raise ValueError(f"DPO_FAST_FUSED_SCORE=1 needs {name} with contiguous columns, got strides {x.stride()}")
    knobs = dict(logit_scale=transform.scale, softcap=transform.softcap, temperature=transform.temperature)
    bias = None if bias is None else bias.contiguous()
    linear_score_fwd(hidden, weight, labels.contiguous(), bias, out, ignore_index=ignore_index, **knobs)


def _empty_results(hidden, down, stats: str, plan: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, dtype = hidden.shape[0], torch.promote_types(hidden.dtype, torch.float32)
    keep = plan == "frozen"
    return (
        hidden.new_empty((N,), dtype=dtype),
        hidden.new_empty((2, N), dtype=dtype),
        hidden.new_empty((len(stats.split()), N), dtype=dtype),
        # In fp32: rounded here and again when scaled, a 16-bit direction would err more than eager does
        hidden.new_empty(hidden.shape if keep else (0,), dtype=dtype),
        hidden.new_empty((0,) if down is None or not keep else down.shape, dtype=dtype),
    )


@_forward.register_fake
def _(hidden, weight, bias, down, up, labels, ignore_index, softcap, scale, temperature, stats, plan, *_):
    return _empty_results(hidden, down, stats, plan)


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
    ignore_index: int,
    softcap: float | None,
    scale: float,
    temperature: float,
    tile_mib: int | None,
    dtype: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (hidden, weight, bias, down, up); those that `needs` does not ask for are empty.

    Vocabulary slice by slice, all tokens at once: a slice's d_weight is one GEMM with one rounding."""
    inputs = (hidden, weight, bias, down, up)
    results = tuple(x.zero_() for x in _empty_gradients(inputs, needs))
    rows = scored_rows(labels, ignore_index)
    transform = Transform(scale, softcap, temperature)
    with torch.autocast(hidden.device.type, enabled=False):
        factors = Factors(hidden, weight, bias, down, up, getattr(torch, dtype))
        if rows is not None:
            factors.lefts = [left[rows] for left in factors.lefts]
            labels, partition, d_logps = labels[rows], partition[:, rows], d_logps[rows]
        N, V = labels.numel(), weight.shape[0]
        if N == 0:
            return results
        _, ignored, _ = usable_labels(labels, ignore_index, V)
        chunk = factors.rows(slice(None), ignored)
        wide, operand = partition.dtype, gemm_operand(chunk[0][0][:0]).dtype
        coefficient = d_logps.to(wide).masked_fill(labels == ignore_index, 0)
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
        plan = _plan(N, weight, "recompute", tile_mib, getattr(torch, dtype), plan_device("torch", hidden.device))
        step = plan.slice_columns
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
    tensors, knobs = inputs[:6], inputs[6:]
    ignore_index, softcap, scale, temperature, _, ctx.plan, tile_mib, dtype, _, edge = knobs
    ctx.knobs = (ignore_index, softcap, scale, temperature, tile_mib, dtype)
    _, partition, _, d_hidden, d_down = output
    ctx.mark_non_differentiable(partition, d_hidden, d_down)
    ctx.set_materialize_grads(False)
    if ctx.plan == "frozen":  # hidden is not kept
        ctx.save_for_backward(d_hidden, d_down, edge)
        ctx.dtypes = (tensors[0].dtype, tensors[0].dtype if tensors[3] is None else tensors[3].dtype)
    elif ctx.plan == "recompute":
        ctx.save_for_backward(*tensors, partition)


def _differentiate(ctx, d_logps, _d_partition, d_stats, *_):
    gradients = [None] * 16
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
        found = _recompute(*tensors, partition, d_logps.contiguous(), needs, *ctx.knobs)
        found = [without_derivative("linear_token_logps", d, *tensors) for d in found]
        gradients[:5] = [d if need else None for d, need in zip(found, needs, strict=True)]
    return tuple(gradients)


_forward.register_autograd(_differentiate, setup_context=_save)


# A counter sees a registered op as one piece. What it holds is counted in tests/test_ops_linear.py.


def _gemm_flops(hidden, weight, down, gemms: float) -> int:
    (N, H), V = hidden, weight[0]
    return int(gemms * 2 * N * V * (H + (down[1] if down is not None else 0)))


@register_flop_formula(torch.ops.dpo_fast.linear_token_logps_fwd)
def _(hidden, weight, bias, down, up, labels, ignore_index, softcap, scale, temperature, stats, plan, *_, **__) -> int:
    return _gemm_flops(hidden, weight, down, 2 if plan == "frozen" else 1)


@register_flop_formula(torch.ops.dpo_fast.linear_token_logps_bwd)
def _(hidden, weight, bias, down, up, labels, partition, d_logps, needs, *_, **__) -> int:
    return _gemm_flops(hidden, weight, None, 1 + needs[0] + needs[1]) + (
        0 if down is None else _gemm_flops((hidden[0], 0), weight, down, 1 + needs[3] + needs[4])
    )
