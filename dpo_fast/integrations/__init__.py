"""Adapters to frameworks that train with a DPO trainer of their own, one file each: see docs/swap.md.

    llamafactory   `swap()`, or python -m dpo_fast.integrations.llamafactory train dpo.yaml
    axolotl        a class to name in the YAML, trainer_cls: dpo_fast.integrations.axolotl.DPOTrainer
    ms_swift       `swap()`, in a file of --external_plugins
    openrlhf       a trainer to import in place of OpenRLHF's
    torchtune      log-probs of torchtune's decoder without its logits

Nothing here acts on import: a swap is a call, or a class that is named, and says so in a line of the log.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("dpo_fast")


class Swap(contextlib.ExitStack):
    """What is replaced until `undo()`, or until the end of a `with` block."""

    undo = contextlib.ExitStack.close

    def replace(self, owner: type, name: str, of: Callable[[Callable], Callable]) -> None:
        """owner.name = of(owner.name), which must take the same arguments.

        Raises ImportError where the installed framework has no such method or one with other arguments, RuntimeError
        where it is replaced already.
        """
        theirs: Any = vars(owner).get(name)
        if theirs is None:
            raise ImportError(f"{_known(owner)} has no method {name}: its version is not one that this swap knows")
        ours = of(theirs)
        if theirs.__code__ is ours.__code__:
            raise RuntimeError(f"{_known(owner)}.{name} is swapped already: call undo() of that swap before")
        if _arguments(theirs) != _arguments(ours):
            raise ImportError(
                f"{_known(owner)}.{name} takes ({_arguments(theirs)}), and this swap knows ({_arguments(ours)}): its "
                "version is not one that this swap knows"
            )
        setattr(owner, name, ours)
        self.callback(setattr, owner, name, theirs)
        logger.warning("dpo_fast: %s.%s is swapped: packed rows, no logits; undo() ends it", _known(owner), name)


def _known(owner: type) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"


def _arguments(function: Callable) -> str:
    return ", ".join(inspect.signature(function).parameters)


@functools.cache
def say_once(line: str) -> None:
    logger.warning("dpo_fast: %s", line)
