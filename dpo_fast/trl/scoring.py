"""TRL before 1.15: its code calls models for logits. Inside `scored` they answer with `TokenLogits` instead.

TRL lays the rows, and its model gets no labels: `scored` says which tokens of the rows are completions. A call that
cannot be answered so is run as TRL runs it, with logits, and a log line says why.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput

from ..batch import PreferenceBatch
from ..copies import base_model_of, compute_with_own_weights
from ..forward import OwnLogits, attach
from ..rows import IGNORED, packed_rows, padded_rows, spread
from .checks import log_once, refuse_or_log
from .installed import Installed, lead
from .mixin import Mixin
from .token_logits import TokenLogits

logger = logging.getLogger("dpo_fast")

_SETTINGS = {"use_cache", "return_dict", "output_hidden_states"}  # they change nothing that is asked for here
_ELSEWHERE = {"position_ids", "inputs_embeds", "past_key_values", "labels", "decoder_input_ids"}


@dataclass
class ScoredOutput(ModelOutput):
    """The tensors first: wrappers look for them in outputs that they know, and in no `TokenLogits`."""

    log_probs: Tensor | None = None  # (B, T - 1), 0 where label_mask is not set
    label_mask: Tensor | None = None  # (B, T - 1) bool
    logits: Any = None  # TokenLogits of (B, T), or of the last ones that were asked for
    aux_loss: Tensor | None = None


@dataclass
class _Wanted:
    labels_of: Callable[[Tensor, Tensor], Tensor]  # (B, T) ids and mask -> labels, IGNORED outside completions
    outputs: list[tuple[str, ...]] = field(default_factory=list)  # statistics, of one call after the other


_WANTED: ContextVar[_Wanted | None] = ContextVar("wanted", default=None)


@contextlib.contextmanager
def scored(labels_of: Callable[[Tensor, Tensor], Tensor], *outputs: tuple[str, ...]) -> Iterator[None]:
    """outputs: what the first call of a model gives besides log-probs, names from STATS; what the second; nothing."""
    token = _WANTED.set(_Wanted(labels_of, list(outputs)))
    try:
        yield
    finally:
        _WANTED.reset(token)


@dataclass
class _Seam:
    inner: Callable  # the bound forward below
    layout: str  # one of LAYOUTS
    pairs: bool  # rows i and B/2 + i belong together

    def answer(self, model: nn.Module, args: tuple, kwargs: dict):
        wanted = _WANTED.get()
        if wanted is None:
            return self.inner(*args, **kwargs)
        outputs = wanted.outputs.pop(0) if wanted.outputs else ()
        token = _WANTED.set(None)  # the forward below is this model's, too
        try:
            named = {**kwargs, **({"input_ids": args[0]} if args else {})}
            reason = _reason_against(named) if len(args) < 2 else "it is called with several positional arguments"
            if reason:
                refuse_or_log(self.layout, [reason], "the model's own logits, not scores of tokens")
                return self.inner(*args, **kwargs)
            return self._scores(model, wanted.labels_of, outputs, **named)
        finally:
            _WANTED.reset(token)

    def _scores(
        self,
        model: nn.Module,
        labels_of: Callable[[Tensor, Tensor], Tensor],
        outputs: tuple[str, ...],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
        output_router_logits: bool | None = None,
        **others,
    ) -> ScoredOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        labels = labels_of(input_ids, mask)
        others = {name: value for name, value in others.items() if value is not None and name not in _SETTINGS}
        batch = _rows(self, {"input_ids": input_ids, "attention_mask": mask, **others}, labels)
        text = model.config.get_text_config()
        routed = getattr(text, "output_router_logits", False) if output_router_logits is None else output_router_logits
        tokens = self.inner(batch, outputs=outputs, aux_loss=routed)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)

        def of_rows(values: Tensor) -> Tensor:  # (B, T): the last token of a row predicts none
            return torch.nn.functional.pad(spread(values, batch), (0, 1))

        logits = TokenLogits(
            labels=shifted,
            logps=of_rows(tokens.logps),
            vocabulary=text.vocab_size,
            **{name: of_rows(getattr(tokens, name)) for name in outputs},
        )
        return ScoredOutput(
            log_probs=logits.logps[:, :-1],
            label_mask=labels[:, 1:] != IGNORED,
            logits=logits[:, -logits_to_keep:] if logits_to_keep else logits,
            aux_loss=tokens.aux_loss,
        )


def _reason_against(named: dict) -> str | None:
    given = {name for name, value in named.items() if value is not None}
    if elsewhere := given & _ELSEWHERE:
        return f"it is called with {', '.join(sorted(elsewhere))}"
    return None if "input_ids" in given else "it is called without input_ids"


def _rows(seam: _Seam, inputs: dict, labels: Tensor) -> PreferenceBatch:
    if seam.layout == "padded":
        return padded_rows(inputs, labels)
    others = sorted(inputs.keys() - {"input_ids", "attention_mask"})
    if others:
        packed: PreferenceBatch | str = f"the batch has {', '.join(others)}"
    else:
        packed = packed_rows(inputs["input_ids"], inputs["attention_mask"], labels, seam.pairs)
    if isinstance(packed, str):
        refuse_or_log(seam.layout, [packed])
        return padded_rows(inputs, labels)
    return packed


def install(model: nn.Module, layout: str = "auto", pairs: bool = True) -> None:
    """Let `model`, a causal LM, answer calls inside `scored`; one that `attach` refuses stays as it is."""
    compute_with_own_weights(model)
    try:
        if getattr(model.config, "is_encoder_decoder", False):
            raise TypeError("it is an encoder-decoder")
        attach(model)
    except (OwnLogits, TypeError, ValueError) as error:
        refuse_or_log(layout, [str(error)], f"{type(model).__name__} runs as in TRL, with logits")
        return
    lead(model, _Seam(model.forward, layout, pairs))


class ScoringMixin(Mixin):
    """`Mixin` for a trainer whose code calls models for logits."""

    use_weighting: bool  # TRL's trainer's

    def _take_models(self) -> None:
        self._use_models()
        self.padding_free = False  # TRL's rows stay padded ones, which are packed here
        if hasattr(self, "dpo_loss_fn") or getattr(self, "use_liger_kernel", False):
            log_once("Liger's loss runs as in TRL, because it was asked for")

    def _use_models(self) -> None:
        if "_installed" not in vars(self):  # TRL's constructor calls methods, too
            put = functools.partial(install, layout=self._layout)
            models = [self.model, *([] if self.ref_model is None else [self.ref_model])]
            self._installed = [Installed(base_model_of(self.accelerator.unwrap_model(m)), put) for m in models]
        super()._use_models()

    def _policy_outputs(self, *names: str) -> tuple[str, ...]:
        return (*names, "log_sum_sq_probs") if self.use_weighting else names
