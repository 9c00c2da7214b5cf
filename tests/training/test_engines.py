"""Two ranks under DDP, FSDP2 and DeepSpeed train as one process does on the same batches: the same losses and weights.

    PYTHONPATH=tests:tests/support python tests/training/test_engines.py [WORD ...]

prints each row's largest differences, for both trainers. DeepSpeed's rows need `pip install deepspeed`.

accelerate keeps FSDP for accelerators: `admit_cpu` changes, in the ranks' own processes, what its state says of the
device, between the arguments of a training and its trainer. None of its files is touched.
"""

import contextlib
import gc
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fsdp_means import NO_MEANS, averages
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer
from torch.distributed.device_mesh import init_device_mesh

pytest.importorskip("datasets")

import datasets

from dpo_fast.copies import gathered
from dpo_fast.training.references import prepare_frozen

TRAINERS = ("fast", "drop-in")
LOSS, WEIGHT = 1e-6, 1e-5  # what rounding may change


@dataclass(frozen=True)
class Row:
    engine: str  # ddp, fsdp, zero1, zero2, zero3
    name: str
    settings: dict[str, Any] = field(default_factory=dict)  # of the trainer's config
    fsdp: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)  # of the model's config
    reference: str = ""  # "model", "path", or "": what the trainer finds by itself
    lora: tuple[str, ...] = ()
    train: int = 8  # pairs
    five: bool = False  # pairs to evaluate, for TRL's trainer, too
    early: bool = False  # evaluate() before train()
    resume: bool = False  # the last step once more, from a checkpoint
    loss: float = LOSS
    weight: float = WEIGHT
    trainers: tuple[str, ...] = TRAINERS  # that have such settings
    tested: tuple[str, ...] | None = None  # of these, None: all; the others are in the table alone

    def __str__(self) -> str:
        return f"{self.engine} {self.name}"


REENTRANT, NOT_REENTRANT = (
    dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": how}) for how in (True, False)
)
SHARDED, FULL = (dict(state_dict_type=f"{kind}_STATE_DICT") for kind in ("SHARDED", "FULL"))
OTHER, QV = dict(reference="model"), dict(lora=("q_proj", "v_proj"))
FAST, NONE = ("fast",), ()
AHEAD = dict(precompute_ref_log_probs=True)
# An optimizer with a state; its epsilon is large, or the sign of a gradient's rounding would move a weight
ADAM = dict(optim="adamw_torch", learning_rate=1e-2, adam_epsilon=1e-2)
SIMPO = dict(loss_type="simpo")
EPOCH, LEFT_OUT = dict(max_steps=-1), dict(max_steps=-1, dataloader_drop_last=True)
BF16 = dict(loss=2**-6, weight=2**-7)


def of_stage(stage: str, tested: tuple[str, ...]) -> list[Row]:
    return [
        Row(stage, "full, ref_model", **OTHER),
        Row(stage, "full, own copy", tested=tested),
        Row(stage, "full, path as ref_model", reference="path", trainers=FAST, tested=tested),
        Row(stage, "full, precompute", AHEAD, tested=tested),
        Row(stage, "full, simpo", SIMPO, trainers=FAST, tested=tested),
        Row(stage, "LoRA", tested=tested, **QV),
        Row(stage, "LoRA, precompute", AHEAD, tested=tested, **QV),
        Row(stage, "full, evaluate() first", early=True, tested=tested, **OTHER),
        Row(stage, "LoRA, evaluate() first", early=True, tested=tested, **QV),
        Row(stage, "full, resume", ADAM, resume=True, tested=tested, **OTHER),
        Row(stage, "LoRA, resume", ADAM, resume=True, tested=tested, **QV),
    ]


ROWS = [
    Row("ddp", "full, ref_model", **OTHER),
    Row("ddp", "full, uneven end", EPOCH, train=10, tested=NONE, **OTHER),  # accelerate repeats pairs
    Row("ddp", "full, uneven end left out", LEFT_OUT, train=10, **OTHER),
    Row("ddp", "accumulation, uneven end", EPOCH | dict(gradient_accumulation_steps=3), train=15, tested=NONE, **OTHER),
    Row("ddp", "evaluation of 5 pairs", five=True, tested=FAST, **OTHER),  # TRL counts repeated pairs
    Row("ddp", "LoRA", **QV),
    Row("ddp", "LoRA, checkpointing", NOT_REENTRANT, **QV),
    Row("ddp", "LoRA, reentrant checkpointing", REENTRANT, **QV),
    Row("ddp", "LoRA, evaluate() first", early=True, **QV),
    Row("ddp", "precompute, evaluate() first", AHEAD, early=True),
    Row("ddp", "simpo, evaluate() first", SIMPO, early=True, trainers=FAST),
    Row("fsdp", "full, ref_model", **OTHER),
    Row("fsdp", "full, own copy", tested=FAST),
    Row("fsdp", "full, path as ref_model", reference="path", trainers=FAST),
    Row("fsdp", "full, precompute", AHEAD, tested=FAST),
    Row("fsdp", "full, precompute, ref_model", AHEAD, **OTHER),
    Row("fsdp", "full, tied weights", model=dict(tie_word_embeddings=True), **OTHER),
    Row(
        "fsdp",
        "full, head a unit of its own",
        fsdp=dict(transformer_layer_cls_to_wrap=["LlamaDecoderLayer", "Linear"]),
        **OTHER,
    ),
    Row("fsdp", "full, bf16, checkpointing", dict(bf16=True, **NOT_REENTRANT), **OTHER, **BF16),
    Row("fsdp", "full, evaluate() first", early=True, **OTHER),
    Row(
        "fsdp",
        "full, its own checkpointing, evaluate() first",
        fsdp=dict(activation_checkpointing=True),
        early=True,
        **OTHER,
    ),
    Row("fsdp", "full, weights loaded by rank 0", fsdp=dict(cpu_ram_efficient_loading=True)),
    Row("fsdp", "full, save SHARDED, resume", ADAM, fsdp=SHARDED, resume=True, **OTHER),
    Row("fsdp", "full, save FULL, resume", ADAM, fsdp=FULL, resume=True, **OTHER),
    Row("fsdp", "LoRA", tested=FAST, **QV),
    Row("fsdp", "LoRA, precompute", AHEAD, **QV),
    Row("fsdp", "LoRA with lm_head", lora=("q_proj", "v_proj", "lm_head")),
    Row("fsdp", "LoRA, evaluate() first", early=True, **QV),
    *of_stage("zero1", tested=NONE),
    *of_stage("zero2", tested=FAST),
    *of_stage("zero3", tested=FAST),
    Row("zero3", "LoRA, checkpointing", NOT_REENTRANT, tested=FAST, **QV),
    Row("zero3", "LoRA, reentrant checkpointing", REENTRANT, tested=FAST, **QV),
    Row("zero3", "LoRA, bf16", dict(bf16=True), tested=FAST, **QV, **BF16),
    Row("zero3", "full, ref_model, bf16", dict(bf16=True), **OTHER, **BF16),
]


# --- one training --------------------------------------------------------------------------------------------------


def engine_settings(row: Row, ranks: int) -> dict:
    if ranks == 1 or row.engine == "ddp":
        return {}
    if row.engine == "fsdp":
        plain = dict(version=2, auto_wrap_policy="TRANSFORMER_BASED_WRAP", cpu_ram_efficient_loading=False)
        return dict(fsdp=True, fsdp_config={**plain, **FULL, **row.fsdp})
    config = dict(
        zero_optimization=dict(stage=int(row.engine[-1])),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        train_micro_batch_size_per_gpu="auto",
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        bf16=dict(enabled="auto"),
    )
    return dict(deepspeed=config)


def admit_cpu() -> None:
    """Let accelerate take the two gloo ranks of this process for ranks with accelerators."""
    from accelerate.state import DistributedType, PartialState

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def load(path: str):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def build(folder: Path, row: Row, trainer: str, ranks: int):
    """The trainer of a row. folder: where `prepare` has put model, reference and data."""
    options: dict[str, Any] = {}
    tied = "-tied" if row.model else ""
    if row.reference:  # a model from before the engine is known, whole, or one that the trainer loads
        path = str(folder / f"ref{tied}")
        options["ref_model"] = path if row.reference == "path" else load(path)
    settings: dict[str, Any] = {
        **QUIET,
        "output_dir": str(folder / f"{row} {trainer} {ranks}"),
        "per_device_train_batch_size": 4 // ranks,
        "per_device_eval_batch_size": 4 // ranks,
        "max_steps": 3,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        **row.settings,
        **engine_settings(row, ranks),
    }
    if row.resume:
        settings |= dict(save_strategy="steps", save_steps=2)
    if row.lora:
        import peft

        options["peft_config"] = peft.LoraConfig(r=4, target_modules=list(row.lora), init_lora_weights=False)
    if trainer == "fast":
        from dpo_fast import FastDPOConfig, FastDPOTrainer

        kind, args = FastDPOTrainer, FastDPOConfig(**settings)
    else:
        import trl

        from dpo_fast.trl import DPOTrainer

        kind, args = DPOTrainer, trl.DPOConfig(**settings)
    if ranks > 1 and row.engine == "fsdp":
        admit_cpu()
    path = str(folder / f"model{tied}")
    return kind(
        # TRL shards nothing that comes as a path where it cannot read the engine off its arguments
        path if trainer == "fast" or row.engine == "zero3" else load(path),
        args=args,
        train_dataset=datasets.load_from_disk(str(folder / f"train-{row.train}")),
        # TRL means over batches, so its last batch must be as large as the others
        eval_dataset=datasets.load_from_disk(str(folder / f"eval-{8 if trainer == 'drop-in' and not row.five else 5}")),
        processing_class=tiny_tokenizer(),
        **options,
    )


def prepare(folder: Path, rows: list[Row]) -> None:
    for tied in (False, True):
        for name, seed in (("model", 0), ("ref", 3)):
            model = tiny_model(seed=seed, tie_word_embeddings=tied)
            model.save_pretrained(folder / f"{name}{'-tied' if tied else ''}")
    for count in {row.train for row in rows}:
        datasets.Dataset.from_list(tiny_rows(count)).save_to_disk(str(folder / f"train-{count}"))
    for count in (5, 8):
        datasets.Dataset.from_list(tiny_rows(count, seed=3)).save_to_disk(str(folder / f"eval-{count}"))


def weights_of(trainer) -> dict[str, torch.Tensor]:
    """All trained weights, whole."""
    model, found = trainer.accelerator.unwrap_model(trainer.model), {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        with gathered(p):
            whole = p.full_tensor() if hasattr(p, "full_tensor") else p
            found[name.replace("_checkpoint_wrapped_module.", "")] = whole.detach().float().clone()
    return found


def train(folder: Path, row: Row, trainer: str, ranks: int, resume: bool = False) -> dict:
    """{"losses": {name: loss or margin}, "weights": {name: tensor}}; resume: from the checkpoint of the second step."""
    torch.manual_seed(0)
    built = build(folder, row, trainer, ranks)
    start = weights_of(built) if ranks == 1 else {}
    early = built.evaluate() if row.early else {}
    built.train(resume_from_checkpoint=str(Path(built.args.output_dir) / "checkpoint-2") if resume else None)
    logged = {f"loss {log['step']}": log["loss"] for log in built.state.log_history if "loss" in log}
    for when, metrics in (("before", early), ("after", built.evaluate())):
        logged |= {f"{when} {name}": metrics[name] for name in metrics if "loss" in name or "margins" in name}
    weights = weights_of(built)
    assert not start or max((weights[name] - start[name]).abs().max() for name in start) > 100 * WEIGHT
    return {"losses": logged, "weights": weights}


# --- two ranks -----------------------------------------------------------------------------------------------------


def clean() -> None:
    """What one training leaves behind for the next one in this process."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    gc.collect()


def rank(folder: Path, names: list[str]) -> None:
    if any(name.startswith("zero") for name in names):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        torch.distributed.init_process_group("gloo")
    if any(name.startswith("fsdp") for name in names) and not averages(init_device_mesh("cpu", (2,))):
        os._exit(NO_MEANS)
    for row, trainer in jobs(names):
        found: Any
        try:
            found = train(folder, row, trainer, 2)
            if row.resume:
                clean()
                found["resumed"] = train(folder, row, trainer, 2, resume=True)
        except (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
            found = f"{type(error).__name__}: {error}", traceback.format_exc()
        clean()
        torch.save(found, folder / f"{row} {trainer}.{torch.distributed.get_rank()}.pt")
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads at times abort a process that leaves the long way, with nothing left to do


def jobs(names: list[str]) -> list[tuple[Row, str]]:
    return [(row, trainer) for row in ROWS for trainer in row.trainers if f"{row} {trainer}" in names]


def run(folder: Path, names: list[str]) -> dict[str, Any]:
    """Row and trainer -> its largest differences {"loss": ..., "weight": ...}, or (error, traceback)."""
    prepare(folder, [row for row, _ in jobs(names)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    (folder / "names.json").write_text(json.dumps(names))
    logs = [open(folder / f"log.{index}", "w") for index in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(folder)],
            env={**environment, "RANK": str(index), "LOCAL_RANK": str(index)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for index, log in enumerate(logs)
    ]
    alone: dict[str, dict] = {}
    try:
        for row, trainer in jobs(names):
            if (same := in_one_process(row, trainer)) not in alone:
                alone[same] = train(folder, row, trainer, 1)
                clean()
        statuses = [process.wait(timeout=600) for process in ranks]
    finally:
        for process, log in zip(ranks, logs, strict=True):
            process.kill()
            log.close()
    if NO_MEANS in statuses:
        pytest.skip(f"FSDP2 of torch {torch.__version__} adds up gradients on CPU where it should average them")
    assert statuses == [0, 0], (folder / "log.0").read_text()[-3000:]
    return {
        f"{row} {trainer}": compared(alone[in_one_process(row, trainer)], *results_of(folder, row, trainer))
        for row, trainer in jobs(names)
    }


def results_of(folder: Path, row: Row, trainer: str) -> list:
    return [torch.load(folder / f"{row} {trainer}.{index}.pt") for index in range(2)]


def in_one_process(row: Row, trainer: str) -> str:
    """The trainings with equal ones are equal in one process."""
    return repr((trainer, row.settings, row.model, row.reference, row.lora, row.train, row.five, row.early))


def compared(alone: dict, first, second):
    """The largest differences of two ranks, and of what is resumed, from one process."""
    if isinstance(first, tuple) or isinstance(second, tuple):
        return first if isinstance(first, tuple) else second
    found = [differing(alone, first), differing(first, second)]
    if "resumed" in first:
        found.append(differing(first, first["resumed"]))
    return {kind: max(one[kind] for one in found) for kind in found[0]}


def differing(one: dict, other: dict) -> dict[str, float]:
    """Of losses that both have: what is resumed has fewer."""
    both = one["losses"].keys() & other["losses"].keys()
    assert both and one["weights"].keys() == other["weights"].keys()
    losses = [abs(one["losses"][name] - other["losses"][name]) for name in both]
    weights = [(one["weights"][name] - other["weights"][name]).abs().max().item() for name in one["weights"]]
    return {"loss": max(losses), "weight": max(weights)}


# --- tests ---------------------------------------------------------------------------------------------------------


def names_of(group: str) -> list[str]:
    found = []
    for row in ROWS:
        if group == ("zero" if row.engine.startswith("zero") else "ddp and fsdp"):
            found += [f"{row} {t}" for t in row.trainers if row.tested is None or t in row.tested]
    return found


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.slow
@pytest.mark.parametrize("group", ["ddp and fsdp", "zero"])
def test_two_ranks_are_one_process(tmp_path, group):
    """Each row's losses and weights. accelerate is told that CPUs are accelerators, see the top of the file."""
    accelerate, names = pytest.importorskip("accelerate.utils"), names_of(group)
    if not hasattr(accelerate, "fsdp2_prepare_model"):
        pytest.skip("this accelerate has no FSDP2")
    if group == "zero":
        pytest.importorskip("deepspeed")
    if importlib.util.find_spec("trl") is None:
        names = [name for name in names if not name.endswith("drop-in")]
    found = run(tmp_path, names)
    for row, trainer in jobs(names):
        result = found[f"{row} {trainer}"]
        assert isinstance(result, dict), f"{row} {trainer}: {result[1]}"
        assert result["loss"] <= row.loss and result["weight"] <= row.weight, f"{row} {trainer}: {result}"


def test_a_reference_under_fsdp1_is_refused():
    state = types.SimpleNamespace(fsdp_plugin=types.SimpleNamespace(fsdp_version=1))
    accelerator = types.SimpleNamespace(distributed_type="DistributedType.FSDP", state=state)
    with pytest.raises(ValueError, match="use FSDP2"):
        prepare_frozen(tiny_model(), accelerator)


def main(words: list[str]) -> None:
    chosen = [f"{row} {trainer}" for row in ROWS for trainer in row.trainers]
    chosen = [name for name in chosen if all(word in name for word in words)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        found = run(Path(folder), chosen)
    print("| setting | FastDPOTrainer | drop-in |", "|---|---|---|", sep="\n")
    for row in ROWS:
        cells = []
        for trainer in TRAINERS:
            result = found.get(f"{row} {trainer}", "-")
            if isinstance(result, tuple):
                result = result[0].partition("\n")[0]
            cells.append(result if isinstance(result, str) else "{loss:.1g}, {weight:.1g}".format(**result))
        if set(cells) != {"-"}:
            print(f"| {row} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        where = Path(sys.argv[2])
        rank(where, json.loads((where / "names.json").read_text()))
    main(sys.argv[1:])
