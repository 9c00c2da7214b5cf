"""What stands for the logits in TRL's code, where that asks for logits: statistics of each token instead.

TRL's losses and metrics reduce (B, T, V) logits to numbers of each token by a few operations: the log-prob of the
label, the logarithm of the sum of squared probabilities, the mean, the largest, the entropy. `TokenLogits` answers
those from what the head kept, so TRL's code computes what it always does; any other raises TypeError.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..rows import IGNORED

# What torch hands on for `cross_entropy(logits, labels)`
_PLAIN = dict(weight=None, size_average=None, reduce=None, reduction="mean", label_smoothing=0.0)


@dataclass
class TokenLogits:
    """Logits (..., V) that are not there. Positions without a label count as zero in every statistic.

    Normalised, as log-softmax leaves them: they have the same softmax, and a logsumexp of zero. `mean`, which TRL
    reports, is of those that the model would have given.
    """

    labels: Tensor  # (...) int64: whose log-probs are kept, IGNORED where none is
    logps: Tensor  # (...) fp32, with gradients; so are the others, without
    vocabulary: int
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    meaning: str = "logits"  # or what was made of them: "log-probs", "doubled", "probs", "probs * log-probs"

    # --- what a tensor is

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.logps.shape, self.vocabulary))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.logps.dtype

    @property
    def device(self) -> torch.device:
        return self.logps.device

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: int) -> int:
        """Zero: no kernel can run on them."""
        return 0

    def __len__(self) -> int:
        return len(self.logps)

    # --- parts of it

    def __getitem__(self, key) -> "TokenLogits":
        whole = isinstance(key, tuple) and (Ellipsis in key or len(key) == self.ndim) and key[-1] == slice(None)
        if whole:
            key = key[:-1]  # the vocabulary
        return self._map(lambda values: values[key])

    def __iter__(self) -> Iterator["TokenLogits"]:
        return (self[i] for i in range(len(self)))

    def contiguous(self) -> "TokenLogits":
        return self

    def float(self) -> "TokenLogits":
        return self

    def detach(self) -> "TokenLogits":
        return self._map(Tensor.detach)

    def chunk(self, chunks: int, dim: int = 0) -> list["TokenLogits"]:
        self._among_tokens("chunk", dim)
        return self.split(-(-len(self) // chunks))

    def split(self, size: int, dim: int = 0) -> list["TokenLogits"]:
        self._among_tokens("split", dim)
        return [self[start : start + size] for start in range(0, len(self), size)]

    def index_select(self, dim: int, index: Tensor) -> "TokenLogits":
        self._among_tokens("index_select", dim)
        return self._map(lambda values: values.index_select(dim, index))

    def reshape(self, *shape: int) -> "TokenLogits":
        return self._map(lambda values: values.reshape(shape[:-1]))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> "TokenLogits":
        self._among_tokens("flatten", end_dim)
        return self._map(lambda values: values.flatten(start_dim, end_dim))

    # --- what is asked of it

    def log_softmax(self, dim: int, **_unused) -> "TokenLogits":
        return self._as("log-probs", "log_softmax", dim, ("logits", "log-probs"))

    def exp(self) -> "TokenLogits":
        return self._as("probs", "exp", -1, ("log-probs",))

    def __mul__(self, other) -> "TokenLogits":
        if isinstance(other, (int, float)) and other == 2:
            return self._as("doubled", "2 * ", -1, ("logits", "log-probs"))
        if isinstance(other, TokenLogits) and {self.meaning, other.meaning} == {"probs", "log-probs"}:
            return replace(self, meaning="probs * log-probs")
        return NotImplemented

    __rmul__ = __mul__

    def gather(self, dim: int, index: Tensor) -> Tensor:
        self._of_tokens("gather", dim, ("logits", "log-probs"))
        if index.shape != (*self.logps.shape, 1):
            raise _not_there(f"gather of {tuple(index.shape)}")
        self._check_labels(index.squeeze(-1))
        return self.logps.unsqueeze(-1)

    def cross_entropy(self, target: Tensor, ignore_index: int = IGNORED, **options) -> Tensor:
        self._of_tokens("cross_entropy", -1, ("logits",))
        if options != _PLAIN:
            raise _not_there(f"cross_entropy with {options}")
        counted = target != ignore_index
        self._check_labels(target)
        return -(self.logps * counted).sum() / counted.sum()

    def logsumexp(self, dim: int) -> Tensor:
        self._of_tokens("logsumexp", dim, ("logits", "log-probs", "doubled"))
        return self._kept("log_sum_sq_probs") if self.meaning == "doubled" else torch.zeros_like(self.logps)

    def mean(self, dim: int | None = None) -> Tensor:
        self._of_tokens("mean", -1 if dim is None else dim, ("logits",))
        return self._kept("mean_logits") if dim is not None else self._kept("mean_logits").mean()

    def sum(self, dim: int) -> Tensor:
        self._of_tokens("sum", dim, ("probs * log-probs",))
        return -self._kept("entropy")

    def argmax(self, dim: int) -> Tensor:
        """The label where that is it; elsewhere no token."""
        self._of_tokens("argmax", dim, ("logits", "log-probs", "probs"))
        return torch.where(self._kept("is_top1"), self.labels, -1)

    @classmethod
    def __torch_function__(cls, func: Callable, types, args=(), kwargs=None) -> Any:
        name = func.__name__
        if not args or not isinstance(args[0], cls) or not callable(getattr(cls, name, None)):
            raise _not_there(name)
        return getattr(args[0], name)(*args[1:], **(kwargs or {}))

    # --- helpers

    def _map(self, function: Callable[[Tensor], Tensor]) -> "TokenLogits":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: function(x) for name, x in values.items() if isinstance(x, Tensor)})

    def _as(self, meaning: str, name: str, dim: int, of: tuple[str, ...]) -> "TokenLogits":
        self._of_tokens(name, dim, of)
        return replace(self, meaning=meaning)

    def _of_tokens(self, name: str, dim: int, of: tuple[str, ...]) -> None:
        if dim not in (-1, self.ndim - 1) or self.meaning not in of:
            raise _not_there(f"{name} of {self.meaning} over dimension {dim}")

    def _among_tokens(self, name: str, dim: int) -> None:
        if dim in (-1, self.ndim - 1):
            raise _not_there(f"{name} of the vocabulary")

    def _kept(self, name: str) -> Tensor:
        if getattr(self, name) is None:
            raise _not_there(name)
        return getattr(self, name)

    def _check_labels(self, index: Tensor) -> None:
        """Whoever asks for other labels would get wrong numbers. On a GPU the host does not wait to know that."""
        same = ((index == self.labels) | (self.labels == IGNORED)).all()
        torch._assert_async(same, "dpo_fast.trl: log-probs of other labels than the batch's completions were asked for")


def _not_there(what: str) -> TypeError:
    return TypeError(
        f"dpo_fast.trl keeps statistics of each token instead of logits, and not what was asked for: {what}; code that "
        "reads logits itself needs TRL's own trainer"
    )
