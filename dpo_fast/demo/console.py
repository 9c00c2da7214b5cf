"""What a person sees in the terminal: steps, one progress line at a time, and no noise of libraries."""

import sys
import time
import warnings

import datasets
import transformers


def quiet_libraries() -> None:
    """Leave the terminal to the demo: no progress bars and no warnings of transformers and datasets."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


class Progress:
    """A progress line: redrawn in a terminal, printed at each quarter elsewhere."""

    def __init__(self, label: str):
        self.label, self.started, self.drawn, self.quarter = label, time.perf_counter(), 0.0, 0
        self.terminal = sys.stdout.isatty()

    def __call__(self, step: int, steps: int, text: str = "") -> None:
        now = time.perf_counter()
        done = step >= steps
        line = f"  {self.label:<28} {step:>5}/{steps}  {text}  {now - self.started:4.0f} s"
        if self.terminal and (done or now - self.drawn > 0.1):
            filled = 24 * step // max(steps, 1)
            print(f"\r  {'━' * filled}{' ' * (24 - filled)}{line}", end="\n" if done else "", flush=True)
            self.drawn = now
        elif not self.terminal and (done or 4 * step // max(steps, 1) > self.quarter):
            self.quarter = 4 * step // max(steps, 1)
            print(line, flush=True)


class TrainerProgress(transformers.TrainerCallback):
    """The same for a Trainer (give it disable_tqdm=True and remove its PrinterCallback)."""

    def __init__(self, label: str):
        self.progress, self.text = Progress(label), ""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.text = f"loss {logs['loss']:.3f}  margin {logs['rewards/margins']:5.2f}"

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps, self.text)
