"""What each framework's script gets and gives: a model and its pairs, a measure, a file of numbers.

A script runs in its framework's environment, without anything of this repository's own:

    python -m benchmarks.interop.NAME before|after OUT.json

    task = Task.of_command_line()          # task.way is "before" or "after"
    if task.way == "before":
        # swap: before
        from framework import Trainer
        # swap: after
    else:
        from dpo_fast.framework import Trainer
        # swap: end
    trainer = ...                          # task.model, task.pairs(), PAIRS, STEPS, LEARNING_RATE ...; AdamW, fp32
    with Measure() as measure:
        trainer.train()                    # with measure.callback(), or measure.step() after each optimizer step
    task.write(**logged(trainer), weights=trainer.model.state_dict(), measured=measure.measured())

What stands between the marks is what docs/swap.md prints: `else:` and comments aside, those lines and no others are the
swap.
"""

import ctypes
import gc
import importlib.metadata
import json
import platform
import random
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ..train_step.inputs import MIXES, Shape, make_pairs, word_tokenizer
from ..train_step.worker import status_mib

SHAPE, MIX = Shape(4, 256, 768, 4, 4, 32_000), MIXES["chat"]
STEPS, PAIRS, LONGEST, SEED = 6, 4, 1024, 0  # optimizer steps, pairs of each, tokens of prompt + completion
LEARNING_RATE, BETA = 1e-4, 0.1
ADAM_EPSILON = 1e-6  # with 1e-8 Adam makes full steps of gradients that are rounding alone
DPO_SETTINGS = dict(  # of TRL's DPOConfig
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    per_device_train_batch_size=PAIRS,
    max_steps=STEPS,
    learning_rate=LEARNING_RATE,
    adam_epsilon=ADAM_EPSILON,
    beta=BETA,
    max_length=LONGEST,
    lr_scheduler_type="constant",
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
# A word of a message is a token, and a whole answer ends with EOS, as without a template
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] + (' </s>' if m['role'] == 'assistant' else ' ') }}{% endfor %}"


@dataclass(frozen=True)
class Task:
    way: str  # before, after
    out: Path
    options: tuple[str, ...] = ()  # what the table gives the script besides

    @classmethod
    def of_command_line(cls) -> "Task":
        way, out, *options = sys.argv[1:]
        if way not in ("before", "after"):
            raise SystemExit(f"usage: {sys.argv[0]} before|after OUT.json, got {way!r}")
        torch.set_num_threads(1)
        torch.manual_seed(SEED)
        task = cls(way, Path(out).resolve(), tuple(options))
        prepare(task.folder)
        return task

    @property
    def folder(self) -> Path:
        """Beside the file of numbers: scripts that write there share it."""
        return self.out.parent / "task"

    @property
    def model(self) -> str:
        """A folder with the model in fp32 and its tokenizer, whose words are "t17" for token 17."""
        return str(self.folder / "model")

    def pairs(self) -> list[dict]:
        """STEPS x PAIRS of them, in the order of training: texts `prompt`, `chosen`, `rejected`, and `prompt_ids`,
        `chosen_ids`, `rejected_ids`, of which the last two end with EOS."""
        return json.loads((self.folder / "pairs.json").read_text(encoding="utf-8"))

    def write(
        self,
        losses: list[float],
        grad_norms: list[float],
        metrics: dict[str, list[float]],
        weights: Mapping[str, torch.Tensor],
        measured: dict,
    ) -> None:
        """A number per step; `weights` are those after the last."""
        for name, curve in {"losses": losses, "grad_norms": grad_norms, **metrics}.items():
            if len(curve) != STEPS:
                raise ValueError(f"{name} has {len(curve)} numbers for {STEPS} steps")
        torch.save({name: w.detach().float().cpu() for name, w in weights.items()}, self.out.with_suffix(".pt"))
        versions = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
        versions = {"python": platform.python_version(), **dict(sorted(versions.items()))}
        found = {"losses": losses, "grad_norms": grad_norms, "metrics": metrics, "measured": measured}
        self.out.write_text(json.dumps({**found, "versions": versions}), encoding="utf-8")


def prepare(folder: Path) -> None:
    """Model, tokenizer and pairs to `folder`, if it is not there: the same bytes each time."""
    if folder.is_dir():
        return
    write_model(folder / "model")
    pairs = make_pairs(MIX, STEPS * PAIRS, LONGEST, SHAPE.vocab, SEED)
    rng = random.Random(SEED)
    (folder / "pairs.json").write_text(json.dumps([foreseen(pair, rng) for pair in pairs]), encoding="utf-8")


def write_model(folder: Path) -> None:
    """A model that foresees most tokens, as one that is aligned does: after token t it expects t + 1.

    An untrained model's log-probs, ten nats a token, add up to thousands, which fp32 rounds by more than what is
    compared here. Its tokenizer has a chat template.
    """
    torch.manual_seed(SEED)
    model = transformers.AutoModelForCausalLM.from_config(SHAPE.config(2 * LONGEST), dtype=torch.float32)
    directions = torch.nn.functional.normalize(torch.randn(SHAPE.vocab, SHAPE.width), dim=1)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(SHAPE.width**0.5 * directions)
        model.get_output_embeddings().weight.copy_(directions.roll(1, 0))
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(SHAPE.vocab)
    tokenizer.chat_template, tokenizer.model_max_length = CHAT_TEMPLATE, 2 * LONGEST
    tokenizer.save_pretrained(folder)


def foreseen(pair: dict, rng: random.Random) -> dict:
    """The pair with nine of ten tokens after their predecessors, so that the model expects them."""
    changed = {}
    for name in ("prompt", "chosen", "rejected"):
        *ids, last = pair[f"{name}_ids"]
        before = changed["prompt_ids"][-1] if changed else ids[0]
        for i, other in enumerate(ids):
            before = ids[i] = before + 1 if rng.random() < 0.9 and before + 1 < SHAPE.vocab else other
        changed[f"{name}_ids"] = [*ids, last]
        words = [*ids, last] if name == "prompt" else ids  # EOS is no word
        changed[name] = " " * (name != "prompt") + " ".join(f"t{i}" for i in words)
    return changed


class Measure:
    """Seconds of each optimizer step inside, and the peak of the process's memory above what stood before. Linux."""

    def __enter__(self) -> "Measure":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as held
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: proc(5)
        self.start_mib, self.marks = status_mib("VmRSS"), [_clocks()]
        return self

    def step(self) -> None:
        """Called at the end of each optimizer step."""
        self.marks.append(_clocks())

    def __exit__(self, *_) -> None:
        self.peak_mib = status_mib("VmHWM") - self.start_mib

    def callback(self):
        """For a Hugging Face Trainer: calls `step`."""
        measure = self

        class Steps(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                measure.step()

        return Steps()

    def measured(self) -> dict:
        """Seconds per step, and MiB. A first step holds what is done once: sizes that are asked for, layouts proven."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if len(pairs) != STEPS:
            raise ValueError(f"{len(pairs)} steps were measured of {STEPS}")
        processor, wall = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))
        return {"processor_s": processor, "wall_s": wall, "peak_mib": self.peak_mib, "start_mib": self.start_mib}


class Watch(transformers.TrainerCallback):
    """For an entry that trains by itself: measures from the beginning of training to its end, and keeps what the entry
    does not return."""

    last: "Watch"  # where the entry makes it

    def __init__(self, *_):
        self.measure = Measure()
        Watch.last = self

    def on_train_begin(self, args, state, control, model, **_):
        self.model, self.state = model, state
        self.measure.__enter__()

    def on_step_end(self, args, state, control, **_):
        self.measure.step()

    def on_train_end(self, args, state, control, **_):
        self.measure.__exit__()


def _clocks() -> tuple[float, float]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime, time.perf_counter()


def logged(trainer) -> dict:
    """`losses`, `grad_norms` and `metrics` of a Hugging Face Trainer that logs each step."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    curves = {name: [float(log[name]) for log in logs] for name in logs[0]}
    for name in ("epoch", "step", "learning_rate"):
        curves.pop(name, None)
    return {"losses": curves.pop("loss"), "grad_norms": curves.pop("grad_norm"), "metrics": curves}


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
