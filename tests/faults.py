"""`make faults`: runs that are killed at a moment drawn by chance, half of them in a save, and taken up again without
naming a folder. Each ends as one that was left alone does, bit for bit: losses, gradient norms, margins and weights.

    python tests/faults.py [--kills 40] [--seed 0] [--only NAME]

Prints a line for each kind of run; exit status 1 where one ends otherwise. The runs are forks of this process, which
has imported everything, so a kill costs a second or two.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))

import datasets
import torch
from safetensors.torch import load_file
from tiny import QUIET, save_inputs, tiny_model, tiny_rows, tiny_tokenizer

from dpo_fast import FastDPOConfig, FastDPOTrainer, cli
from dpo_fast.training import checkpoints, launch, outcome  # noqa: F401  # imported once, here

STEPS, SAVE, FILES = 24, 4, 9  # a checkpoint has ten files or more
COMMON = dict(max_steps=STEPS, save_steps=SAVE, logging_steps=1, learning_rate=1e-2, use_cpu=True, report_to="none")
COMMON |= dict(save_strategy="steps", per_device_train_batch_size=2, samples=0, disable_tqdm=True, seed=3)
# name -> (share of the kills, keys of the recipe); 20 pairs make 10 batches of 2, so each run is of several epochs
KINDS = {
    "all weights, AdamW, dropout": (5, dict(disable_dropout=False)),
    "LoRA, dropout": (5, dict(lora_r=4, lora_dropout=0.1, disable_dropout=False)),
    "reference precomputed": (4, dict(precompute_ref_log_probs=True)),
    "token budget, length groups": (4, dict(tokens_per_batch=60, train_sampling_strategy="group_by_length")),
    "length groups": (5, dict(train_sampling_strategy="group_by_length")),
    "stream": (6, None),
    "all weights, SGD": (3, dict(optim="sgd")),
    "token budget": (4, dict(tokens_per_batch=60)),
    "accumulation, two checkpoints": (4, dict(gradient_accumulation_steps=3, save_total_limit=2)),
}


def model_with_dropout():
    return tiny_model("gpt2", resid_pdrop=0.1, attn_pdrop=0.1)


def train(inputs: Path, out: Path, keys: dict | None, resume: bool) -> int:
    """One run in this process; returns its exit status."""
    if keys is not None:
        keys = {**COMMON, **keys, "model": inputs / "model", "dataset": inputs / "pairs.jsonl", "output_dir": out}
        options = [f"--{name}={value}" for name, value in keys.items()]
        return cli.main(["train", *options, *(["--resume_from_checkpoint"] if resume else [])])
    rows = datasets.Dataset.from_list(tiny_rows(15)).to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=5)
    settings = {**QUIET, **{name: COMMON[name] for name in ("max_steps", "save_steps", "save_strategy", "seed")}}
    settings |= dict(per_device_train_batch_size=2, learning_rate=1e-2, disable_dropout=False, output_dir=str(out))
    model = model_with_dropout()
    trainer = FastDPOTrainer(
        model, args=FastDPOConfig(**settings), train_dataset=rows, processing_class=tiny_tokenizer()
    )
    trainer.train(resume_from_checkpoint=resume and any(out.glob("checkpoint-*")))
    trainer.save_model()
    trainer.state.save_to_json(str(out / "results.json"))
    return 0


def start(inputs: Path, out: Path, keys: dict | None, resume: bool = False) -> int:
    """A process that trains; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    log = os.open(inputs / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        status = train(inputs, out, keys, resume)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def wait(process: int) -> int:
    """Its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def result(out: Path) -> tuple[list, dict]:
    """What a run has logged of each step, and its weights."""
    results = json.loads((out / "results.json").read_text())
    log = results.get("log") or results["log_history"]
    names = ("step", "loss", "grad_norm", "rewards/margins", "logps/chosen")
    steps = [tuple(entry.get(name) for name in names) for entry in log if "loss" in entry]
    (weights,) = [path for path in out.glob("*model.safetensors")]
    return steps, load_file(weights)


def same(one: tuple[list, dict], other: tuple[list, dict]) -> bool:
    same_weights = one[1].keys() == other[1].keys() and all(
        torch.equal(one[1][name], other[1][name]) for name in one[1]
    )
    return one[0] == other[0] and len(one[0]) == STEPS and same_weights


def kill(process: int, out: Path, seconds: float, aimed: int | None, chance: random.Random) -> None:
    """After a share of the time that a whole run takes; or, aimed, when a checkpoint has a number of its files."""
    if aimed is None:
        time.sleep(chance.uniform(0.05, 1) * seconds)
    else:
        folder, files, end = out / f"checkpoint-{aimed}", chance.randint(1, FILES), time.monotonic() + 10 * seconds
        while time.monotonic() < end and (not folder.is_dir() or len(os.listdir(folder)) < files):
            time.sleep(0.0002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="kinds whose name holds this")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    chance = random.Random(arguments.seed)
    kinds = {name: kind for name, kind in KINDS.items() if arguments.only is None or arguments.only in name}
    draws = [name for name, (share, _) in kinds.items() for _ in range(share)]
    if arguments.kills < len(draws):  # one of each kind first
        draws = [*kinds, *draws]
    draws = sorted((draws * arguments.kills)[: arguments.kills], key=list(kinds).index)
    passed = in_saves = 0
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Path(temporary)
        save_inputs(inputs, 20, model_with_dropout())
        for index, (name, (_, keys)) in enumerate(kinds.items()):
            kills = draws.count(name)
            if not kills:
                continue
            before = time.monotonic()
            if wait(start(inputs, inputs / "whole", keys)) != 0:
                print((inputs / "log.txt").read_text()[-3000:])
                return 1
            seconds, whole, good, torn = time.monotonic() - before, result(inputs / "whole"), 0, 0
            for number in range(kills):
                out = inputs / "killed"
                process = start(inputs, out, keys)
                aimed = chance.randrange(SAVE, STEPS + 1, SAVE) if (index + number) % 2 == 0 else None
                kill(process, out, seconds, aimed, chance)
                wait(process)
                torn += any(checkpoints.faults(folder) for folder in out.glob("checkpoint-*"))
                status = wait(start(inputs, out, keys, resume=True)) if out.exists() else wait(start(inputs, out, keys))
                ok = status == 0 and same(result(out), whole)
                good += ok
                if not ok:
                    print((inputs / "log.txt").read_text()[-3000:], file=sys.stderr)
                shutil.rmtree(out)
            shutil.rmtree(inputs / "whole")
            print(
                f"{name:<32} {good} of {kills} as if left alone, {torn} with a checkpoint torn by the kill", flush=True
            )
            passed, in_saves = passed + good, in_saves + torn
    print(f"{passed} of {arguments.kills}, {in_saves} of them killed in a save")
    return 0 if passed == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
