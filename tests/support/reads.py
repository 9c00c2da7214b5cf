"""Whose code reads from the device: what `no_sync` would refuse, counted by package."""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from no_sync import Stream, no_sync

_PACKAGES = ("dpo_fast", "trl", "accelerate", "transformers")
_TESTS = Path(__file__).parents[1]


@contextlib.contextmanager
def counted_reads() -> Iterator[tuple[Counter, Stream]]:
    reads: Counter = Counter()
    with no_sync() as stream:
        stream.refuse = lambda what: stream.off or reads.update([_innermost()])
        yield reads, stream


def _innermost() -> str:
    files = (Path(frame.filename) for frame in reversed(traceback.extract_stack()))
    names = (name for file in files if not file.is_relative_to(_TESTS) for name in file.parts)
    return next((name for name in names if name in _PACKAGES), "none of them")
