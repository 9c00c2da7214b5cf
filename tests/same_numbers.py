"""Whether a change keeps every bit: some 500 cases of the three ops, and step curves of both trainers.

    python tests/same_numbers.py before.pt            writes the numbers of this commit
    python tests/same_numbers.py after.pt before.pt   and names each tensor that differs from another commit's

For changes of structure, which owe the same numbers: seconds, on CPU, from public functions alone.
"""

import contextlib
import copy
import io
import itertools
import os
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch

import dpo_fast
from dpo_fast import losses

torch.set_num_threads(1)
N, H, V, P = 26, 24, 101, 4
LENGTHS = [3, 5, 1, 4, 2, 4, 3, 4]
WAYS = {  # of choosing a plan, and whole rows or slices
    "score": dict(hidden=False, weight=False),
    "frozen": dict(weight=False),
    "pairwise": {},
    "recompute": dict(loss=lambda name: [name, "aot"], loss_weights=[1.0, 0.1]),  # aot couples pairs
    "in groups": dict(shuffled=True),
}
OPTIONS = {
    "plain": {},
    "transform": dict(
        logit_softcap=3.0,
        logit_scale=0.7,
        temperature=1.3,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ),
    "ld_alpha": dict(ld_alpha=0.4),
    "weights": dict(use_weighting=True),
    "low rank": dict(low_rank=3, bias=True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def inputs(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(0, V, (N,), generator=generator)
    labels[3] = -100
    ids = torch.repeat_interleave(torch.arange(2 * P), torch.tensor(LENGTHS))
    order = torch.randperm(N, generator=generator)
    ref = -20 + 3 * torch.randn(2 * P, generator=generator, dtype=torch.float64).to(torch.float32)
    return normal(N, H), 0.3 * normal(V, H), normal(V), normal(N, 3), 0.3 * normal(V, 3), labels, ids, order, ref


def head_case(way, loss, dtype, option):
    hidden, weight, bias, down, up, labels, ids, order, ref = inputs(dtype)
    way, option = dict(way), dict(option)
    if way.pop("shuffled", False):
        ids, labels = ids[order], labels[order]
    trains = dict(hidden=way.pop("hidden", True), weight=way.pop("weight", True))
    if "loss" in way:
        loss = way.pop("loss")(loss)
    if option.get("low_rank"):
        option["low_rank"] = down.requires_grad_(trains["hidden"]), up.requires_grad_(trains["weight"])
    if option.pop("bias", False):
        option["bias"] = bias.requires_grad_(trains["weight"])
    hidden.requires_grad_(trains["hidden"]), weight.requires_grad_(trains["weight"])
    smoothing = 1e-3 if "exo_pair" in loss else 0.1 if "robust" in loss else 0.0
    knobs = dict(reference_logps=ref, loss=loss, label_smoothing=smoothing, **way, **option)
    out = dpo_fast.linear_preference_loss(hidden, weight, labels, ids, P, **knobs)
    found = [out.loss, out.losses, out.chosen_logps, out.rejected_logps, out.chosen_rewards, out.stats.logps]
    found += [x for name in ("entropy", "is_top1") if (x := getattr(out.stats, name)) is not None]
    leaves = [x for x in (hidden, weight, bias, down, up) if x.requires_grad]
    if leaves:
        found += torch.autograd.grad(out.loss, leaves)
    return [x.detach().clone() for x in found]


def logits_case(dtype, option, impl="auto"):
    hidden, weight, *_, labels, ids, order, ref = inputs(dtype)
    knobs = {k: v for k, v in option.items() if k in ("temperature", "outputs")}
    if "logit_softcap" in option:
        knobs["logit_softcap"] = option["logit_softcap"]
    logits = (hidden @ weight.T).detach().requires_grad_()
    stats = dpo_fast.logits_token_stats(logits, labels, impl=impl, **knobs)
    (gradient,) = torch.autograd.grad(stats.logps.sum(), logits)
    return [x.detach().clone() for x in (*[s for s in vars(stats).values() if s is not None], gradient)]


def curves(trl: bool, layout: str, **config):
    """Losses and final weights of six steps of a trainer on a tiny model."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parent / "support"))
    from tiny import tiny_tokenizer

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            **({"tie_word_embeddings": True} if config.pop("tied", False) else {}),
        )
    )
    words = ["the cat", "a dog", "sat on", "the mat", "and then", "it ran"]
    rows = [
        {
            "prompt": f"{words[i % 6]} {words[i % 5]}",
            "chosen": f" {words[i % 4]}",
            "rejected": f" {words[(i + 1) % 3]} {words[i % 2]}",
        }
        for i in range(24)
    ]
    with tempfile.TemporaryDirectory() as folder:
        same = dict(
            output_dir=folder,
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=1e-3,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            bf16=False,
            **config,
        )
        data = Dataset.from_list(rows)
        if trl:
            from trl import DPOConfig

            from dpo_fast.trl import DPOTrainer

            trainer = DPOTrainer(
                model,
                copy.deepcopy(model),
                args=DPOConfig(**same),
                train_dataset=data,
                processing_class=tokenizer,
                layout=layout,
            )
        else:
            from dpo_fast import FastDPOConfig, FastDPOTrainer

            args = FastDPOConfig(**same, layout=layout)
            trainer = FastDPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        logged = [torch.tensor(log["loss"]) for log in trainer.state.log_history if "loss" in log]
        return logged + [p.detach().clone() for p in trainer.model.parameters()]


def everything():
    for dtype, (way, knobs), loss, (option, more) in itertools.product(
        DTYPES, WAYS.items(), losses.LOSSES, OPTIONS.items()
    ):
        if option == "plain" or loss in ("sigmoid", "exo_pair", "orpo"):
            yield f"{way}, {loss}, {dtype}, {option}", lambda k=knobs, lo=loss, d=dtype, m=more: head_case(k, lo, d, m)
    for dtype, (option, more) in itertools.product(DTYPES, OPTIONS.items()):
        yield f"logits, {dtype}, {option}", lambda d=dtype, m=more: logits_case(d, m)
    for layout in ("shared_prefix", "padded"):
        for name, config in {
            "plain": {},
            "tied": dict(tied=True),
            "ipo": dict(loss_type=["ipo"]),
            "ld_alpha": dict(ld_alpha=0.5),
            "weights": dict(use_weighting=True),
            "precomputed": dict(precompute_ref_log_probs=True),
        }.items():
            for trl in (False, True):
                yield (
                    f"{'trl' if trl else 'own'} trainer, {layout}, {name}",
                    lambda t=trl, la=layout, c=config: curves(t, la, **c),
                )


def main(file, before=None):
    found = {}
    for name, run in everything():
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # trainers print their logs
                found[name] = run()
        except ValueError:  # what a loss refuses is refused in both commits
            found[name] = []
    torch.save(found, file)
    refused = sum(not tensors for tensors in found.values())
    print(f"{len(found)} cases, {refused} of them refused, {sum(map(len, found.values()))} tensors in {file}")
    if before is None:
        return 0
    known, differ = torch.load(before), 0
    assert known.keys() == found.keys(), known.keys() ^ found.keys()
    for name, tensors in found.items():
        for index, (a, b) in enumerate(zip(tensors, known[name], strict=True)):
            if a.dtype != b.dtype or not torch.equal(a.nan_to_num(nan=7e7), b.nan_to_num(nan=7e7)):
                differ += 1
                far = (a.double() - b.double()).norm() / b.double().norm()
                print(f"{name}, tensor {index}: {far:.2g} of its norm")
    print(f"{differ} tensors differ from {before}")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
