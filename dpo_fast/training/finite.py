"""Losses and weights that are not finite: found without waiting for the device in a step, and said once."""

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpo_fast.batch import PreferenceBatch
from dpo_fast.comparisons import pairs_of
from dpo_fast.functional import PreferenceStep

logger = logging.getLogger("dpo_fast")

_WITHOUT_LOGS = 4096  # steps, after which they are looked at
_KEPT = 64  # batches whose tokens are kept until the next log
_SHOWN = 3  # pairs
_CHARACTERS = 60


class _Step(NamedTuple):
    number: int
    loss: Tensor  # ()
    losses: Tensor  # (P,)
    targets: Tensor | None  # (N,), as `sequence_ids`
    sequence_ids: Tensor | None
    comparisons: Any  # as in PreferenceBatch


class LossWatch:
    """The losses of the steps since the last log; `check` looks at them, where a log waits for the device anyway."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.said = tokenizer, False
        self.first: int | None = None  # step whose loss is not finite
        self.steps: list[_Step] = []

    def add(self, number: int, step: PreferenceStep, batch: PreferenceBatch) -> None:
        if self.said:
            return
        if len(self.steps) >= _WITHOUT_LOGS:
            self.check()
        tokens = (batch.targets, batch.sequence_ids) if len(self.steps) < _KEPT else (None, None)
        kept = number, step.loss.detach(), step.losses.detach(), *tokens, batch.get("comparisons")
        self.steps.append(_Step(*kept))

    def check(self, rank: int | None = None) -> None:
        """Warn, once, of the first step whose loss is not finite; forget the others."""
        steps, self.steps = self.steps, []
        if self.said or not steps:
            return
        finite = torch.stack([step.loss.isfinite() & step.losses.isfinite().all() for step in steps]).tolist()
        if all(finite):
            return
        step = steps[finite.index(False)]
        self.said, self.first = True, step.number
        pairs = (~step.losses.isfinite()).nonzero()[:, 0].tolist()
        logger.warning(
            "step %d%s: the loss is not finite (%s)%s. What follows is not worth much: a smaller learning_rate, "
            "max_grad_norm, or other data may help",
            step.number,
            "" if rank is None else f" of rank {rank}",
            step.loss.item(),
            self._named(step, pairs),
        )

    def _named(self, step: _Step, pairs: list[int]) -> str:
        if not pairs:
            return ", that of each pair is"
        texts = []
        if step.targets is not None:
            compared = step.comparisons or pairs_of(len(step.losses), "cpu").tolist()
            for pair in pairs[:_SHOWN]:
                tokens = step.targets[step.sequence_ids == compared[pair][0]].tolist()
                texts.append(repr(self.tokenizer.decode(tokens)[:_CHARACTERS]))
        named = f", whose chosen answers begin with {', '.join(texts)}" if texts else ""
        more = " and others" if texts and len(pairs) > len(texts) else ""
        return f": of {len(pairs)} of its {len(step.losses)} pairs{named}{more}"


def are_finite(model: nn.Module) -> Tensor:
    """() 1.0 if every parameter that trains is finite, as far as this rank holds it, else 0.0."""
    parts = [_local(p).detach() for p in model.parameters() if p.requires_grad]
    found = [part.isfinite().all() for part in parts if part.numel()]
    if not found:
        return torch.ones((), device=next(model.parameters()).device)
    return torch.stack([x.to(found[0].device) for x in found]).all().float()


def _local(parameter: Any) -> Tensor:
    """What a rank holds of a parameter that FSDP (a DTensor) or ZeRO-3 has cut."""
    if hasattr(parameter, "to_local"):
        return parameter.to_local()
    return getattr(parameter, "ds_tensor", parameter)
