"""One provider of `benchmarks.train_step` in a process of its own, so that its peak memory is its own.

    python -m benchmarks.train_step.worker '{"provider": "trl", ...}'

Builds the trainer, then waits for a line on stdin before each optimizer step, so that providers can take turns on one
machine. Answers on stdout in lines of JSON: ready, one per step, done; whatever libraries print goes to stderr.
"""

import functools
import importlib.util
import inspect
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .profile import Profile

PROVIDERS = ("trl", "trl-compact", "dpo_fast.trl", "FastDPOTrainer")
# FastDPOTrainer with one thing taken out: a packed row in which each sequence has a prompt of its own; padded rows, of
# which each has one, too; logits of the scored tokens, made by the model's head
FACTORS = tuple(f"FastDPOTrainer-without-{factor}" for factor in ("sharing", "packing", "head"))


@dataclass(frozen=True)
class Job:
    """What a worker does; knobs that are not of the provider are the same for all."""

    provider: str
    folder: str  # what inputs.write_inputs wrote
    mode: str  # full, lora
    reference: str  # memory, precomputed
    checkpointing: bool
    dtype: str  # of the parameters: float32, bfloat16
    bf16: bool  # autocast
    pairs_per_step: int
    steps: int
    learning_rate: float
    longest: int
    threads: int
    seed: int
    optim: str
    profile: int  # last steps that a profiler looks at

    def dumps(self) -> str:
        return json.dumps(asdict(self))


def reason_against(provider: str) -> str | None:
    """Why it cannot run here; None if it can."""
    needed = ("datasets",) if provider.startswith("FastDPOTrainer") else ("datasets", "trl")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return f"{' and '.join(absent)} not installed"
    if provider != "trl-compact":
        return None
    if torch.cuda.is_available():
        return "trl scores completion tokens only on this device by itself"
    try:
        from trl.trainer import utils

        if "compact = _use_triton(" in inspect.getsource(utils.add_fused_lm_head):
            return None
    except (ImportError, AttributeError):
        pass
    return "this trl has no rule to switch on: no `compact` in trl.trainer.utils.add_fused_lm_head"


def score_completions_only() -> None:
    """TRL's head gathers the tokens that have a label before its products where Triton runs, and takes prompts and
    padding along elsewhere. From here on it gathers here, too; its kernels ask a function of their own."""
    from trl.trainer import utils

    utils._use_triton = lambda device: True


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(job.threads)
    clock = time.perf_counter(), time.process_time()
    trainer, imported_mib = build(job)
    turns = Turns(answers, job)
    trainer.add_callback(turns.callback())
    check_tokens(trainer, Path(job.folder))
    setup = {"wall_s": time.perf_counter() - clock[0], "processor_s": time.process_time() - clock[1]}
    turns.say("ready", setup=setup, imported_mib=imported_mib)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    turns.say("done", logs=logs, shares=turns.shares, **peaks())
    return 0


class Turns:
    """Waits for its turn and times it: all between two steps' ends, hence collation and logging too."""

    def __init__(self, answers, job: Job):
        self.answers, self.unprofiled, self.profile, self.profiled_s = answers, job.steps - job.profile, None, 0.0
        self.shares: dict[str, float] | None = None

    def say(self, event: str, **values) -> None:
        self.answers.write(json.dumps({"event": event, **values}) + "\n")

    def wait(self, step: int) -> None:
        """step: how many were taken."""
        if not sys.stdin.readline():
            raise SystemExit("the benchmark is gone")
        if step == self.unprofiled:
            self.profile = Profile()
        self.wall, self.processor = time.perf_counter(), time.process_time()

    def finished(self, last: bool) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, processor = time.perf_counter() - self.wall, time.process_time() - self.processor
        if self.profile:
            self.profiled_s += wall
            if last:
                self.shares = self.profile.shares(self.profiled_s)
        self.say("step", wall_s=wall, processor_s=processor)

    def callback(self):
        import transformers

        turns = self

        class Callback(transformers.TrainerCallback):
            def on_train_begin(self, args, state, control, **_):
                turns.wait(0)

            def on_step_end(self, args, state, control, **_):
                last = state.global_step == state.max_steps
                turns.finished(last)
                if not last:
                    turns.wait(state.global_step)

        return Callback()


def build(job: Job):
    """(trainer, MiB that the process held before it built anything)."""
    import datasets

    provider, _, without = job.provider.partition("-without-")
    if provider == "FastDPOTrainer":
        from dpo_fast import FastDPOConfig as Config
        from dpo_fast import FastDPOTrainer as Trainer
    else:
        from trl import DPOConfig as Config

        if job.provider == "dpo_fast.trl":
            from dpo_fast.trl import DPOTrainer as Trainer
        else:
            from trl import DPOTrainer as Trainer
        if job.provider == "trl-compact":
            score_completions_only()
    peft_config = None
    if job.mode == "lora":
        import peft

        peft_config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    imported_mib = status_mib("VmRSS")
    rows = [json.loads(line) for line in (Path(job.folder) / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = datasets.Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows])
    args = Config(
        output_dir=str(Path(job.folder) / job.provider),
        model_init_kwargs={"dtype": job.dtype},
        use_cpu=not torch.cuda.is_available(),
        bf16=job.bf16,
        per_device_train_batch_size=job.pairs_per_step,
        max_steps=job.steps,
        learning_rate=job.learning_rate,
        lr_scheduler_type="constant",
        optim=job.optim,
        gradient_checkpointing=job.checkpointing,
        precompute_ref_log_probs=job.reference == "precomputed",
        max_length=job.longest,
        beta=0.1,
        train_sampling_strategy="sequential",
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=job.seed,
        **({"layout": "padded"} if without == "packing" else {}),
    )
    model = str(Path(job.folder) / "model")
    trainer = Trainer(model, args=args, train_dataset=texts, peft_config=peft_config)
    if without == "sharing":
        trainer.data_collator = functools.partial(unshared, trainer.data_collator.truncation)
    elif without == "head":
        # Its own hook keeps a head from being read: it is called, as in any model
        models = [trainer.model, *filter(None, [getattr(trainer.reference, "model", None)])]
        for model in {id(m): m for m in models}.values():
            model.get_output_embeddings().register_forward_hook(lambda *_: None)
    return trainer, imported_mib


def unshared(truncation, rows: list):
    """A packed row of pairs in which each sequence has its prompt to itself."""
    from dpo_fast.layout import packed_batch

    pairs = [truncation(row) for row in rows]
    sides = [side for p in pairs for side in ((p.chosen_prompt, p.chosen), (p.rejected_prompt, p.rejected))]
    numbers = [s for i in range(len(pairs)) for s in (i, len(pairs) + i)]
    return packed_batch([[[*prompt, *ids]] for prompt, ids in sides], [len(prompt) for prompt, _ in sides], numbers)


def check_tokens(trainer, folder: Path) -> None:
    """Raise unless the trainer's tokenisation arrived at the ids that all providers train on."""
    expected = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        if list(trainer.train_dataset[name]) != [row[name] for row in expected]:
            raise RuntimeError(f"{type(trainer).__name__} trains on other {name} than it was given")


def peaks() -> dict:
    """Peak memory in MiB: of the process, and of the device's allocator where there is a device."""
    found = {"peak_process_mib": status_mib("VmHWM")}
    if torch.cuda.is_available():
        found["peak_device_mib"] = torch.cuda.max_memory_allocated() / 2**20
        found["peak_reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
    return found


def status_mib(name: str) -> float | None:
    """A line of /proc/self/status; VmHWM, unlike getrusage's maximum, starts anew with the program."""
    status = Path("/proc/self/status")
    if not status.exists():
        if name != "VmHWM":
            return None
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    lines = status.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    raise SystemExit(main())
