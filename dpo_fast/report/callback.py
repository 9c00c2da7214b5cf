"""`ReportCallback`: report.html and results.json of a run, written while it runs."""

import contextlib
import json
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from dpo_fast.text import clean

from . import record, run
from .files import write_text

PAUSE = 2.0  # seconds between two writes while training


class ReportCallback(transformers.TrainerCallback):
    """Writes `output_dir`/report.html and results.json when training begins, as it logs, and when it ends.

    In `FastDPOTrainer` and `dpo_fast.trl.DPOTrainer`, whose `train` introduces itself, the evaluation set is evaluated
    before and after, too; in other Trainers the files hold what they log. The page needs no server: it loads itself
    anew while training goes on. Files are replaced whole, so a killed run leaves the last ones readable.

    title: heading of the page. evaluate: whether to evaluate before and after, where there is an evaluation set.
    """

    def __init__(self, title: str | None = None, *, evaluate: bool = True):
        self.title, self.evaluate = title, evaluate
        self.run: dict = {}  # the record, see record.py
        self.more: dict = {}  # what it holds from the start, instead of what is found out
        self._trainer: Callable[[], Any] = lambda: None
        self._written = self._mark = 0.0

    def introduce(self, trainer) -> None:
        """What a trainer does, so that the page has its evaluations and what `trainer.report_facts()` says."""
        self._trainer = weakref.ref(trainer)

    # --- events --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **_):
        trainer = self._trainer()
        self._begun = time.perf_counter()
        self.run = {
            "title": self.title or f"DPO: {Path(args.output_dir).resolve().name}",
            "finished": False,
            "trainer": "" if trainer is None else f"{type(trainer).__module__}.{type(trainer).__name__}",
            "device": str(args.device),
            "processes": args.world_size,
            "pairs": None if trainer is None else _length(trainer.train_dataset),
            "settings": record.settings(args),
            "changed": record.changed(args),
            "seeds": record.seeds(args),
            "versions": record.versions(),
            "command": record.own_command(),
            "max_steps": state.max_steps,
            "first_step": state.global_step,
            "steps": state.global_step,
            "seconds": 0.0,
            "training_seconds": 0.0,
            "before": {},
            "after": {},
            "has_evaluation": None if trainer is None else trainer.eval_dataset is not None,  # None: not known
            "log": state.log_history,
            **self.more,
        }
        if trainer is not None and state.is_world_process_zero:
            self.run["facts"] = trainer.report_facts()
        self._write(args, state)  # an evaluation may take long
        if self._evaluates() and state.global_step == 0 and not args.eval_on_start:
            self.run["before"], _ = self._evaluation(state)
        self._mark = time.perf_counter()
        self._write(args, state)

    def on_step_end(self, args, state, control, **_):
        now = time.perf_counter()  # fetching the batch included; logs, evaluations and checkpoints not
        self.run["training_seconds"] += now - self._mark
        self._mark = now
        if state.global_step == self.run["first_step"] + 1 or state.global_step >= state.max_steps:
            control.should_log = True  # the first step and the last are in the log, however few there are
        return control

    def on_log(self, args, state, control, **_):
        if self.run.get("finished", True):
            return
        self.run["log"] = state.log_history
        if time.perf_counter() - self._written >= PAUSE:
            self._write(args, state)
        self._mark = time.perf_counter()

    def on_evaluate(self, args, state, control, **_):
        self._mark = time.perf_counter()

    def on_save(self, args, state, control, **_):
        self._mark = time.perf_counter()

    def on_train_end(self, args, state, control, **_):
        at_start = [logs for logs in state.log_history if logs.get("step") == 0]
        self.run["before"] = self.run["before"] or _evaluated(at_start)
        if self._evaluates() and state.global_step > 0:
            self.run["after"], pairs = self._evaluation(state, with_pairs=True)
            if pairs is not None:
                self.run["evaluated_pairs"] = pairs
        elif not self._evaluates():
            self.run["after"] = _evaluated(state.log_history)
        self.run["finished"] = True
        self._write(args, state)

    def close(self, args, state) -> None:
        """After an exception: the page says that the run ended early, and does not load itself anew."""
        if not self.run.get("finished", True):
            self.run["ended_early"] = True
            self._write(args, state)

    # --- evaluating and writing ----------------------------------------------------------------------------------

    def _evaluates(self) -> bool:
        return self.evaluate and self.run["has_evaluation"] and self._trainer() is not None

    def _evaluation(self, state, with_pairs: bool = False) -> tuple[dict, dict | None]:
        """(metrics, values of each pair where the trainer has them). The order of the training data does not change."""
        trainer, logged = self._trainer(), len(state.log_history)
        with torch.random.fork_rng(devices=[]):  # a DataLoader takes a seed from the host's generator
            if with_pairs and hasattr(trainer, "evaluate_pairs"):
                _, pairs = trainer.evaluate_pairs()
            else:
                pairs = None
                trainer.evaluate()
        return _evaluated(state.log_history[logged:]), pairs

    def _write(self, args, state) -> None:
        if not state.is_world_process_zero:
            return
        self.run |= {
            "steps": state.global_step,
            "seconds": time.perf_counter() - self._begun,
            "memory": record.peak_memory(args.device),
            "log": state.log_history,
        }
        trainer = self._trainer()
        if trainer is not None and hasattr(trainer, "report_counts"):
            self.run["counts"] = trainer.report_counts()
        self.write(Path(args.output_dir))
        self._written = time.perf_counter()

    def write(self, folder: Path) -> None:
        """Write both files from what is kept of the run."""
        cleaned = clean(self.run)
        write_text(folder / record.RESULTS, json.dumps(cleaned, indent=1, default=str) + "\n")
        write_text(folder / record.REPORT, run.page(cleaned))


@contextlib.contextmanager
def reporting(trainer) -> Iterator[None]:
    """Around a trainer's `train`: its ReportCallbacks know it, and what ends the training early is not lost on them."""
    callbacks = [found for found in trainer.callback_handler.callbacks if isinstance(found, ReportCallback)]
    for callback in callbacks:
        callback.introduce(trainer)
    try:
        yield
    except BaseException:
        for callback in trainer.callback_handler.callbacks:  # or it is drawn once more, below what is said of the end
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()
        with contextlib.suppress(OSError):  # what has ended the training may be a full disk, and is what counts
            for callback in callbacks:
                callback.close(trainer.args, trainer.state)
        raise


def _evaluated(log: list[dict]) -> dict:
    """The last values of an evaluation in a log."""
    found: dict = {}
    for logs in log:
        found |= {name: value for name, value in logs.items() if name.startswith("eval_")}
    return found


def _length(dataset) -> int | None:
    try:
        return len(dataset)
    except TypeError:  # a stream
        return None
