"""Reference log-probs that lie with the data, as columns: one more source of a reference.

    ref_chosen_logps, ref_rejected_logps              sums over completions, of whoever has computed them
    ref_chosen_token_logps, ref_rejected_token_logps  of each scored token: what `precompute_ref_log_probs` adds

Sums serve where sums suffice: the loss then takes differences of sums, which keep fewer digits than sums of token by
token differences. They do not where tokens are weighed (ld_alpha), and must be of what truncation leaves.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_fast.batch import PreferenceBatch
from dpo_fast.forward import TokenScores
from dpo_fast.functional import SequenceScores, sequence_scores
from dpo_fast.objective import Objective

logger = logging.getLogger("dpo_fast")

SUMS = ("ref_chosen_logps", "ref_rejected_logps")
TOKENS = ("ref_chosen_token_logps", "ref_rejected_token_logps")


@dataclass
class DataColumns:
    """The reference of data that bring its log-probs; see `dpo_fast.reference` for the others."""

    def __call__(self, policy, batch: PreferenceBatch) -> SequenceScores:
        tokens, sums = batch.get("reference_token_logps"), batch.get("reference_logps")
        if tokens is not None:
            return sequence_scores(TokenScores(tokens), batch)
        if sums is not None:
            return SequenceScores(sums)
        raise ValueError(
            "reference log-probs came with the data or were precomputed and the reference model is gone, but this "
            "batch has none; give the data set to the trainer when it is built"
        )

    def fingerprint(self, policy) -> str:
        raise ValueError("log-probs that lie with the data do not say whose they are, so they have no fingerprint")


def serve(batch: PreferenceBatch) -> bool:
    """Whether the rows of a batch brought their reference log-probs."""
    return any(batch.get(name) is not None for name in ("reference_token_logps", "reference_logps"))


def check(sets: Iterable, objective: Objective, given_reference: bool, precompute: bool) -> bool:
    """Whether all the data sets hold sums that are used; one line says so if any does.

    Raises ValueError if there is a reference model as well (one of the two is not meant), or where sums do not suffice.
    """
    parts = [part for data in sets for part in (data.values() if isinstance(data, dict) else [data])]
    parts = [part for part in parts if part is not None]
    scored = [part for part in parts if set(SUMS) & set(part.column_names or ())]
    columns = ", ".join(SUMS)
    if not scored:
        return False
    if precompute:
        logger.warning("precompute_ref_log_probs: the columns %s of the data are replaced", columns)
        return False
    if given_reference:
        raise ValueError(
            f"got ref_model and data with the columns {columns}, which are log-probs of a reference, too: remove the "
            "columns (remove_columns) to use ref_model, or omit ref_model to use the columns"
        )
    if objective.ld_alpha not in (None, 1):
        raise ValueError(
            f"ld_alpha={objective.ld_alpha} weighs tokens, but the columns {columns} of the data hold sums: remove "
            "them (remove_columns), and the trainer scores the data itself"
        )
    logger.warning("reference log-probs come from the data: its columns %s", columns)
    return len(scored) == len(parts)


def checked_sum(value, where: str) -> float:
    """The value of one row; TypeError or ValueError for what is no log-prob, with `where` it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where} must be a number, the log-prob of a completion, got {type(value).__name__}")
    if not -math.inf < value <= 0:
        raise ValueError(f"{where} must be a finite log-prob of at most 0, got {value}")
    return float(value)


def fields(rows: Sequence[Mapping], batch: PreferenceBatch) -> dict[str, Tensor]:
    """What the columns of the rows add to their batch: nothing, reference_token_logps (N,) or reference_logps (2P,)."""
    if all(name in row for row in rows for name in TOKENS):
        return {"reference_token_logps": _tokens(rows, batch)}
    sums = [row.get(name) for name in SUMS for row in rows]
    missing = sum(value is None for value in sums)
    if missing == len(sums):
        return {}
    if missing:
        raise ValueError(f"{missing} of {len(sums)} reference log-probs are missing in this batch ({', '.join(SUMS)})")
    where = [f"pair {index} of a batch: {name}" for name in SUMS for index in range(len(rows))]
    checked = [checked_sum(value, at) for value, at in zip(sums, where, strict=True)]
    return {"reference_logps": torch.tensor(checked, dtype=torch.float32)}


def _tokens(rows: Sequence[Mapping], batch: PreferenceBatch) -> Tensor:
    """(N,) fp32, in the order of the batch's tokens."""
    by_sequence = [row[name] for name in TOKENS for row in rows]
    if [len(values) for values in by_sequence] != list(batch.host_lengths):
        raise ValueError(
            f"{' and '.join(TOKENS)} have {sum(map(len, by_sequence))} log-probs for "
            f"{sum(batch.host_lengths)} scored tokens: they were computed with another truncation"
        )
    values = torch.tensor([value for one in by_sequence for value in one], dtype=torch.float32)
    return torch.empty_like(values).index_copy_(0, batch.sequence_ids.argsort(stable=True), values)


def tokens_by_pair(values: Tensor, batch: PreferenceBatch) -> list[list[list[float]]]:
    """(N,) values of a batch's tokens -> of each pair two lists, as in the columns `TOKENS`."""
    ordered = values[batch.sequence_ids.argsort(stable=True)].split(batch.host_lengths)
    return [[ordered[sequence].tolist() for sequence in pair] for pair in batch.compared().index.tolist()]
