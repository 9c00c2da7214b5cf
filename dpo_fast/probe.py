"""Whether a model runs packed rows right: proven once per model, before its first one, and guarded at each call.

`reasons_against(model, backbone)` says why a packed row must not run; empty if it may. Three parts:

    read     the configuration and the modules (attention.py)
    proven   three short pairs through the model: one sequence at a time, and packed. The hidden states must agree, and
             every attention layer of the first pass must get the layout in the second. Once per model object
    watched  what may change between calls: hooks inside the backbone, which would see a packed row, and dropout

`run` is the packed pass itself, and raises unless every attention layer was called with the layout.

The probe takes at most 34 tokens packed, or 34 + the window where that is at most 64, and about 6 times as many in
all (`probe_tokens`): in FLOPs, forwards of at most 700 tokens, that is below a hundredth of a training step of
16,000 tokens, once. It leaves nothing behind: no random number is drawn, modes, hooks, autocast's cache and, where it
fails, the attention implementation are as before.

The tolerance is what rounding does in this model, on this device: the sequences are run once more, and the output of
each attention layer is changed in every element by as much as two computations of it may differ. Sixteen roundings:
queries, keys, values, scores, exp (2), sum and weights, in both; and two sums of products in another order, the root
of their width in fp32 (Higham, section 3.1). Random signs, the full amount in each: a packed pass that is right differs
less. What follows attention is summed in another order, too, once or twice a layer: that is added as a random walk.
Where a layer is left out or sees another key, the difference is not of that order, but of the attention's own.
"""

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as torch_modules

from . import attention
from .batch import TokenPair
from .layout import SharedPrefixLayout, common_prefix, shared_prefix_batch

logger = logging.getLogger("dpo_fast")

LARGEST_WINDOW = 64  # a row longer than larger ones would cost too much: there the keyword counts, see _lost_windows
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LIBRARIES = {"torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "bitsandbytes", "dpo_fast"}


@dataclass(frozen=True)
class _Verdict:
    reasons: tuple[str, ...]
    in_training: tuple[str, ...]  # those that hold in training mode
    layers: frozenset[nn.Module]  # what calls the attention function


# Not on the model: a copy is to be proven by itself, and a pickle must load where this library is not
_VERDICTS: "weakref.WeakKeyDictionary[nn.Module, _Verdict]" = weakref.WeakKeyDictionary()
_REQUIRED: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def reasons_against(
    model: nn.Module, backbone: Callable[[], nn.Module], device: torch.device, training: bool | None = None
) -> list[str]:
    """Why `model`, a causal LM, must not be given a packed row; empty if it may. backbone: see `forward.py`;
    training: in training mode or not, None: in the mode that the model is in.

    The first call runs the probe, on every rank if the model is sharded: call it at the same point on all.
    """
    if torch.compiler.is_compiling():
        return list(_not_compiled(model, backbone, device))
    verdict = _VERDICTS.get(model)
    if verdict is None:
        verdict = _VERDICTS[model] = _prove(model, backbone(), device)
    reasons = list(verdict.reasons)
    if model.training if training is None else training:
        reasons += verdict.in_training
    return reasons or watched(model, backbone())


@torch.compiler.disable
def _not_compiled(model, backbone, device) -> tuple[str, ...]:
    return tuple(reasons_against(model, backbone, device))


def is_ready(model: nn.Module) -> bool:
    """Whether its weights are here and whole, so that it can run outside its wrappers."""
    return all(
        p.numel() and not p.is_meta and not isinstance(p, DTensor) and not hasattr(p, "ds_id")
        for p in model.parameters()
    )


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


# --- what may change between calls ---------------------------------------------------------------------------------


def watched(model: nn.Module, backbone: nn.Module) -> list[str]:
    """Hooks below the backbone, and global ones: they would be shown a packed row where they expect one sequence."""
    name = type(model).__name__
    for dictionary in _global_hooks():
        for hook in dictionary.values():
            if not _is_a_librarys(hook):
                return [f"a global hook of modules ({_name_of(hook)}) would see packed rows"]
    # The backbone's own are its caller's business; the embeddings may lie outside of it
    for path, module in [*backbone.named_modules(), ("embeddings", model.get_input_embeddings())]:
        if module is backbone:
            continue
        for kind in _HOOKS:
            for hook in vars(module)[kind].values():
                if "neftune" in _name_of(hook):
                    return [f"NEFTune (neftune_noise_alpha) scales its noise by the length of the row of {name}"]
                if not _is_a_librarys(hook):
                    return [f"the hook {_name_of(hook)} on {name}'s {path} would see packed rows"]
    return []


def _global_hooks() -> list[dict]:
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    return [getattr(torch_modules, f"_global_{name}") for name in names]


def _function_of(hook):
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__func__", hook)


def _name_of(hook) -> str:
    function = _function_of(hook)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _is_a_librarys(hook) -> bool:
    """FSDP, ZeRO-3, transformers and PEFT hang hooks on modules which do not read rows; everybody's recipe for
    gradient checkpointing with adapters, make_inputs_require_grad, does not either."""
    function = _function_of(hook)
    origin = getattr(function, "__module__", None) or type(function).__module__
    known = origin.partition(".")[0] in _LIBRARIES and "neftune" not in _name_of(hook)
    return known or "make_inputs_require_grad" in _name_of(hook)


# --- the probe -----------------------------------------------------------------------------------------------------


def probe_pairs(config) -> list[TokenPair]:
    """Three pairs: two with a prompt, of which one is longer than the window, and one without a prompt."""
    special = {
        value for name, value in config.to_dict().items() if name.endswith("token_id") and isinstance(value, int)
    }
    ordinary = [i for i in range(min(config.vocab_size, 512)) if i not in special] or [0]
    drawn = (ordinary[(7 * k + 3) % len(ordinary)] for k in range(10**6))

    def tokens(n: int) -> list[int]:
        return [next(drawn) for _ in range(n)]

    windows = [w for w in _windows(config).values() if 0 < w <= LARGEST_WINDOW]
    limit = getattr(config, "max_position_embeddings", None) or 10**6
    long = max(1, min(max(windows, default=6), limit - 4))
    first, second = tokens(3), tokens(long)
    return [
        TokenPair(first, tokens(3), first, tokens(4)),
        TokenPair([], tokens(3), [], tokens(2)),
        TokenPair(second, tokens(4), second, tokens(2)),
    ]


def probe_tokens(config) -> tuple[int, int]:
    """Tokens of the packed row, and of all passes of the probe together, padding included."""
    pairs = probe_pairs(config)
    sequences = _sequences(pairs)
    width = max(map(len, sequences))
    packed = shared_prefix_batch(pairs).layout.length
    return packed, packed + 2 * sum(map(len, sequences)) + 2 * len(sequences) * width + len(sequences[0])


def _sequences(pairs: list[TokenPair]) -> list[list[int]]:
    """Chosen and rejected of each pair, pair by pair."""
    return [[*p, *c] for q in pairs for p, c in ((q.chosen_prompt, q.chosen), (q.rejected_prompt, q.rejected))]


def _prove(model: nn.Module, backbone: nn.Module, device: torch.device) -> _Verdict:
    reasons, name = attention.reasons_against(model), type(model).__name__
    if reasons:
        return _Verdict(tuple(reasons), (), frozenset())
    with torch.no_grad(), _no_trace(model, device):
        try:
            verdict = _run_probe(model, backbone, device)
        except torch.OutOfMemoryError:
            attention.disable(model)
            raise
        except attention.LayoutLost as error:
            verdict = _Verdict((f"{name}: {error}",), (), frozenset())
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            # Whatever a model does with keywords or masks that it does not expect; its own forward has been checked
            said = str(error).strip().partition("\n")[0]
            verdict = _Verdict((f"{name} does not run packed rows ({type(error).__name__}: {said})",), (), frozenset())
    if verdict.reasons:
        attention.disable(model)
    return verdict


def _run_probe(model: nn.Module, backbone: nn.Module, device: torch.device) -> _Verdict:
    name, config = type(model).__name__, model.config.get_text_config()
    pairs = probe_pairs(config)
    sequences = _sequences(pairs)
    notes = _Notes()

    def ids(tokens) -> Tensor:
        return torch.tensor([tokens], device=device)

    def one_at_a_time(observer) -> Tensor:
        with attention.observed(observer):
            return torch.cat([backbone(input_ids=ids(s), use_cache=False)[0][0] for s in sequences])

    with _mode(model, training=False):
        plain = _padded_pass(backbone, sequences, device)
        attention.enable(model)
        if not torch.equal(_padded_pass(backbone, sequences, device), plain):
            attention.disable(model)
            if torch.equal(_padded_pass(backbone, sequences, device), plain):  # else it is not reproducible by itself
                return _Verdict((f"{name}'s plain forward depends on its implementation's name",), (), frozenset())
            attention.enable(model)
        own = one_at_a_time(notes)
        if not notes.windows:
            return _Verdict(
                (f"{name} does not take its attention from transformers' AttentionInterface",), (), frozenset()
            )
        lost = _lost_windows(model, config, notes)
        if lost:
            return _Verdict(tuple(lost), (), frozenset())
        batch = shared_prefix_batch(pairs).to(device)
        inputs = attention.model_inputs(batch.layout, device)
        row = backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs)[0][0]
        missing = notes.windows.keys() - batch.layout.called.modules
        if missing:
            return _Verdict((f"{name} does not hand the layout to {len(missing)} of its layers",), (), frozenset())
        packed = torch.cat([row[torch.tensor(where, device=row.device)] for where in _places(pairs)])
        peer = _difference(one_at_a_time(_Rounding(own.dtype, own.shape[-1])), own)
        budget = peer + (2 * len(notes.windows)) ** 0.5 * _sums(own.dtype, own.shape[-1])
        found = _difference(packed, own)
        if not found <= budget:
            wrong = f"{name}'s packed rows differ from separate ones by {found:.2g} of a hidden state, "
            return _Verdict((wrong + f"rounding explains {budget:.2g}",), (), frozenset())
    return _Verdict((), tuple(_reasons_in_training(model, backbone, ids(sequences[0]))), frozenset(notes.windows))


def _padded_pass(backbone: nn.Module, sequences: list[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return backbone(input_ids=ids, attention_mask=mask, use_cache=False)[0][mask.bool()]


def _places(pairs: list[TokenPair]) -> list[list[int]]:
    """Where the tokens of each of `_sequences` lie in the packed row."""
    places, start = [], 0
    for chosen, rejected in zip(*[iter(_sequences(pairs))] * 2, strict=True):
        prefix, branch = common_prefix(chosen, rejected), start + len(chosen)
        end = branch + len(rejected) - prefix
        places += [[*range(start, branch)], [*range(start, start + prefix), *range(branch, end)]]
        start = end
    return places


def _difference(result: Tensor, own: Tensor) -> float:
    """The largest over the tokens of |result - own| / |own|; NaN if there is one."""
    result, own = result.cpu().double(), own.cpu().double()
    return ((result - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-30)).max().item()


class _Notes:
    """Which modules call the attention function, and with which windows and dropout."""

    def __init__(self):
        self.windows: dict[nn.Module, int | None] = {}
        self.dropout = 0.0

    def __call__(self, module: nn.Module, out: tuple, keywords: dict) -> tuple:
        self.windows[module] = keywords.get("sliding_window")
        self.dropout = max(self.dropout, keywords.get("dropout") or 0.0)
        return out


def _sums(dtype: torch.dtype, width: int) -> float:
    """By how much sums of `width` products differ in another order, relative; 16-bit ones are summed in fp32."""
    return width**0.5 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


class _Rounding:
    """Changes each element of an attention output by the most that rounding may, see the top of the file."""

    def __init__(self, dtype: torch.dtype, width: int):
        eps = torch.finfo(dtype).eps
        self.amount = 16 * eps + 2 * _sums(dtype, width)

    def __call__(self, _module: nn.Module, out: tuple, _keywords: dict) -> tuple:
        result = out[0]
        eps = torch.finfo(result.dtype).eps  # coarser than the hidden states' under autocast
        signs = torch.randint(2, result.shape, device=result.device) * 2 - 1
        changed = result.float() * (1 + signs * (self.amount + 16 * eps))
        return (changed.to(result.dtype), *out[1:])


def _windows(config) -> dict[str, int]:
    """The windows that a config names, by name."""
    found = {}
    for name, value in config.to_dict().items():
        counts = any(word in name for word in ("pattern", "layers", "use_", "chunk"))
        if "window" in name and not counts and isinstance(value, int) and not isinstance(value, bool) and value > 0:
            found[name] = value
    return found


def _lost_windows(model: nn.Module, config, notes: _Notes) -> list[str]:
    """A window that the config names and that no layer hands to its attention function is in the mask alone."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return []
    handed = {window for window in notes.windows.values() if window is not None}
    lost = {name: w for name, w in _windows(config).items() if w not in handed and w - 1 not in handed}
    lost = {name: w for name, w in lost.items() if w + 1 not in handed}  # one more or less: counted otherwise
    name = type(model).__name__
    return [f"{name} does not hand its window ({key}={w}) to its attention function" for key, w in lost.items()]


def _reasons_in_training(model: nn.Module, backbone: nn.Module, ids: Tensor) -> list[str]:
    """Attention dropout, which shared-prefix attention has not, and layers that are left out at random."""
    notes, name = _Notes(), type(model).__name__
    with _mode(model, training=True), attention.observed(notes):
        backbone(input_ids=ids, use_cache=False)
    reasons = [f"{name} has attention dropout ({notes.dropout}), which packed rows have not"] if notes.dropout else []
    if any(isinstance(rate := getattr(m, "layerdrop", 0.0), (int, float)) and rate > 0 for m in model.modules()):
        reasons.append(f"{name} leaves out layers at random (layerdrop)")
    return reasons


# --- no trace ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Random numbers, hooks that are not a library's and autocast's cache as before.

    The cache: a cast of a weight that is made without gradients would be taken for the one that training needs.
    """
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == device.type})
    forked = dict(devices=devices, device_type=device.type) if device.type not in ("cpu", "meta") else dict(devices=[])
    cached = torch.is_autocast_cache_enabled()
    with torch.random.fork_rng(**forked), _without_hooks(model):
        torch.manual_seed(0)  # the same on every rank
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    dictionaries = [vars(m)[kind] for m in model.modules() for kind in _HOOKS] + _global_hooks()
    saved = [(d, list(d.items())) for d in dictionaries if any(not _is_a_librarys(hook) for hook in d.values())]
    for dictionary, hooks in saved:
        for key, hook in hooks:
            if not _is_a_librarys(hook):
                del dictionary[key]
    try:
        yield
    finally:
        for dictionary, hooks in saved:
            added = [item for item in dictionary.items() if item not in hooks]
            dictionary.clear()
            dictionary.update([*hooks, *added])


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    changed = [module for module in model.modules() if module.training != training]
    for module in changed:
        module.training = training
    try:
        yield
    finally:
        for module in changed:
            module.training = not training
