"""The probe: three short pairs through a model, one sequence at a time, padded, and as one packed row.

The hidden states must agree, and every attention layer that computes the first must get the layout of the packed row.
What is asked when, see packing.py.

Its packed row has 27 tokens and all its 17 passes 231 (`probe_tokens`; one of 6 more where random numbers are drawn):
forwards only, so 0.4 % of the FLOPs of one training step of 16,000 tokens, in which policy and reference take four
forwards' worth. A window of w <= 64 adds a row longer than it: 85 and 1,217 tokens for w = 64, 2 %. Once per model.

The tolerance is what rounding does in this model, on this device: the sequences are run once more, and the output of
each attention layer is changed in every element by as much as two computations of it may differ. Sixteen roundings:
queries, keys, values, scores, exp (2), sum and weights, in both, each of up to one eps (half of it where a device
rounds to the nearest); and two sums of products in another order, in fp32. Independent roundings grow as the root of
their number (Higham, section 2.8): four eps, and twice the root of the width. Random signs, the full amount in each
element: a packed pass that is right differs less. What follows attention is summed in another order, too, once or twice
a layer: that is added as a random walk. Where a layer is left out or sees another key, the difference is not of that
order, but of the attention's own.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import attention
from .batch import TokenPair
from .hooks import mode
from .layout import shared_prefix_batch

LARGEST_WINDOW = 64  # a row longer than larger ones would cost too much: there the keyword counts, see _lost_windows
# Whatever a model does with keywords or masks that it does not expect
ERRORS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Verdict:
    reasons: tuple[str, ...]
    in_training: tuple[str, ...] = ()  # those that hold in training mode
    layers: frozenset[nn.Module] = frozenset()  # what calls the attention function
    padded: str = ""  # why padded rows are wrong, too
    draws: bool = False  # random numbers, in training mode


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
    return packed, packed + 2 * sum(map(len, sequences)) + 2 * len(sequences) * width + 2 * len(sequences[0])


def _sequences(pairs: list[TokenPair]) -> list[list[int]]:
    """Chosen and rejected of each pair, pair by pair."""
    return [[*p, *c] for q in pairs for p, c in ((q.chosen_prompt, q.chosen), (q.rejected_prompt, q.rejected))]


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def prove(model: nn.Module, backbone: nn.Module, device: torch.device) -> Verdict:
    name, read = type(model).__name__, attention.reasons_against(model)
    sequences = _sequences(probe_pairs(model.config.get_text_config()))
    with mode(model, training=False):
        own = _one_at_a_time(backbone, sequences, device)
        plain = _padded_pass(backbone, sequences, device)
        layers = sum(1 for _ in backbone.modules()) if read else 0
        try:
            verdict, budget = (Verdict(tuple(read)), 0.0) if read else _pack(model, backbone, device, own, plain)
        except attention.LayoutLost as error:
            verdict, budget = Verdict((f"{name}: {error}",)), 0.0
        except torch.OutOfMemoryError:
            raise
        except ERRORS as error:  # its own forward has run
            verdict, budget = Verdict((f"{name} does not run packed rows ({said(error)})",)), 0.0
    budget = max(budget, (layers or len(verdict.layers) or 1) ** 0.5 * (4 * _eps(own) + 2 * _sums(own, own.shape[-1])))
    found = _difference(plain, own)
    if not found <= budget:
        wrong = f"{name}'s padded rows differ from separate ones by {found:.2g} of a hidden state"
        verdict = dataclasses.replace(verdict, padded=wrong)
    in_training, draws = _in_training(model, backbone, torch.tensor(sequences[:1], device=device))
    return dataclasses.replace(verdict, in_training=tuple(in_training), draws=draws)


def _pack(model, backbone, device, own: Tensor, plain: Tensor) -> tuple[Verdict, float]:
    """own: the hidden states of each token of the sequences one at a time; plain: of padded rows. The verdict, and by
    how much rounding changes a hidden state."""
    name, config = type(model).__name__, model.config.get_text_config()
    pairs = probe_pairs(config)
    sequences, notes = _sequences(pairs), _Notes()
    attention.enable(model)
    if not torch.equal(_padded_pass(backbone, sequences, device), plain):
        attention.disable(model)
        if torch.equal(_padded_pass(backbone, sequences, device), plain):  # else it is not reproducible by itself
            return Verdict((f"{name}'s plain forward depends on the name of its attention implementation",)), 0.0
        attention.enable(model)
    with attention.observed(notes):
        _one_at_a_time(backbone, sequences[:1], device)
    if not notes.windows:
        return Verdict((f"{name} does not take its attention from transformers' AttentionInterface",)), 0.0
    with attention.observed(_Rounding(own.shape[-1])):
        rounded = _one_at_a_time(backbone, sequences, device)
    budget = _difference(rounded, own) + (2 * len(notes.windows)) ** 0.5 * _sums(own, own.shape[-1])
    lost = _lost_windows(model, config, notes)
    if lost:
        return Verdict(tuple(lost)), budget
    batch = shared_prefix_batch(pairs).to(device)
    inputs = attention.model_inputs(batch.layout, device)
    row = backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs)[0][0]
    missing = notes.windows.keys() - batch.layout.called.modules
    if missing:
        return Verdict((f"{name} does not hand the layout to {len(missing)} of its layers",)), budget
    packed = row[batch.layout.index.to(row.device)]
    found = _difference(packed, own)
    if not found <= budget:
        wrong = f"{name}'s packed rows differ from separate ones by {found:.2g} of a hidden state, "
        return Verdict((wrong + f"rounding explains {budget:.2g}",)), budget
    return Verdict((), (), frozenset(notes.windows)), budget


def _one_at_a_time(backbone: nn.Module, sequences: list[list[int]], device: torch.device) -> Tensor:
    rows = [torch.tensor([s], device=device) for s in sequences]
    return torch.cat([backbone(input_ids=ids, use_cache=False)[0][0] for ids in rows])


def _padded_pass(backbone: nn.Module, sequences: list[list[int]], device: torch.device) -> Tensor:
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return backbone(input_ids=ids, attention_mask=mask, use_cache=False)[0][mask.bool()]


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


def _eps(x: Tensor) -> float:
    """Of what x is computed in: a GPU's fp32 products may be in TF32."""
    return 2.0**-10 if x.is_cuda and x.dtype == torch.float32 else torch.finfo(x.dtype).eps


def _sums(x: Tensor, width: int) -> float:
    """By how much sums of `width` products differ in another order, relative; 16-bit ones are summed in fp32, but on a
    GPU the parts of a split sum in 16 bits."""
    eps = torch.finfo(x.dtype).eps
    parts = eps if x.is_cuda and x.element_size() == 2 else 0.0
    return width**0.5 * min(eps, torch.finfo(torch.float32).eps) + parts


class _Rounding:
    """Changes each element of an attention output by the most that rounding may, see the top of the file."""

    def __init__(self, width: int):
        self.width = width

    def __call__(self, _module: nn.Module, out: tuple, _keywords: dict) -> tuple:
        result = out[0]  # under autocast in its dtype
        amount = 4 * _eps(result) + 2 * _sums(result, self.width)
        signs = torch.randint(2, result.shape, device=result.device) * 2 - 1
        wide = result if result.dtype == torch.float64 else result.float()
        return ((wide * (1 + signs * amount)).to(result.dtype), *out[1:])


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


def _in_training(model: nn.Module, backbone: nn.Module, ids: Tensor) -> tuple[list[str], bool]:
    """Attention dropout, which shared-prefix attention has not, and layers that are left out at random; and whether
    random numbers that are drawn make a difference: older transformers draw one for a layer that stays in any case."""
    notes, name = _Notes(), type(model).__name__
    before = _random_state(ids.device)
    with mode(model, training=True), attention.observed(notes):
        first = backbone(input_ids=ids, use_cache=False)[0]
        drawn = not all(map(torch.equal, before, _random_state(ids.device)))
        draws = drawn and not torch.equal(first, backbone(input_ids=ids, use_cache=False)[0])
    reasons = [f"{name} has attention dropout ({notes.dropout}), which packed rows have not"] if notes.dropout else []
    if any(isinstance(rate := getattr(m, "layerdrop", 0.0), (int, float)) and rate > 0 for m in model.modules()):
        reasons.append(f"{name} leaves out layers at random (layerdrop)")
    return reasons, draws


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
