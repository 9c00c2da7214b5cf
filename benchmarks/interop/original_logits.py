"""The loop of original.py, whose logits are scored by `get_batch_logps`: for a model that cannot do without."""

from . import original
from .task import Task


def main() -> None:
    task = Task.of_command_line()
    if task.way == "after":
        # swap: before
        # swap: after
        from dpo_fast import get_batch_logps as _get_batch_logps

        # swap: end
        original._get_batch_logps = _get_batch_logps
    original.main(task, way="before")


if __name__ == "__main__":
    main()
