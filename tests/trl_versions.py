"""The installed TRL's own DPOTrainer and ours, on the same tiny model and pairs: how far apart they are, by setting.

    python tests/trl_versions.py [NAME ...]     # of CASES; all

Prints a line for each: the largest difference, relative to what TRL gives or to one, over losses, gradient norms, all
other numbers that are logged in training and evaluation, and final weights. Exits with 1 where one exceeds 1e-5.
`make trl-versions` runs it in environments with older releases.
"""

import contextlib
import dataclasses
import io
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (0, 1)]

import datasets
import torch
import transformers
import trl
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

from dpo_fast.copies import base_model_of
from dpo_fast.trl import DPOTrainer

TOLERANCE = 1e-5
SETTINGS = dict(
    optim="sgd",  # Adam would divide the rounding of small gradients by itself
    learning_rate=0.02,
    beta=0.5,
    max_length=256,
    per_device_train_batch_size=4,
    per_device_eval_batch_size=4,
    max_steps=3,
    eval_strategy="steps",
    eval_steps=3,
    bf16=False,
    gradient_checkpointing=False,
    **QUIET,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, output_router_logits=True)
CUT = dict(max_length=14)

# name -> settings of DPOConfig. "kind" and "model" are the model's, "peft" says whether a LoRA trains, "ours" what our
# trainer alone is given, "only" what TRL's has where it runs at all
CASES: dict[str, dict] = {
    "sigmoid": {},
    "another reference": dict(ref_seed=3),
    "ipo": dict(loss_type="ipo"),
    "hinge": dict(loss_type="hinge"),
    "apo_zero": dict(loss_type="apo_zero"),
    "label_smoothing": dict(label_smoothing=0.2),
    "f_divergence": dict(f_divergence_type="js_divergence"),
    "losses": dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    "losses with ipo": dict(loss_type=["sigmoid", "ipo"], loss_weights=[0.5, 0.5]),
    "ld_alpha": dict(ld_alpha=0.3),
    "use_weighting": dict(use_weighting=True),
    "rpo_alpha": dict(rpo_alpha=0.7),
    "reference_free": dict(reference_free=True),
    "precompute": dict(precompute_ref_log_probs=True, ref_seed=3),
    "peft": dict(peft=True),
    "peft, ld_alpha": dict(peft=True, ld_alpha=0.3),
    "peft, precompute": dict(peft=True, precompute_ref_log_probs=True),
    "keep_start": dict(truncation_mode="keep_start", **CUT),
    "keep_end": dict(truncation_mode="keep_end", max_length=17),  # a part of each prompt is left
    "keep_end, no prompt left": dict(truncation_mode="keep_end", max_length=6, use_weighting=True, ld_alpha=0.3),
    "no max_length": dict(max_length=None),
    "sync_ref_model": dict(sync_ref_model=True, ref_model_sync_steps=1),
    "use_logits_to_keep": dict(use_logits_to_keep=True),
    "logits_to_keep, ld_alpha": dict(use_logits_to_keep=True, ld_alpha=0.3),
    "padding_free": dict(ours=dict(padding_free=True)),
    "accumulation": dict(gradient_accumulation_steps=2, per_device_train_batch_size=2),
    "checkpointing": dict(gradient_checkpointing=True),
    "gpt2": dict(kind="gpt2"),
    "experts": dict(kind="qwen3_moe", model=MOE),
    "left of padded rows": dict(ours=dict(layout="padded")),
    "prompt tuning": dict(peft="prompt", only="concatenated_forward"),  # later ones stop at it
}


class Unknown(Exception):
    """The installed TRL has no such setting."""


def compare(name: str, folder: str) -> tuple[dict[str, float], set[int]]:
    """What is apart by how much; and with how many rows our policy's backbone was called: one, if they were packed."""
    theirs, their_weights, _ = _run(trl.DPOTrainer, CASES[name], folder)
    ours, our_weights, rows = _run(DPOTrainer, CASES[name], folder)
    assert [set(entry) for entry in ours] == [set(entry) for entry in theirs], (ours[-1], theirs[-1])
    apart: dict[str, float] = {}
    for a, b in zip(ours, theirs, strict=True):
        for key in b:
            apart[key] = max(apart.get(key, 0.0), _apart(a[key], b[key]))
    apart["weights"] = max(_apart(our_weights[key], x) for key, x in their_weights.items())
    return apart, rows


def _apart(ours, theirs) -> float:
    ours, theirs = torch.as_tensor(ours, dtype=torch.float64), torch.as_tensor(theirs, dtype=torch.float64)
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())


def _run(trainer_class, case: dict, folder: str) -> tuple[list[dict], dict[str, torch.Tensor], set[int]]:
    case = dict(case)
    kind, overrides, peft = case.pop("kind", "llama"), case.pop("model", {}), case.pop("peft", False)
    ours, ref_seed = case.pop("ours", {}), case.pop("ref_seed", None)
    known = {field.name for field in dataclasses.fields(trl.DPOConfig)}
    layout = dict(layout=ours["layout"]) if "layout" in ours else {}
    ours = {key: value for key, value in ours.items() if key != "layout"}
    if not hasattr(trl.DPOTrainer, case.pop("only", "train")):
        raise Unknown("not with this TRL")
    if missing := (case.keys() | ours.keys()) - known:
        raise Unknown(f"no {', '.join(sorted(missing))}")
    if isinstance(case.get("loss_type"), list) and "loss_weights" not in known:
        raise Unknown("one loss only")
    settings = {**SETTINGS, **case}
    if trainer_class is DPOTrainer:
        settings.update(ours)
    else:
        layout = {}
    model = _saved_model(folder, kind, overrides)
    more: dict = dict(layout)
    if peft:
        more["peft_config"] = _adapter(peft)
    if ref_seed is not None:
        more["ref_model"] = tiny_model(kind, seed=ref_seed, **overrides)
    # On disk, where TRL 1.6 needs it to keep reference log-probs; a copy for each, or one would read the other's
    place = str(Path(folder) / trainer_class.__module__)
    datasets.Dataset.from_list(tiny_rows(12)).save_to_disk(place)
    data = datasets.load_from_disk(place)
    torch.manual_seed(5)
    trainer = trainer_class(
        model=model,
        args=trl.DPOConfig(output_dir=folder, **settings),
        train_dataset=data,
        eval_dataset=data.select(range(6)),
        processing_class=tiny_tokenizer(),
        **more,
    )
    rows: set[int] = set()
    backbone = base_model_of(trainer.model).base_model

    def note(_module, args, kwargs) -> None:
        given = [x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None]
        rows.add(len(given[0]))

    backbone.register_forward_pre_hook(note, with_kwargs=True)
    trainer.train()
    clocks = ("runtime", "per_second", "total_flos")
    history = [
        {key: value for key, value in entry.items() if not key.endswith(clocks)} for entry in trainer.state.log_history
    ]
    weights = {key: p.detach().clone() for key, p in trainer.model.named_parameters() if p.requires_grad}
    return history, weights, rows


def _saved_model(folder: str, kind: str, overrides: dict):
    """From a path, from which TRL since 0.29 loads the reference; log-probs of tokens are far from uniform."""
    model = tiny_model(kind, **overrides)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.ndim > 1 else 1)
    path = str(Path(folder) / "model")
    model.save_pretrained(path)
    return type(model).from_pretrained(path)


def _adapter(kind):
    import peft

    if kind == "prompt":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


def main(names: list[str]) -> int:
    print(f"TRL {trl.__version__}: {DPOTrainer.__mro__[1].__module__.rpartition('.')[2]}")
    bad = 0
    for name in names or CASES:
        try:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                apart, rows = compare(name, folder)
        except Unknown as reason:
            print(f"  {name:26} -        {reason}")
            continue
        worst = max(apart, key=apart.__getitem__)
        bad += not apart[worst] <= TOLERANCE
        print(f"  {name:26} {apart[worst]:.1e}  {worst}, of {len(apart)}; {'packed' if rows == {1} else 'padded'} rows")
    return int(bad > 0)


if __name__ == "__main__":
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    sys.exit(main(sys.argv[1:]))
