"""Stage 1, from stacked rows: (B, T) token ids, masks and labels, as trainers hold them -> `PreferenceBatch`.

    packed_rows     one row for the model: no padding, and what sequences begin with in common once
    padded_rows     the rows as they come, with further inputs of the model, for what cannot be packed

Both note where the scored tokens lie in the (B, T - 1) of shifted labels: `places`, of the shape `field_shape`.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from . import transfer
from .batch import PreferenceBatch
from .layout import SharedPrefixLayout

IGNORED = -100  # the label of what is not scored


@torch.compiler.disable  # it reads the batch on the host, of which Dynamo would make a graph
def packed_rows(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, pairs: bool = True) -> PreferenceBatch | str:
    """(B, T) each, on one device; padding on either side, labels -100 where nothing is scored -> a packed batch there;
    why not, if these are no sequences.

    pairs: rows i and B/2 + i share what both begin with; else all rows do, each with the one that it shares most with.
    The first token of a sequence has nothing to predict it and is not scored. The host reads the device once: what it
    must know is lengths, numbers of scored tokens, and how much is shared.
    """
    (rows, width), device = labels.shape, labels.device
    columns, scored = torch.arange(width, device=device), labels != IGNORED
    begins, lengths, whole = _runs(attention_mask)
    one_run, on_padding = _are_sequences(attention_mask, whole, lengths), (scored & ~whole).any()

    left = (columns + begins[:, None]).clamp_(max=max(width - 1, 0))  # rows from their first token on
    ids, labels = input_ids.gather(1, left), labels.gather(1, left)
    scored = scored.gather(1, left) & (columns > 0) & (columns < lengths[:, None])
    counts = scored.sum(1)
    shared = _shared_by_pairs(ids, lengths) if pairs else _shared_by_all(ids, lengths)
    seen = torch.where(whole, input_ids, 0)
    smallest, largest = (seen.amin(), seen.amax()) if seen.numel() else (lengths.sum(), lengths.sum())
    facts = torch.stack([smallest, largest, one_run, on_padding])
    *known, least, largest_id, is_one_run, is_on_padding = torch.cat(
        [lengths, counts, shared.flatten(), facts]
    ).tolist()
    if not is_one_run:
        return _NO_RUN
    if is_on_padding:
        return _ON_PADDING
    if least < 0:
        return f"input_ids are at least 0, got {least}"

    host_lengths, host_counts, of_shared = known[:rows], known[rows : 2 * rows], known[2 * rows :]
    order, sharing = _in_pairs(of_shared) if pairs else _depth_first(of_shared, rows)
    layout = SharedPrefixLayout.make([host_lengths[row] for row in order], sharing, order).to(device)
    host_order = torch.tensor(order, dtype=torch.int64, device="cpu")
    in_order = transfer.mover([host_order], device, non_blocking=True)(host_order)
    positions = layout.positions.long()
    row_of_token = in_order.repeat_interleave(layout.query_ends.diff(), output_size=layout.length)
    # Of each scored token, its sequence in the order of the row, and the position of the token that predicts it
    sequence, before = scored[in_order, 1:].nonzero_static(size=sum(host_counts)).unbind(1)
    row = in_order[sequence]
    return PreferenceBatch(
        input_ids=ids[row_of_token, positions].unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        targets=labels[row, before + 1],
        sequence_ids=row,
        predictors=layout.index[layout.key_ends[sequence] + before],
        lengths=counts,
        host_lengths=tuple(host_counts),
        host_largest_id=largest_id,
        layout=layout,
        places=row * (width - 1) + begins[row] + before,
        field_shape=(rows, width - 1),
    )


def why_no_sequences(attention_mask: Tensor, labels: Tensor) -> str | None:
    """What `packed_rows` says of such rows; on a GPU the host waits to know."""
    _, lengths, whole = _runs(attention_mask)
    if not _are_sequences(attention_mask, whole, lengths):
        return _NO_RUN
    return _ON_PADDING if ((labels != IGNORED) & ~whole).any() else None


def padded_rows(inputs: Mapping, labels: Tensor) -> PreferenceBatch:
    """inputs: keyword arguments of the model, input_ids (B, T) among them, and attention_mask where there is padding;
    labels (B, T), unshifted, of which those are scored that a token predicts, not padding.

    On a GPU the host waits, to know how many tokens are scored.
    """
    scored = labels[:, 1:] != IGNORED
    if inputs.get("attention_mask") is not None:
        inside = inputs["attention_mask"] != 0
        scored = scored & inside[:, :-1] & inside[:, 1:]
    places = scored.flatten().nonzero().squeeze(1)
    rows = places // max(scored.shape[1], 1)
    predictors = places + rows  # each row has one position more than it has shifted labels
    known = ("input_ids", "attention_mask", "position_ids")
    return PreferenceBatch(
        **{name: inputs.get(name) for name in known},
        model_inputs={name: value for name, value in inputs.items() if name not in known},
        targets=labels.flatten()[predictors + 1],
        sequence_ids=rows,
        predictors=predictors,
        lengths=scored.sum(1),
        layout=None,
        places=places,
        field_shape=tuple(scored.shape),
    )


def spread(values: Tensor, batch: PreferenceBatch) -> Tensor:
    """(N,) of a batch's scored tokens -> (B, T - 1), zero where nothing is scored."""
    rows, columns = batch.field_shape
    return values.new_zeros(rows * columns).index_copy(0, batch.places, values).view(rows, columns)


_NO_RUN = "attention_mask is not one run of ones in each row, as sequences with padding before or after them have"
_ON_PADDING = "labels are not -100 everywhere on padding (attention_mask 0)"


def _runs(attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where each row's tokens begin (B,), how many they are (B,), and the mask (B, T) if they follow one another."""
    mask = attention_mask.to(torch.int64)
    lengths, begins = mask.sum(1), mask.argmax(1)  # the first of the largest
    columns = torch.arange(mask.shape[1], device=mask.device)
    return begins, lengths, (columns >= begins[:, None]) & (columns < (begins + lengths)[:, None])


def _are_sequences(attention_mask: Tensor, whole: Tensor, lengths: Tensor) -> Tensor:
    return (attention_mask == whole).all() & (lengths > 0).all()


def _common(a: Tensor, b: Tensor) -> Tensor:
    """(..., T) token ids -> (...): how many first ones are equal, T if all are."""
    differ = torch.nn.functional.pad(a != b, (0, 1), value=True)
    return differ.int().argmax(-1)  # the first of the largest


def _shared_by_pairs(ids: Tensor, lengths: Tensor) -> Tensor:
    """(P,): what rows i and P + i begin with in common."""
    return _common(*ids.chunk(2)).minimum(lengths.view(2, -1).amin(0))


def _shared_by_all(ids: Tensor, lengths: Tensor) -> Tensor:
    """(B, B): what each two rows begin with in common."""
    common = torch.stack([_common(ids, row) for row in ids])
    return common.minimum(lengths).minimum(lengths[:, None])


def _in_pairs(shared: list[int]) -> tuple[list[int], list[int]]:
    """The order of the rows in the layout, and what each shares with the one before it."""
    pairs = len(shared)
    return [row for i in range(pairs) for row in (i, pairs + i)], [k for n in shared for k in (0, n)]


def _depth_first(shared: list[int], rows: int) -> tuple[list[int], list[int]]:
    """The same for all rows, of what each two share, (B * B). Next comes the row that shares most with the last one.

    Of any three rows, the two smallest of what they share are equal. So all that share more with the last row than a
    row outside does come before that one: no beginning comes twice.
    """
    order, left = [0], list(range(1, rows))
    while left:
        of_last = shared[order[-1] * rows : (order[-1] + 1) * rows]
        order.append(max(left, key=of_last.__getitem__))  # the first of the largest
        left.remove(order[-1])
    return order, [0, *(shared[a * rows + b] for a, b in itertools.pairwise(order))]
