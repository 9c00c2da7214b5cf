"""Whole steps as counted work over a device's rates: predictions, for the first measurement to be held against.

    python -m benchmarks.predict                 # the table of GPU.md
    python -m benchmarks.predict --device h100

What a decoder layer costs per token is counted by running one on the meta device: FLOPs of its products, bytes of all
other operations (what each reads and writes), launches. Attention, the head and the optimizer are added by formula.
Trainers differ in the positions that they run, in how attention looks and in the head's GEMMs:

    trl      2P padded rows, masked attention over whole rows, head on completion tokens, 4 GEMMs trained and 3 frozen
    packed   a rival that packs each sequence without padding, and shares nothing; its head and attention are ours
    ours     one packed row, each prompt once

A step takes the device's time, or the host's for its launches if that is longer. Not counted: embeddings, the loss,
metrics, collation, and waiting for the host within a step. `fused` is a step whose passes between products are one
kernel each, as layer kernels (`use_liger_kernel`) or a compiler could make them at best. 8B-shaped models run with
gradient checkpointing. Rows of LoRA need peft.
"""

import argparse
import contextlib
import dataclasses
import functools
import random
import statistics
from typing import NamedTuple

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .head_providers import FACTS
from .record import table
from .train_step.inputs import MIXES, SHAPES, Mix, Shape, make_pairs, packed_tokens, padded_tokens, real_tokens

Lengths = list[tuple[int, int, int]]  # of a batch: prompt, chosen, rejected


class Device(NamedTuple):
    """Rates that a kernel reaches, not those of a data sheet; see GPU.md for which are measured."""

    flops: float  # of bf16 products
    bandwidth: float  # bytes per second of a copy
    flash: float  # FLOPs per second of causal flash attention, forward and backward
    masked: float  # ... of attention with a mask, over all positions
    launch_s: float  # of the host per operation


DEVICES = {
    "h200": Device(760e12, 4.3e12, 300e12, 150e12, 7e-6),
    "h100": Device(680e12, 2.9e12, 300e12, 150e12, 7e-6),
}
TRAINERS = ("trl", "packed", "ours")
MODES = ("full", "lora")
TABLE_MIXES = {"chat": "chat", "long prompts": "long", "long answers": "short"}
PAIRS, LONGEST, BATCHES = 8, 2048, 100


class Work(NamedTuple):
    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        return Work(*(a + times * b for a, b in zip(self, other, strict=True)))


# --- a layer, counted ------------------------------------------------------------------------------------------------

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Count(TorchDispatchMode):
    """Work of what is called inside."""

    def __init__(self):
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        if op.is_view or name in ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided"):
            return out
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if name in PRODUCTS:
            a, b = read[-2:]
            self.work = self.work.plus(Work(2.0 * a.numel() * b.shape[-1], 0.0, 1))
        else:
            written = args[0] if out is None else out  # operations on lists, in place
            tensors = [*read, *(x for x in tree_leaves(written) if isinstance(x, torch.Tensor))]
            moved = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in tensors)
            self.work = self.work.plus(Work(0.0, float(moved), 1))
        return out


class _NoAttention(torch.autograd.Function):
    """In the place of attention, which is counted by itself."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return torch.empty_like(query.transpose(1, 2))

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def _no_attention(module, query, key, value, *_, **__):
    return _NoAttention.apply(query, key, value), None


@functools.cache
def layer(shape: Shape, lora: bool, tokens: int = 256) -> tuple[Work, Work, Work]:
    """(reference's forward, forward, backward) of a layer: FLOPs and bytes per token, launches per call.

    What two layers take beyond one."""
    one, two = (_phases(dataclasses.replace(shape, layers=n), lora, tokens) for n in (1, 2))
    more = [b.plus(a, -1) for a, b in zip(one, two, strict=True)]
    reference, forward, backward = (Work(w.flops / tokens, w.bytes / tokens, w.launches) for w in more)
    return reference, forward, backward


def _phases(shape: Shape, lora: bool, tokens: int) -> list[Work]:
    transformers.AttentionInterface.register("counted_apart", _no_attention)
    transformers.AttentionMaskInterface.register("counted_apart", lambda *_, **__: None)
    config = shape.config(tokens)
    config._attn_implementation, config.use_cache = "counted_apart", False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids, mask = torch.zeros(1, tokens, dtype=torch.long), torch.zeros(1, 1, 1, 1)  # of four dimensions: as it is
    body, off = model.model, contextlib.nullcontext
    if lora:
        import peft

        knobs = dict(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**knobs))
        off = wrapped.disable_adapter
    with off(), torch.no_grad(), Count() as reference:
        body(ids, attention_mask=mask)
    with Count() as forward:
        hidden = body(ids, attention_mask=mask).last_hidden_state
    with Count() as backward:
        hidden.backward(torch.empty_like(hidden))
    return [reference.work, forward.work, backward.work]


# --- a step ----------------------------------------------------------------------------------------------------------


def positions(trainer: str, lengths: Lengths) -> int:
    return {"trl": padded_tokens, "packed": real_tokens, "ours": packed_tokens}[trainer](lengths)


def looks(trainer: str, lengths: Lengths) -> float:
    """Pairs of query and key, in the forward of one layer and head."""
    if trainer == "trl":
        return padded_tokens(lengths) ** 2 / (2 * len(lengths))
    if trainer == "packed":
        return sum((p + c) ** 2 / 2 + (p + r) ** 2 / 2 for p, c, r in lengths)
    return sum(p**2 / 2 + p * (c + r) + (c**2 + r**2) / 2 for p, c, r in lengths)


def head(shape: Shape, mode: str, trainer: str, scored: int) -> Work:
    """Of policy and reference: products, and passes over the tiles of logits and over d_weight."""
    facts = FACTS["trl-1.16" if trainer == "trl" else "ours-fused"].gemms
    gemms = facts[0] + facts[2 if mode == "full" else 1]
    # bytes of a logit: read by the score and by two passes of the gradient in fp32, written in 16 bits; TRL's has 16
    each = 2 + 2 + 4 if trainer == "trl" else 4 + 4 + 4 + 2
    d_weight = 0.0
    if mode == "full":  # in fp32: written by the first chunk, read and written by others, then cast
        chunks = -(-scored // (4096 if trainer == "trl" else 2048))
        d_weight = shape.vocab * shape.width * (8.0 * (chunks - 1) + 4 + 4 + 2 + 4 * (trainer == "trl"))
    return Work(gemms * 2.0 * scored * shape.width * shape.vocab, each * scored * float(shape.vocab) + d_weight, 40)


@functools.cache
def adamw_bytes() -> float:
    """Of a step of AdamW and of clipping, per trained 16-bit parameter."""
    n = 1_000_000
    weight = torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.AdamW([weight], foreach=True)
    optimizer.step()
    with Count() as counted:
        optimizer.step()
    return counted.work.bytes / n + 6  # the norm reads the gradient, its scaling reads and writes it


def parameters(shape: Shape) -> float:
    of_layers = layer(shape, False)[1].flops / 2 * shape.layers
    return of_layers + shape.vocab * shape.width * (1 if shape.tied else 2)


class Step(NamedTuple):
    """Milliseconds of the device by part, and of the host."""

    products: float
    attention: float
    passes: float  # of the layers: all that is neither product nor attention
    head: float  # beyond its products
    optimizer: float
    host: float

    @property
    def device(self) -> float:
        return sum(self) - self.host

    @property
    def total(self) -> float:
        return max(self.device, self.host)

    @property
    def idle(self) -> float:
        return self.total - self.device


def step(shape: Shape, mode: str, trainer: str, lengths: Lengths, device: Device, checkpointing=False) -> Step:
    """The predicted time of one step on a batch of these lengths, in bf16, AdamW, the reference beside the policy."""
    T, scored = positions(trainer, lengths), sum(c + r for _, c, r in lengths)
    reference, forward, backward = layer(shape, mode == "lora")
    times = 2 if checkpointing else 1  # of the policy's forward
    of_layer = reference.plus(forward, times).plus(backward)
    of_head = head(shape, mode, trainer, scored)
    # forward: 2 products; backward: 5
    attended = 4 * shape.layers * shape.width * looks(trainer, lengths) * (1 + times + 2.5)
    trained = parameters(shape) if mode == "full" else 0.0
    per_attention = 3 * 10  # launches around attention, in three phases
    host = shape.layers * (of_layer.launches + per_attention) + of_head.launches
    return Step(
        products=1e3 * (shape.layers * T * of_layer.flops + of_head.flops) / device.flops,
        attention=1e3 * attended / (device.masked if trainer == "trl" else device.flash),
        passes=1e3 * shape.layers * T * of_layer.bytes / device.bandwidth,
        head=1e3 * of_head.bytes / device.bandwidth,
        optimizer=1e3 * trained * adamw_bytes() / device.bandwidth,
        host=1e3 * host * device.launch_s,
    )


def fused_bytes(shape: Shape) -> float:
    """Per token of a layer in all three phases, where each of its passes were one kernel: two norms with their
    residuals, rotation of queries and keys, the activation; the backward reads and writes twice as much."""
    norms, activation = 2 * 4 * shape.width, 3 * shape.intermediate
    rotation = 2 * shape.width * (1 + shape.kv_heads / shape.heads)
    return 2.0 * (norms + activation + rotation) * (1 + 1 + 2)


# --- tables ----------------------------------------------------------------------------------------------------------


def batches(mix: Mix, pairs: int, count: int = BATCHES) -> list[Lengths]:
    rng = random.Random(0)
    return [[mix.lengths(rng, LONGEST) for _ in range(pairs)] for _ in range(count)]


def mean_step(shape: Shape, mode: str, trainer: str, of: list[Lengths], device: Device, **knobs) -> Step:
    found = [step(shape, mode, trainer, lengths, device, **knobs) for lengths in of]
    return Step(*(statistics.mean(values) for values in zip(*found, strict=True)))


COLUMNS = ["model", "mix", "trainer", "positions", "products", "attention", "passes", "head", "optimizer", "host"]
COLUMNS += ["idle", "step", "fused", "times_faster", "on_h100"]


def rows(device: Device, pairs: int = PAIRS) -> list[dict]:
    found = []
    for name in ("1b", "8b"):
        shape, checkpointing = SHAPES[name], name == "8b"
        for mode in MODES:
            for words, mix in TABLE_MIXES.items():
                of = batches(MIXES[mix], pairs)
                steps = {t: mean_step(shape, mode, t, of, device, checkpointing=checkpointing) for t in TRAINERS}
                for trainer, each in steps.items():
                    T = statistics.mean(positions(trainer, lengths) for lengths in of)
                    least = 1e3 * shape.layers * T * fused_bytes(shape) / device.bandwidth
                    row = {"model": f"{name} {mode}", "mix": words, "trainer": trainer, "positions": round(T)}
                    row |= {part: f"{value:.0f}" for part, value in each._asdict().items()}
                    row |= {"step": f"{each.total:.0f}", "idle": f"{each.idle:.0f}"}
                    row["times_faster"] = f"{steps['trl'].total / each.total:.2f}"
                    h100 = mean_step(shape, mode, trainer, of, DEVICES["h100"], checkpointing=checkpointing)
                    row |= {"fused": f"{each.device - each.passes + least:.0f}", "on_h100": f"{h100.total:.0f}"}
                    found.append(row)
    return found


RATIOS = ["mix", "pairs", "padded / shared", "padded / packed", "packed / shared"]


def ratios() -> list[dict]:
    """Of the positions that a step runs, by pairs per step."""
    found = []
    for words, mix in TABLE_MIXES.items():
        for pairs in (4, 8, 16):
            of = batches(MIXES[mix], pairs)
            trl, packed, ours = (sum(positions(trainer, lengths) for lengths in of) for trainer in TRAINERS)
            values = (f"{ratio:.2f}" for ratio in (trl / ours, trl / packed, packed / ours))
            found.append(dict(zip(RATIOS, (words, pairs, *values), strict=True)))
    return found


# The one measurement there is: one H200, 1B-shaped, all weights, 8 chat pairs, steps 3 to 6; see GPU.md
FIRST_LOOK_MS = {"trl": 621, "ours": 211}  # TRL 1.16, FastDPOTrainer; dpo_fast.trl took 239
LOOK = ["trainer", "measured", "step", "measured / step", *Step._fields]


def first_look() -> tuple[list[Lengths], list[dict]]:
    """(its batches, a row per trainer: measured, and predicted for the same lengths on an H200)."""
    pairs = make_pairs(MIXES["chat"], 6 * PAIRS, LONGEST, SHAPES["1b"].vocab, seed=0)[2 * PAIRS :]
    lengths = [tuple(len(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")) for row in pairs]
    of = [lengths[i : i + PAIRS] for i in range(0, len(lengths), PAIRS)]
    found = []
    for trainer, measured in FIRST_LOOK_MS.items():
        each = mean_step(SHAPES["1b"], "full", trainer, of, DEVICES["h200"])
        row = {"trainer": trainer, "measured": measured, "step": f"{each.total:.0f}"}
        row["measured / step"] = f"{measured / each.total:.2f}"
        found.append(row | {part: f"{value:.0f}" for part, value in each._asdict().items()})
    return of, found


def markdown(found: list[dict], columns: list[str]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(str(row[c]) for c in columns)} |" for row in found)])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="per step")
    parser.add_argument("--markdown", action="store_true", help="as GPU.md has it")
    a = parser.parse_args(argv)
    show = markdown if a.markdown else table
    print(show(rows(DEVICES[a.device], a.pairs), COLUMNS), "\n", show(ratios(), RATIOS), sep="\n")
    print("\n", show(first_look()[1], LOOK), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
