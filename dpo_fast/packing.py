"""When a model may be given a packed row, and the pass itself, which is guarded.

`reasons_against(model, backbone)` says why a packed row must not run; empty if it may. Three parts:

    read     the configuration and the modules (attention.py)
    proven   the probe (probe.py), once per model object
    watched  what may change between calls: hooks inside the backbone, which would see a packed row (hooks.py), dropout

`run` is the packed pass, and raises unless every attention layer was called with the layout. `run_padded` is the other
one. The probe leaves nothing behind: random numbers, modes, hooks, autocast's cache and, where the model fails it, the
attention implementation are as before.
"""

import functools
import logging
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import attention
from .hooks import no_trace, watched
from .layout import SharedPrefixLayout
from .probe import ERRORS, Verdict, prove, said

logger = logging.getLogger("dpo_fast")

# Not on the model: a copy is to be proven by itself, and a pickle must load where this library is not
_VERDICTS: "weakref.WeakKeyDictionary[nn.Module, Verdict]" = weakref.WeakKeyDictionary()
_REQUIRED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def reasons_against(
    model: nn.Module, backbone: Callable[[], nn.Module], device: torch.device, training: bool | None = None
) -> list[str]:
    """Why `model`, a causal LM, must not be given a packed row; empty if it may. backbone: see `forward.py`;
    training: in training mode or not, None: in the mode that the model is in.

    The first call runs the probe, on every rank if the model is sharded: call it at the same point on all.
    """
    verdict = _verdict_on(model, backbone, device)
    reasons = list(verdict.reasons)
    if model.training if training is None else training:
        reasons += verdict.in_training
    return reasons or watched(model, backbone())


def runs_in_both_modes(model: nn.Module) -> bool:
    """Whether the probe has run and found nothing, in training mode neither."""
    verdict = _VERDICTS.get(model)
    return verdict is not None and not verdict.reasons and not verdict.in_training


def draws_in_training(model: nn.Module) -> bool:
    """Whether the model draws random numbers in training mode, as far as the probe has run."""
    verdict = _VERDICTS.get(model)
    return verdict is not None and verdict.draws


def is_ready(model: nn.Module) -> bool:
    """Whether its weights are here and whole, so that it can run outside its wrappers."""
    # FSDP1 without use_orig_params leaves views of weights that are elsewhere, which are no parameters
    views = (x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor))
    return all(
        p.numel() and not p.is_meta and not isinstance(p, DTensor) and not hasattr(p, "ds_id")
        for p in model.parameters()
    ) and all(x.untyped_storage().size() or not x.numel() for x in views)


def require(model: nn.Module) -> None:
    """From now on a packed row that must not run raises ValueError instead of running as padded rows."""
    _REQUIRED.add(model)


def refuse_or_log(model: nn.Module, reasons: list[str]) -> None:
    if model in _REQUIRED:
        raise ValueError(f"layout='shared_prefix' cannot run: {'; '.join(reasons)}; use layout='padded' or 'auto'")
    _log_once("; ".join(reasons))


@functools.cache
def _log_once(reasons: str) -> None:
    logger.warning("layout: padded rows, not shared prefixes, because %s", reasons)


def run(model: nn.Module, backbone: nn.Module, inputs: dict):
    """The backbone's output for a packed row, whose `inputs` include those of `attention.model_inputs`.

    Raises `attention.LayoutLost` unless every attention layer was called with the layout. Compiled, that is left to
    the probe.
    """
    if torch.compiler.is_compiling():
        return backbone(**inputs)
    layout: SharedPrefixLayout = inputs["pair_layout"]
    layout.called.modules.clear()
    out = backbone(**inputs)
    verdict = _VERDICTS.get(model)
    expected = frozenset() if verdict is None else verdict.layers
    if not layout.called.modules or not expected <= layout.called.modules:
        missing = len(expected) - len(expected & layout.called.modules) or "its"
        raise attention.LayoutLost(
            f"{type(model).__name__} ran a packed row, but {missing} attention layers were not called with its layout; "
            "use padded rows"
        )
    return out


def run_padded(model: nn.Module, backbone: nn.Module, inputs: dict, one_by_one: bool = True):
    """The backbone's output for padded rows, their first item hidden states (B, T, H); `inputs` are its keywords.

    Some models let padding into their numbers (CPM-Ant): there the rows run one by one, without it, and a line says so.
    one_by_one: False where the output must have more than hidden states: then the line says that numbers are wrong.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    known = ids is not None and mask is not None and mask.shape == ids.shape
    if not known or torch.compiler.is_compiling():
        return backbone(**inputs)
    verdict = _verdict_on(model, lambda: backbone, ids.device)
    if not verdict.padded:
        return backbone(**inputs)
    others = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask", "position_ids")}
    if not one_by_one or any(isinstance(value, Tensor) for value in others.values()):
        _say_once(f"{verdict.padded}; so these rows' numbers are not those of their sequences")
        return backbone(**inputs)
    if not is_ready(model):  # ranks have different numbers of rows: their collectives would not meet
        raise ValueError(f"{verdict.padded}; they can run one by one, but not on a sharded model")
    _say_once(f"{verdict.padded}; so the rows run one by one, which is slow")
    rows = []
    for row, columns in zip(ids, mask.bool(), strict=True):
        place = columns.nonzero().squeeze(1)
        found = backbone(input_ids=row[place][None], **others)[0][0] if place.numel() else None
        rows.append((place, found))
    some = next(found for _, found in rows if found is not None)
    return (torch.stack([_spread(place, found, some, ids.shape[1]) for place, found in rows]),)


def _spread(place: Tensor, found: Tensor | None, some: Tensor, width: int) -> Tensor:
    empty = some.new_zeros((width, some.shape[-1]))
    return empty if found is None else empty.index_copy(0, place.to(found.device), found)


@functools.cache
def _say_once(line: str) -> None:
    logger.warning("%s", line)


def _verdict_on(model: nn.Module, backbone: Callable[[], nn.Module], device: torch.device) -> Verdict:
    verdict = _VERDICTS.get(model)
    if verdict is None:
        with torch.no_grad(), no_trace(model, device):
            try:
                verdict = prove(model, backbone(), device)
            except torch.OutOfMemoryError:
                raise
            except ERRORS as error:  # it wants more than tokens, images perhaps
                verdict = Verdict((f"{type(model).__name__} does not run on tokens alone ({said(error)})",))
            finally:
                if verdict is None or verdict.reasons:
                    attention.disable(model)
        _VERDICTS[model] = verdict
    return verdict
