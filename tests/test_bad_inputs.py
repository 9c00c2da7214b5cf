"""What is refused, and in what words: one table of bad inputs, by where they come in.

    name: (what does it, exception, what the message names)

`dpo-fast train` ends with status 2 and one line instead of an exception: its rows say how recipe, options or files
differ from those of a training that works. Tables of one module alone stand beside its tests: types of the values of a
recipe (training/test_bad_recipes.py), rows of data (training/test_bad_data.py).
"""

import gzip
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import QUIET, save_inputs, tiny_config, tiny_model, tiny_rows, tiny_tokenizer

pytest.importorskip("datasets")

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import transformers
import yaml

import dpo_fast
from dpo_fast import (
    linear_preference_loss,
    linear_token_logps,
    linear_token_stats,
    logits_token_logps,
    logits_token_stats,
    preference_loss,
    sequence_logps,
)
from dpo_fast.batch import TokenPair, padded_batch
from dpo_fast.cli import main
from dpo_fast.functional import preference_step, score
from dpo_fast.layout import shared_prefix_batch
from dpo_fast.logps import PairLogps
from dpo_fast.objective import Objective
from dpo_fast.training.config import FastDPOConfig
from dpo_fast.training.data import PairCollator, Truncation, prepare_dataset
from dpo_fast.training.trainer import FastDPOTrainer

NAN, INF = math.nan, math.inf
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = (torch.randn(n, 8, generator=GENERATOR) for n in (6, 50))
LOGITS, LABELS, IDS = HIDDEN @ WEIGHT.T, torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([0, 0, 1, 2, 3, 3])
REFERENCE, SUMS = torch.tensor([-9.0, -4.0, -5.0, -8.0]), torch.tensor([-3.0, -4.0])


def logits(x=LOGITS, y=LABELS, **knobs):
    return logits_token_logps(x, y, **knobs)


def stats(**knobs):
    return logits_token_stats(LOGITS, LABELS, **knobs)


def head(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, **knobs):
    return linear_token_logps(hidden, weight, labels, **knobs)


def loss(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, ids=IDS, pairs=2, **knobs):
    return linear_preference_loss(hidden, weight, labels, ids, pairs, **{"reference_logps": REFERENCE, **knobs})


def trained(**knobs):
    return loss(weight=WEIGHT.clone().requires_grad_(), **knobs)


def sums(values=LOGITS[:, 0], ids=IDS, count=4, **knobs):
    return sequence_logps(values, ids, count, **knobs)


def pairs(*given, **knobs):
    return preference_loss(*(given or (SUMS, SUMS - 1, SUMS, SUMS)), **knobs)


def no_pairs(**knobs):
    return preference_loss(*[torch.zeros(0)] * 4, **knobs)


def lengths(chosen, name="ipo", given=(SUMS, SUMS, SUMS, SUMS)):
    return pairs(*given, loss=name, chosen_lengths=torch.tensor(chosen), rejected_lengths=torch.tensor([1, 2]))


ON_LOGITS = {
    "temperature: text": (lambda: logits(temperature="1"), TypeError, "temperature must be a number, got '1'"),
    "temperature: None": (lambda: logits(temperature=None), TypeError, "temperature must be a number, got None"),
    "temperature: a truth": (lambda: logits(temperature=True), TypeError, "temperature must be a number, got True"),
    "temperature: 0": (lambda: logits(temperature=0), ValueError, "temperature must be a positive number, got 0"),
    "temperature: -1": (lambda: logits(temperature=-1), ValueError, "temperature must be a positive number, got -1"),
    "temperature: NaN": (lambda: logits(temperature=NAN), ValueError, "temperature must be a positive number, got nan"),
    "temperature: too small": (lambda: logits(temperature=1e-45), ValueError, "temperature .* from 1e-30 to 1e.30"),
    "temperature: too large": (lambda: stats(temperature=1e300), ValueError, "temperature .* from 1e-30 to 1e.30"),
    "temperature: 400 digits": (lambda: logits(temperature=10**400), ValueError, "temperature must be a positive"),
    "temperature: a tensor": (lambda: logits(temperature=torch.tensor(1.0)), TypeError, "temperature .* got a tensor"),
    "soft-cap: text": (lambda: logits(logit_softcap="30"), TypeError, "logit_softcap must be a number, got '30'"),
    "soft-cap: a truth": (lambda: stats(logit_softcap=True), TypeError, "logit_softcap must be a number, got True"),
    "soft-cap: -1": (lambda: logits(logit_softcap=-1), ValueError, "logit_softcap must be a positive number or None"),
    "soft-cap: too large": (lambda: logits(logit_softcap=1e300), ValueError, "logit_softcap .* from 1e-30 to 1e.30"),
    "ignore_index: None": (lambda: logits(ignore_index=None), TypeError, "ignore_index must be an int .* got None"),
    "ignore_index: 1.5": (lambda: logits(ignore_index=1.5), TypeError, "ignore_index must be an int .* got 1.5"),
    "ignore_index: text": (lambda: stats(ignore_index="-100"), TypeError, "ignore_index must be an int .* got '-100'"),
    "ignore_index: 2**70": (lambda: stats(ignore_index=2**70), TypeError, "ignore_index must be an int of 64 bits"),
    "logits: a list": (lambda: logits([1.0]), TypeError, "logits must be a tensor, got list"),
    "logits: NumPy's": (lambda: logits(LOGITS.numpy()), TypeError, "logits must be a tensor, got ndarray"),
    "logits: ints": (lambda: logits(LOGITS.int()), TypeError, "logits must have one of the dtypes .* got int32"),
    "logits: complex": (lambda: logits(LOGITS.to(torch.complex64)), TypeError, "logits must have .* got complex64"),
    "logits: sparse": (lambda: logits(LOGITS.to_sparse()), TypeError, "logits must be a dense .* layout sparse_coo"),
    "logits: CSR": (lambda: logits(LOGITS.to_sparse_csr()), TypeError, "logits must be a dense .* layout sparse_csr"),
    "logits: nested": (
        lambda: logits(torch.nested.nested_tensor([LOGITS[0]])),
        TypeError,
        "logits must be a dense tensor, got a nested tensor",
    ),
    "logits: meta": (lambda: logits(LOGITS.to("meta"), LABELS.to("meta")), ValueError, "logits is on the device meta"),
    "logits: no vocabulary": (lambda: logits(torch.zeros(6, 0)), ValueError, r"logits must have shape \(..., V\)"),
    "logits: a number": (lambda: logits(torch.tensor(1.0)), ValueError, r"logits must have shape \(..., V\)"),
    "labels: a list": (lambda: logits(y=LABELS.tolist()), TypeError, "labels must be a tensor, got list"),
    "labels: floats": (lambda: logits(y=LABELS.float()), TypeError, "labels must have .* got float32"),
    "labels: sparse": (lambda: logits(y=LABELS.to_sparse()), TypeError, "labels must be a dense tensor"),
    "labels: other shape": (lambda: logits(y=LABELS[:5]), ValueError, r"labels must have shape \(6\), got \(5,\)"),
    "labels: meta": (lambda: logits(y=LABELS.to("meta")), ValueError, "labels is on meta"),
    "labels: out of range": (lambda: logits(y=LABELS + 99), ValueError, r"6 of 6 labels are outside \[0, 50\)"),
    "labels: negative": (lambda: logits(y=-LABELS), ValueError, r"labels are outside \[0, 50\)"),
    "outputs: text": (lambda: stats(outputs="entropy"), ValueError, "outputs must be a sequence of names"),
    "outputs: None": (lambda: stats(outputs=None), ValueError, "outputs must be a sequence .* got None"),
    "outputs: unknown": (lambda: stats(outputs=["entropi"]), ValueError, "outputs must be .* got .*entropi"),
    "outputs: nested": (lambda: stats(outputs=[["entropy"]]), ValueError, "outputs must be a sequence of names"),
    "impl: unknown": (lambda: logits(impl="foo"), ValueError, "impl must be one of 'auto', .* got 'foo'"),
    "impl: None": (lambda: logits(impl=None), ValueError, "impl must be one of .* got None"),
    "impl: a list": (lambda: stats(impl=["torch"]), ValueError, "impl must be one of .* got .'torch'"),
    "in place: text": (lambda: logits(inplace_backward="no"), TypeError, "inplace_backward must be True or False"),
    "in place: None": (lambda: stats(inplace_backward=None), TypeError, "inplace_backward must be True or False"),
    "in place: a tensor": (
        lambda: logits(inplace_backward=torch.tensor(True)),
        TypeError,
        "inplace_backward must be True or False, got tensor",
    ),
    "in place: overlapping": (
        lambda: logits(torch.randn(10).as_strided((6, 5), (1, 1)), inplace_backward=True),
        ValueError,
        "inplace_backward needs logits with memory of their own",
    ),
}

ON_HEADS = {
    "low_rank: 5": (lambda: head(low_rank=5), ValueError, r"low_rank must be a pair \(down, up\), got int"),
    "low_rank: text": (lambda: head(low_rank="ab"), ValueError, "low_rank must be a pair .* got str"),
    "low_rank: one": (lambda: head(low_rank=[torch.zeros(6, 2)]), ValueError, "low_rank must be .* got 1 elements"),
    "low_rank: numbers": (lambda: head(low_rank=(1, 2)), TypeError, r"low_rank\[0\] must be a tensor, got int"),
    "low_rank: ranks": (
        lambda: head(low_rank=(torch.zeros(6, 2), torch.zeros(50, 3))),
        ValueError,
        r"low_rank\[1\] must have shape \(50, 2\)",
    ),
    "bias: a number": (lambda: head(bias=3.0), TypeError, "bias must be a tensor, got float"),
    "bias: too short": (lambda: head(bias=torch.zeros(49)), ValueError, r"bias must have shape \(50\)"),
    "bias: sparse": (lambda: head(bias=torch.zeros(50).to_sparse()), TypeError, "bias must be a dense tensor"),
    "weight: a module": (lambda: head(weight=torch.nn.Linear(8, 50)), TypeError, "weight must be a tensor, got Linear"),
    "weight: transposed": (lambda: head(weight=WEIGHT.T), ValueError, r"weight must have shape \(V, 8\)"),
    "weight: fp64": (lambda: head(weight=WEIGHT.double()), TypeError, "hidden is torch.float32, weight is"),
    "weight: sparse": (lambda: head(weight=WEIGHT.to_sparse()), TypeError, "weight must be a dense tensor"),
    "hidden: None": (lambda: head(None), TypeError, "hidden must be a tensor, got NoneType"),
    "hidden: sparse": (lambda: head(HIDDEN.to_sparse()), TypeError, "hidden must be a dense tensor"),
    "hidden: meta": (
        lambda: head(*(x.to("meta") for x in (HIDDEN, WEIGHT, LABELS))),
        ValueError,
        "hidden is on .* meta",
    ),
    "labels: None": (lambda: head(labels=None), TypeError, "labels must be a tensor, got NoneType"),
    "labels: out of range": (lambda: head(labels=LABELS + 49), ValueError, r"labels are outside \[0, 50\)"),
    "scale: None": (lambda: head(logit_scale=None), TypeError, "logit_scale must be a number, got None"),
    "scale: NaN": (lambda: head(logit_scale=NAN), ValueError, "logit_scale must be finite"),
    "scale: too large": (lambda: head(logit_scale=1e300), ValueError, r"logit_scale must be finite, and at most 1e.30"),
    "tile_mib: 0": (lambda: head(tile_mib=0), ValueError, "tile_mib must be an int of at least 1 or None, got 0"),
    "tile_mib: text": (lambda: head(tile_mib="1"), ValueError, "tile_mib must be an int .* got '1'"),
    "tile_mib: 1.5": (lambda: head(tile_mib=1.5), ValueError, "tile_mib must be an int .* got 1.5"),
    "tile_mib: 2**70": (lambda: head(tile_mib=2**70), ValueError, "tile_mib must be an int"),
    "outputs: 3": (
        lambda: linear_token_stats(HIDDEN, WEIGHT, LABELS, outputs=3),
        ValueError,
        "outputs must be a sequence of names",
    ),
}

LINEAR_PREFERENCE_LOSS = {
    "pairs: a truth": (lambda: loss(pairs=True), ValueError, "num_pairs must be a positive int, got True"),
    "pairs: 0": (lambda: loss(pairs=0), ValueError, "num_pairs must be a positive int, got 0"),
    "pairs: 2.0": (lambda: loss(pairs=2.0), ValueError, "num_pairs must be a positive int, got 2.0"),
    "pairs: 2**70": (lambda: loss(pairs=2**70), ValueError, "num_pairs must be a positive int"),
    "pairs: a tensor": (lambda: loss(pairs=torch.tensor(2)), ValueError, "num_pairs must be a positive int"),
    "ids: out of range": (lambda: loss(ids=IDS + 9), ValueError, r"sequence_ids must be in \[0, 4\)"),
    "ids: int32": (lambda: loss(ids=IDS.int()), TypeError, "sequence_ids must have .* got int32"),
    "ids: a list": (lambda: loss(ids=IDS.tolist()), TypeError, "sequence_ids must be a tensor, got list"),
    "lengths: 4": (
        lambda: loss(sequence_lengths=4),
        ValueError,
        "sequence_lengths must be a sequence of ints .* got 4",
    ),
    "order: a None": (
        lambda: trained(sequence_order=[0, None, 1, 2]),
        ValueError,
        r"sequence_order must be a list of all sequences in \[0, 4\), got \[0, None, 1, 2\]",
    ),
    "order: floats": (
        lambda: trained(sequence_order=[0.0, 1.0, 2.0, 3.0]),
        ValueError,
        "sequence_order must be a list of all sequences",
    ),
    "lengths: text": (lambda: loss(sequence_lengths="2112"), ValueError, "sequence_lengths must be a sequence of ints"),
    "lengths: floats": (
        lambda: trained(sequence_lengths=[2.0, 1.0, 1.0, 2.0]),
        ValueError,
        r"sequence_lengths\[0\] must be an int of at least 0, got 2.0",
    ),
    "lengths: fp32": (
        lambda: loss(sequence_lengths=torch.tensor([2.0, 1, 1, 2])),
        ValueError,
        r"sequence_lengths\[0\] must be an int",
    ),
    "lengths: texts": (lambda: loss(sequence_lengths=["2"] * 4), ValueError, r"sequence_lengths\[0\] .* got '2'"),
    "lengths: None in it": (lambda: loss(sequence_lengths=[2, 1, 1, None]), ValueError, r"sequence_lengths\[3\]"),
    "lengths: negative": (lambda: loss(sequence_lengths=[-2, 1, 1, 6]), ValueError, r"sequence_lengths\[0\] .* got -2"),
    "lengths: three": (lambda: loss(sequence_lengths=[2, 1, 3]), ValueError, "sequence_lengths must be 4 counts"),
    "lengths: of others": (
        lambda: loss(sequence_lengths=[1, 2, 1, 2]),
        ValueError,
        "sequence_lengths must be the counts",
    ),
    "loss: unknown": (lambda: loss(loss="sigmod"), ValueError, "loss must be one of sigmoid, .* got 'sigmod'"),
    "loss: None": (lambda: loss(loss=None), ValueError, "loss must be a name, a function .* got None"),
    "loss: a number in it": (lambda: loss(loss=["sigmoid", 3]), ValueError, "loss must be one of .* got 3"),
    "loss: gives None": (lambda: trained(loss=lambda p: None), TypeError, "<lambda> must return a tensor, .* NoneType"),
    "loss: gives a list": (lambda: loss(loss=lambda p: [1.0]), TypeError, "<lambda> must return a tensor, .* list"),
    "loss: gives truths": (lambda: loss(loss=lambda p: p.margin > 0), TypeError, "must return floating .* torch.bool"),
    "loss: gives ints": (lambda: loss(loss=lambda p: p.margin.int()), TypeError, "must return floating .* torch.int32"),
    "loss: gives complex": (
        lambda: loss(loss=lambda p: p.margin.to(torch.complex64)),
        TypeError,
        "must return floating values on cpu, got torch.complex64",
    ),
    "loss: elsewhere": (lambda: loss(loss=lambda p: p.margin.to("meta")), TypeError, "floating values on cpu, .* meta"),
    "loss: gives a mean": (lambda: loss(loss=lambda p: p.margin.mean()), ValueError, "must return one value per pair"),
    "loss: two arguments": (
        lambda: loss(loss=lambda p, q: p.margin),
        TypeError,
        "<lambda> must take one argument, .*'q'",
    ),
    "loss: no argument": (lambda: loss(loss=lambda: 1), TypeError, "<lambda> must take one argument, the PairLogps"),
    "loss: detached": (
        lambda: trained(loss=lambda p: p.margin.detach()),
        RuntimeError,
        "does not depend on pairs.chosen",
    ),
    "loss: detached, hidden trains": (
        lambda: loss(HIDDEN.clone().requires_grad_(), loss=lambda p: p.margin.detach()),
        RuntimeError,
        "<lambda>: the loss does not depend on pairs.chosen .* detach",
    ),
    "weights: a number": (lambda: loss(loss_weights=3), ValueError, "loss weights must be 1 finite numbers, .* got 3"),
    "weights: a truth": (lambda: loss(loss_weights=[True]), ValueError, "loss weights must be 1 finite numbers"),
    "weights: NaN": (lambda: loss(loss_weights=[NAN]), ValueError, "loss weights must be 1 finite numbers"),
    "weights: too many": (lambda: loss(loss_weights=[1, 2]), ValueError, "loss weights must be 1 finite numbers"),
    "beta: text": (lambda: loss(beta="0.1"), ValueError, "beta must be a finite number, got '0.1'"),
    "beta: a truth": (lambda: loss(beta=True), ValueError, "beta must be a finite number, got True"),
    "beta: 0": (lambda: loss(beta=0), ValueError, "beta must be positive, got 0"),
    "beta: a tensor": (lambda: loss(beta=torch.tensor(0.1)), ValueError, "beta must be a finite number, got tensor"),
    "smoothing: 1": (lambda: loss(label_smoothing=1), ValueError, r"label_smoothing must be in \[0, 1\)"),
    "ld_alpha: 2": (lambda: loss(ld_alpha=2), ValueError, r"ld_alpha must be in \[0, 1\] or None, got 2"),
    "ld_alpha: a truth": (lambda: loss(ld_alpha=True), ValueError, r"ld_alpha must be in \[0, 1\] or None, got True"),
    "WPO: text": (lambda: loss(use_weighting="no"), TypeError, "use_weighting must be True or False, got 'no'"),
    "WPO: None": (lambda: loss(use_weighting=None), TypeError, "use_weighting must be True or False, got None"),
    "mean length: text": (lambda: loss(mean_chosen_length="3"), ValueError, "mean_chosen_length must be a number"),
    "mean length: a truth": (lambda: loss(mean_chosen_length=True), ValueError, "mean_chosen_length must be a number"),
    "mean length: -1": (lambda: loss(mean_chosen_length=-1), ValueError, "mean_chosen_length must be a number"),
    "reference: none": (lambda: loss(reference_logps=None), ValueError, "sigmoid needs reference_logps, got None"),
    "reference: a number": (
        lambda: loss(reference_logps=3.0),
        TypeError,
        "reference_logps must be a tensor, got float",
    ),
    "reference: too short": (
        lambda: loss(reference_logps=REFERENCE[:3]),
        ValueError,
        "reference_logps must have shape",
    ),
    "reference: sparse": (
        lambda: loss(reference_logps=REFERENCE.to_sparse()),
        TypeError,
        "reference_logps must be a dense tensor",
    ),
    "reference: both": (
        lambda: loss(reference_token_logps=torch.zeros(6)),
        ValueError,
        "give reference_logps or reference_token_logps, not both",
    ),
    "comparisons: text": (lambda: loss(comparisons="ab"), ValueError, "comparisons must be integers, .* got 'ab'"),
    "comparisons: ragged": (lambda: loss(comparisons=[[0, 1], [2]]), ValueError, "comparisons must be integers"),
    "comparisons: a dict": (lambda: loss(comparisons={0: 1}), ValueError, "comparisons must be integers"),
    "comparisons: itself": (lambda: loss(comparisons=[[0, 0], [1, 2]]), ValueError, "two different sequences"),
    "sequences: text": (
        lambda: loss(comparisons=[[0, 2], [1, 3]], num_sequences="4"),
        ValueError,
        "num_sequences must be an int of at least 0 or None, got '4'",
    ),
    "a knob of none": (lambda: loss(betta=1), TypeError, "a loss has no knob betta; knobs are beta"),
}

OF_PAIRS = {
    "count: text": (lambda: sums(count="4"), ValueError, "num_sequences must be an int of at least 0, got '4'"),
    "count: a truth": (lambda: sums(count=True), ValueError, "num_sequences must be an int of at least 0, got True"),
    "count: 2**70": (lambda: sums(count=2**70), ValueError, "num_sequences must be an int"),
    "count: too small": (lambda: sums(count=3), ValueError, r"sequence_ids must be in \[0, 3\)"),
    "values: sparse": (lambda: sums(torch.zeros(6).to_sparse()), TypeError, "token_logps must be a dense tensor"),
    "values: a number": (lambda: sums(3), TypeError, "token_logps must be a tensor, got int"),
    "ids: negative": (lambda: sums(ids=-IDS), ValueError, r"sequence_ids must be in \[0, 4\)"),
    "token weights: NaN": (lambda: sums(weights=torch.full((6,), NAN)), ValueError, "weights must be finite, got 6"),
    "token weights: ints": (lambda: sums(weights=LABELS), TypeError, "weights must have .* got int64"),
    "impl: foo": (lambda: sums(impl="foo"), ValueError, "impl must be one of .* got 'foo'"),
    "no pairs, mean": (lambda: no_pairs(reduction="mean"), ValueError, "reduction 'mean' of no pairs, P = 0"),
    "reduction": (lambda: pairs(reduction="avg"), ValueError, "reduction must be 'none', 'mean' or 'sum', got 'avg'"),
    "lengths: negative": (lambda: lengths([-1, 2]), ValueError, "chosen_lengths must be numbers .* got -1 at index 0"),
    "lengths: NaN": (lambda: lengths([1.0, NAN]), ValueError, "chosen_lengths must be numbers of tokens, got nan"),
    "lengths: none": (lambda: pairs(loss="ipo"), ValueError, "loss ipo needs chosen_lengths, got None"),
    "log-probs above 0": (
        lambda: lengths([1, 2], "orpo", (-SUMS, SUMS)),
        ValueError,
        "chosen_logps must be log-probs, at most 0, got 3.0 at index 0",
    ),
    "log-probs: a list": (
        lambda: pairs([-1.0], SUMS, SUMS, SUMS),
        TypeError,
        "chosen_logps must be a tensor, got list",
    ),
    "log-probs: ints": (lambda: pairs(SUMS.int(), SUMS, SUMS, SUMS), TypeError, "chosen_logps must be floating"),
    "log-probs: sparse": (lambda: pairs(SUMS.to_sparse(), SUMS, SUMS, SUMS), TypeError, "chosen_logps must be a dense"),
    "log-probs: shapes": (
        lambda: pairs(SUMS, SUMS[:1], SUMS, SUMS),
        ValueError,
        r"rejected_logps must have shape \(2,\)",
    ),
    "pair weights: NaN": (lambda: pairs(weights=torch.tensor([NAN, 1])), ValueError, "weights must be finite, got nan"),
    "pair weights: inf": (lambda: pairs(weights=torch.tensor([1, INF])), ValueError, "weights must be finite, got inf"),
    "pair weights: a list": (lambda: pairs(weights=[1, 2]), TypeError, "weights must be a tensor, got list"),
    "a loss without gradient": (
        lambda: pairs(SUMS.clone().requires_grad_(), SUMS, SUMS, SUMS, loss=lambda p: p.margin.detach()),
        RuntimeError,
        "the loss does not depend on pairs.chosen",
    ),
    "Objective: bytes": (lambda: Objective(b"sigmoid"), ValueError, "loss must be one of"),
    "Objective: a set": (lambda: Objective({"sigmoid"}), ValueError, "loss must be a name"),
    "Objective: weighting": (lambda: Objective(use_weighting="no"), TypeError, "use_weighting must be True or False"),
    "Objective: weighting 2": (lambda: Objective(use_weighting=2), TypeError, "use_weighting must be .* got 2"),
    "Objective: ld_alpha": (lambda: Objective(ld_alpha="1"), ValueError, "ld_alpha must be in .* got '1'"),
    "Objective: beta of 400 digits": (lambda: Objective(beta=10**400), ValueError, "beta must be a finite number"),
    "Objective: beta too small": (lambda: Objective(beta=1e-320), ValueError, "beta must be positive, got 1e-320"),
    "Objective: gamma": (
        lambda: Objective("simpo", simpo_gamma=INF),
        ValueError,
        "simpo_gamma must be a finite number",
    ),
    "Objective: tau": (lambda: Objective(discopop_tau=0), ValueError, "discopop_tau must be positive"),
    "Objective: divergence": (
        lambda: Objective(f_divergence_type="kl"),
        ValueError,
        "f_divergence_type must be one of",
    ),
    "Objective of a number": (lambda: Objective()(3), TypeError, "an Objective is called with PairLogps, got int"),
    "Objective without lengths": (
        lambda: Objective("ipo")(PairLogps(SUMS, SUMS, SUMS, SUMS)),
        ValueError,
        "needs the completions' lengths",
    ),
}

PAIR = [TokenPair([5, 6], [7, 8], [5, 6], [9])]
SIMPO = Objective("simpo")


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    """An attached model, a tokenizer, rows and a folder with a model and data."""
    folder = tmp_path_factory.mktemp("bad")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    save_inputs(folder, 8, model)
    return SimpleNamespace(folder=folder, model=dpo_fast.attach(model), tokenizer=tokenizer, rows=tiny_rows(3))


def batch(*without, **changes):
    found = padded_batch(PAIR, 0)
    for name in without:
        del found[name]
    found.update(changes)
    return found


def one_pair(chosen):
    return [TokenPair([5], chosen, [5], [8])]


def on_gpu_with_id(largest):
    """A batch as it is on an accelerator, which is not asked: the host knows the ids."""
    return batch(input_ids=torch.zeros((2, 4), dtype=torch.int64), host_largest_id=largest)


MODELS = {
    "attach: impl": (lambda it: dpo_fast.attach(it.model, impl="foo"), ValueError, "attach: impl must be .* got 'foo'"),
    "attach: impl None": (lambda it: dpo_fast.attach(it.model, impl=None), ValueError, "attach: impl must be .* None"),
    "attach: tile": (lambda it: dpo_fast.attach(it.model, tile_mib="x"), ValueError, "attach: tile_mib must be an int"),
    "attach: a number": (lambda it: dpo_fast.attach(3), TypeError, "attach: expected a Hugging Face causal .* got 3"),
    "attach: a class": (lambda it: dpo_fast.attach(type(it.model)), TypeError, "attach: expected a .* got <class"),
    "attach: a layer": (lambda it: dpo_fast.attach(torch.nn.Linear(2, 2)), TypeError, "attach: expected .* got Linear"),
    "attach: a backbone": (lambda it: dpo_fast.attach(it.model.model), TypeError, "attach: expected .* got LlamaModel"),
    **{
        f"a batch without {name}": (
            lambda it, name=name: it.model(batch(name)),
            TypeError,
            rf"model\(batch\): a PreferenceBatch has .* got a dict without {name}; padded_batch",
        )
        for name in ("input_ids", "targets", "sequence_ids", "predictors", "lengths", "layout")
    },
    "a dict": (lambda it: it.model({"a": 1}), TypeError, "got a dict without input_ids, targets"),
    "a model that is not attached": (lambda it: tiny_model()(batch()), TypeError, r"call dpo_fast.attach\(model\)"),
    "predictors: too large": (
        lambda it: it.model(batch(predictors=torch.tensor([1, 2, 99]))),
        ValueError,
        r"predictors must be in \[0, 8\), positions of input_ids, got 1 to 99",
    ),
    "predictors: negative": (
        lambda it: it.model(batch(predictors=torch.tensor([-1, 2, 3]))),
        ValueError,
        r"predictors must be in \[0, 8\)",
    ),
    "predictors: floats": (
        lambda it: it.model(batch(predictors=torch.tensor([1.0, 2.0, 3.0]))),
        TypeError,
        "predictors must have one of the dtypes int64, got float32",
    ),
    "predictors: a list": (lambda it: it.model(batch(predictors=[1, 2, 3])), TypeError, "predictors must be a tensor"),
    "predictors: too few": (
        lambda it: it.model(batch(predictors=torch.tensor([1, 2]))),
        ValueError,
        r"predictors must have shape \(3\), got \(2,\)",
    ),
    "input_ids: no embedding": (
        lambda it: it.model(batch(input_ids=torch.full((2, 4), 999))),
        ValueError,
        "input_ids holds the token id 999, the model's embedding has 320 rows",
    ),
    "input_ids: no embedding, made on the host": (
        lambda it: it.model(padded_batch(one_pair([999]), 0)),
        ValueError,
        "input_ids holds the token id 999",
    ),
    "input_ids: negative": (
        lambda it: it.model(batch(input_ids=torch.full((2, 4), -1))),
        ValueError,
        "input_ids are at least 0, got -1",
    ),
    "input_ids: floats": (
        lambda it: it.model(batch(input_ids=torch.ones(2, 4))),
        TypeError,
        "input_ids must have one of the dtypes int64, int32, got float32",
    ),
    "input_ids: None": (lambda it: it.model(batch(input_ids=None)), TypeError, "input_ids must be a tensor"),
    "targets: out of range": (
        lambda it: it.model(batch(targets=torch.tensor([1, 2, 999]))),
        ValueError,
        r"labels are outside \[0, 320\)",
    ),
    "sequence_ids: None": (lambda it: it.model(batch(sequence_ids=None)), TypeError, "sequence_ids must be a tensor"),
    "mask: another shape": (
        lambda it: it.model(batch(attention_mask=torch.ones(1, 1))),
        ValueError,
        r"attention_mask must be of shape \(2, 4\) or None",
    ),
    "layout: text": (lambda it: it.model(batch(layout="x")), TypeError, "layout must be a SharedPrefixLayout or None"),
    "host_lengths: 3": (
        lambda it: it.model(batch(host_lengths=3), objective=SIMPO),
        ValueError,
        "sequence_lengths must be a sequence of ints",
    ),
    "outputs": (lambda it: it.model(batch(), outputs="entropy"), ValueError, "outputs must be a sequence of names"),
    "a reference alone": (
        lambda it: it.model(batch(), reference_logps=torch.zeros(2)),
        TypeError,
        "reference_logps only together with objective",
    ),
    "labels beside a batch": (lambda it: it.model(batch(), labels=3), TypeError, "takes nothing but outputs, .*labels"),
    "score: no batch": (lambda it: score(it.model, 3), TypeError, "score: batch must be a PreferenceBatch, got int"),
    "step: no batch": (lambda it: preference_step(it.model, [1], SIMPO), TypeError, "batch must be .* got list"),
    "step: a name": (
        lambda it: preference_step(it.model, batch(), "simpo"),
        TypeError,
        "objective must be an Objective, got 'simpo'",
    ),
    "step: a reference": (
        lambda it: preference_step(it.model, batch(), Objective(), 3),
        TypeError,
        "reference must be SequenceScores, a tensor or None, got 3",
    ),
    "step: metrics": (
        lambda it: preference_step(it.model, batch(), SIMPO, extra_metrics=["x"]),
        ValueError,
        "extra_metrics must be names of entropy",
    ),
    "no pairs": (lambda it: padded_batch([], 0), ValueError, "padded_batch: got no pairs"),
    "pairs: a number": (lambda it: padded_batch(3, 0), TypeError, "pairs must be a sequence of TokenPair, got int"),
    "pairs: tuples": (lambda it: padded_batch([(1, 2)], 0), TypeError, r"pairs\[0\] must be a TokenPair, got tuple"),
    "pad id: None": (lambda it: padded_batch(PAIR, None), ValueError, "pad_token_id must be an int of at least 0"),
    "multiple: 0": (lambda it: padded_batch(PAIR, 0, 0), ValueError, "pad_to_multiple_of must be an int of at least 1"),
    "ids: floats": (lambda it: padded_batch(one_pair([6.7]), 0), TypeError, "token ids must be ints, got .6.7"),
    "ids: truths": (lambda it: padded_batch(one_pair([True]), 0), TypeError, "token ids must be ints, got .True"),
    "ids: ints and a truth": (lambda it: padded_batch(one_pair([5, True]), 0), TypeError, "must be ints, got .5, True"),
    "ids: an array of floats": (
        lambda it: padded_batch(one_pair(np.array([6.0])), 0),
        TypeError,
        r"token ids must be ints, got array\(\[6",
    ),
    "ids: an array of truths": (
        lambda it: shared_prefix_batch(one_pair(np.array([True]))),
        TypeError,
        r"token ids must be ints, got array\(\[ ?True",
    ),
    "ids: a tensor of floats": (
        lambda it: shared_prefix_batch(one_pair(torch.ones(2))),
        TypeError,
        r"token ids must be ints, .* got tensor of shape \(2,\)",
    ),
    "ids: a matrix": (
        lambda it: shared_prefix_batch(one_pair(torch.ones((2, 2), dtype=torch.int64))),
        TypeError,
        r"token ids must be ints, one dimension of them on the CPU, got tensor of shape \(2, 2\), int64 on cpu",
    ),
    "ids: negative in an array": (
        lambda it: shared_prefix_batch(one_pair(np.array([5, -6]))),
        ValueError,
        "token ids are at least 0 .* got -6",
    ),
    "ids: text": (lambda it: padded_batch(one_pair("67"), 0), TypeError, r"chosen must be a sequence of token ids"),
    "ids: None": (lambda it: padded_batch(one_pair(None), 0), TypeError, r"pairs\[0\].chosen must be .* NoneType"),
    "ids: negative": (lambda it: padded_batch(one_pair([-6]), 0), ValueError, "token ids are at least 0 .* got -6"),
    "ids: 2**70": (lambda it: padded_batch(one_pair([2**70]), 0), ValueError, r"token ids are .* below 2\*\*31"),
    "ids: floats in a packed row": (
        lambda it: shared_prefix_batch(one_pair([6.7])),
        TypeError,
        "token ids must be ints, got",
    ),
}


def config(**changes):
    return FastDPOConfig(**{**QUIET, "output_dir": "unused", **changes})


# arguments of FastDPOConfig -> exception, what the message names
CONFIG = {
    "max_length='512'": (dict(max_length="512"), TypeError, "max_length must be a whole number or None, got '512'"),
    "max_length=10.5": (dict(max_length=10.5), TypeError, "max_length must be a whole number or None, got 10.5"),
    "max_length=True": (dict(max_length=True), TypeError, "max_length must be a whole number or None, got True"),
    "max_length=2**70": (dict(max_length=2**70), ValueError, "max_length must be at most 2147483647"),
    "max_prompt_length=0": (dict(max_prompt_length=0), ValueError, "max_prompt_length must be at least 1"),
    "tokens_per_batch='100'": (dict(tokens_per_batch="100"), TypeError, "tokens_per_batch must be a whole number"),
    "pad_to_multiple_of='most'": (dict(pad_to_multiple_of="most"), ValueError, "pad_to_multiple_of must be a whole"),
    "dataset_num_proc=1.5": (dict(dataset_num_proc=1.5), TypeError, "dataset_num_proc must be a whole number or None"),
    "tile_mib='x'": (dict(tile_mib="x"), TypeError, "tile_mib must be a whole number or None, got 'x'"),
    "truncation_mode=None": (dict(truncation_mode=None), TypeError, "truncation_mode must be one of keep_start"),
    "layout=['auto']": (dict(layout=["auto"]), TypeError, "layout must be one of auto, shared_prefix, padded"),
    "impl=None": (dict(impl=None), TypeError, "impl must be one of auto, triton"),
    "model_init_kwargs='{bad'": (dict(model_init_kwargs="{bad"), ValueError, "model_init_kwargs must be a mapping"),
    "model_init_kwargs='[1]'": (dict(model_init_kwargs="[1]"), ValueError, "model_init_kwargs must be a mapping"),
    "model_init_kwargs={1: 2}": (dict(model_init_kwargs={1: 2}), TypeError, "model_init_kwargs must be a mapping"),
    "model_init_kwargs: the path": (
        dict(model_init_kwargs={"pretrained_model_name_or_path": "x"}),
        ValueError,
        "model_init_kwargs must not hold pretrained_model_name_or_path",
    ),
    "chat_template_kwargs=3": (dict(chat_template_kwargs=3), ValueError, "chat_template_kwargs must be a mapping"),
    "extra_metrics=None": (dict(extra_metrics=None), ValueError, "extra_metrics must be a list of entropy"),
    "extra_metrics=[['x']]": (dict(extra_metrics=[["x"]]), ValueError, "extra_metrics must be a list of entropy"),
    **{
        f"{name}='no'": ({name: "no"}, TypeError, f"{name} must be True or False( or None)?, got 'no'")
        for name in (
            "use_weighting",
            "disable_dropout",
            "precompute_ref_log_probs",
            "trust_remote_code",
            "print_example",
            "bf16",
            "fp16",
            "gradient_checkpointing",
            "logging_nan_inf_filter",
            "torch_compile",
            "full_determinism",
            "push_to_hub",
            "eval_on_start",
            "load_best_model_at_end",
            "dataloader_drop_last",
            "use_liger_kernel",
            "use_cpu",
            "tf32",
        )
    },
    "use_weighting=None": (dict(use_weighting=None), TypeError, "use_weighting must be True or False, got None"),
    "bf16=2": (dict(bf16=2), TypeError, "bf16 must be True or False or None, got 2"),
    "learning_rate='abc'": (dict(learning_rate="abc"), TypeError, "learning_rate must be a number, got 'abc'"),
    "learning_rate='1e-4'": (dict(learning_rate="1e-4"), TypeError, "learning_rate must be a number, got '1e-4'"),
    "learning_rate=True": (dict(learning_rate=True), TypeError, "learning_rate must be a number, got True"),
    "learning_rate=nan": (dict(learning_rate=NAN), ValueError, "learning_rate must be a finite number"),
    "learning_rate=-1": (
        dict(learning_rate=-1),
        ValueError,
        "learning_rate must be a finite number, at least 0, got -1",
    ),
    "learning_rate=10**400": (dict(learning_rate=10**400), ValueError, "learning_rate must be a finite number"),
    "beta=True": (dict(beta=True), TypeError, "beta must be a number, got True"),
    "router_aux_loss_coef=nan": (dict(router_aux_loss_coef=NAN), ValueError, "router_aux_loss_coef must be a finite"),
    "loss_type=3": (dict(loss_type=3), ValueError, "loss_type: loss must be a name, a function"),
    "loss_type=['sigmod']": (dict(loss_type=["sigmod"]), ValueError, "loss_type: loss must be one of .* got 'sigmod'"),
    "loss_weights='1'": (dict(loss_weights="1"), ValueError, "loss_weights: loss weights must be 1 finite numbers"),
    "batch size '4'": (
        dict(per_device_train_batch_size="4"),
        TypeError,
        "per_device_train_batch_size must be a whole number, got '4'",
    ),
    "batch size 1.5": (dict(per_device_train_batch_size=1.5), TypeError, "per_device_train_batch_size must be a whole"),
    "batch size 0": (dict(per_device_train_batch_size=0), ValueError, "per_device_train_batch_size must be at least 1"),
    "accumulation 0": (
        dict(gradient_accumulation_steps=0),
        ValueError,
        "gradient_accumulation_steps must be at least 1, got 0",
    ),
    "max_steps=None": (dict(max_steps=None), TypeError, "max_steps must be a whole number, got None"),
    "max_steps=0": (dict(max_steps=0), ValueError, "max_steps must be at least 1, or -1 to train num_train_epochs"),
    "max_steps=-5": (dict(max_steps=-5), ValueError, "max_steps must be at least -1"),
    "num_train_epochs='x'": (dict(num_train_epochs="x"), TypeError, "num_train_epochs must be a number, got 'x'"),
    "num_train_epochs=nan": (dict(num_train_epochs=NAN), ValueError, "num_train_epochs must be a finite number"),
    "seed=-1": (dict(seed=-1), ValueError, "seed must be from 0 to 4294967295, got -1"),
    "seed=2**40": (dict(seed=2**40), ValueError, "seed must be from 0 to 4294967295"),
    "seed='x'": (dict(seed="x"), TypeError, "seed must be a whole number, got 'x'"),
    "data_seed=-1": (dict(data_seed=-1), ValueError, "data_seed must be from 0 to"),
    "warmup_steps='x'": (dict(warmup_steps="x"), TypeError, "warmup_steps must be a number"),
    "logging_steps='x'": (dict(logging_steps="x"), TypeError, "logging_steps must be a number"),
    "save_total_limit='x'": (dict(save_total_limit="x"), TypeError, "save_total_limit must be a whole number or None"),
    "max_grad_norm='x'": (dict(max_grad_norm="x"), TypeError, "max_grad_norm must be a number, got 'x'"),
    "adam_beta2='x'": (dict(adam_beta2="x"), TypeError, "adam_beta2 must be a number, got 'x'"),
    "eval_delay=nan": (dict(eval_delay=NAN), ValueError, "eval_delay must be a finite number"),
    "ddp_timeout='x'": (dict(ddp_timeout="x"), TypeError, "ddp_timeout must be a whole number, got 'x'"),
    "label_names=3": (dict(label_names=3), TypeError, "label_names must be a list of text or None, got 3"),
    "hub_token=3": (dict(hub_token=3), TypeError, "hub_token must be text or None, got 3"),
    "output_dir=3": (dict(output_dir=3), TypeError, "output_dir must be text or None, got 3"),
    "metric_for_best_model=3": (dict(metric_for_best_model=3), TypeError, "metric_for_best_model must be text"),
    "report_to=3": (dict(report_to=3), TypeError, "report_to must be text or a list of text or None, got 3"),
    "debug=3": (dict(debug=3), TypeError, "debug must be text or a list of text, got 3"),
    "parallelism_config='x'": (dict(parallelism_config="x"), TypeError, "parallelism_config must be .* got 'x'"),
    "fsdp=3": (dict(fsdp=3), TypeError, "fsdp must be .* got 3"),
    "fsdp_config='x'": (dict(fsdp_config="x"), TypeError, "fsdp_config must be a mapping, .* got 'x'"),
    "liger_kernel_config=3": (dict(liger_kernel_config=3), TypeError, "liger_kernel_config must be a mapping"),
    "lr_scheduler_kwargs='x'": (dict(lr_scheduler_kwargs="x"), TypeError, "lr_scheduler_kwargs must be a mapping"),
    "lr_scheduler_type='x'": (dict(lr_scheduler_type="x"), ValueError, "lr_scheduler_type must be one of linear"),
    "optim='x'": (dict(optim="x"), ValueError, "optim must be one of adamw_torch"),
    "save_strategy='x'": (dict(save_strategy="x"), ValueError, "save_strategy must be one of no, steps, epoch, best"),
    "log_level='x'": (dict(log_level="x"), ValueError, "log_level must be one of .*warning"),
    "accelerator_config=3": (dict(accelerator_config=3), TypeError, "accelerator_config must be a mapping"),
    "accelerator_config={'split_batches': 3}": (
        dict(accelerator_config={"split_batches": 3}),
        TypeError,
        "accelerator_config: split_batches must be True or False, got 3",
    ),
    "torch_compile_backend": (dict(torch_compile_backend="x"), ValueError, "torch_compile_backend must be one of"),
    "torch_compile_mode": (dict(torch_compile_mode="x"), ValueError, "torch_compile_mode must be one of default"),
    "fp16 and bf16": (dict(fp16=True, bf16=True), ValueError, "fp16 and bf16"),
    "smoothing of another loss": (
        dict(label_smoothing_factor=0.1),
        ValueError,
        "label_smoothing_factor .* label_smooth",
    ),
    "an unknown argument": (dict(betta=1), TypeError, r"unexpected keyword arguments: betta \(did you mean beta"),
}


def trainer(it, **changes):
    given = dict(model=str(it.folder / "model"), args=config(), train_dataset=it.rows, processing_class=it.tokenizer)
    return FastDPOTrainer(**{**given, **changes})


def stream(it):
    return datasets.Dataset.from_list(it.rows).to_iterable_dataset()


def with_image(it):
    return [{**row, "image": "x"} for row in it.rows]


def photos(it):
    found = datasets.Dataset.from_list([{**row, "photo": None} for row in it.rows])
    return found.cast_column("photo", datasets.Image())


def tokens(**changes):
    return [{"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [8], **changes}]


TRAINER = {
    "model: a number": (dict(model=5), TypeError, "model must be a language model of transformers .* got int"),
    "model: a layer": (dict(model=torch.nn.Linear(2, 2)), TypeError, "model must be a language model .* got Linear"),
    "model: a function": (dict(model=tiny_model), TypeError, "model must be a language model .* got function"),
    "model: a config": (dict(model=tiny_config()), TypeError, "model must be a language model .* got LlamaConfig"),
    "model: no text": (dict(model=""), TypeError, "model must be .* the path of one, got ''"),
    "ref_model: a number": (dict(ref_model=5), TypeError, "ref_model must be a language model .* got int"),
    "ref_model: a layer": (dict(ref_model=torch.nn.Linear(2, 2)), TypeError, "ref_model must be a language model"),
    "ref_model: another vocabulary": (
        lambda it: trainer(it, ref_model=tiny_model(vocab_size=300)),
        ValueError,
        "row 0: .* token id 3.., the model's embedding has 300 rows",
    ),
    "ref_model: the policy": (
        lambda it: trainer(it, model=it.model, ref_model=it.model),
        ValueError,
        "the same object",
    ),
    "a frozen model": (
        lambda it: trainer(it, model=tiny_model().requires_grad_(False)),
        ValueError,
        "no parameter of the model trains",
    ),
    "args: a dict": (dict(args={}), TypeError, "args must be a FastDPOConfig, .* got dict"),
    "args: transformers'": (
        lambda it: trainer(it, args=transformers.TrainingArguments(output_dir="unused", use_cpu=True)),
        TypeError,
        "args must be a FastDPOConfig, .* got TrainingArguments",
    ),
    "tokenizer: text": (dict(processing_class="gpt2"), TypeError, "processing_class must be a tokenizer, got str"),
    "tokenizer: a function": (dict(processing_class=lambda x: x), TypeError, "must be a tokenizer, got function"),
    "tokenizer: a class": (dict(processing_class=transformers.PreTrainedTokenizerFast), TypeError, "got a class"),
    "tokenizer: none, no path": (
        lambda it: trainer(it, model=tiny_model(), processing_class=None),
        ValueError,
        "processing_class is needed",
    ),
    "data: a number": (dict(train_dataset=3), TypeError, "train dataset must be a datasets.Dataset, .* got int"),
    "data: text": (dict(train_dataset="x"), TypeError, "train dataset must be a datasets.Dataset, .* got str"),
    "data: bytes": (dict(train_dataset=b"ab"), TypeError, "row 0 is int, expected a dict"),
    "data: an iterator": (lambda it: trainer(it, train_dataset=iter(it.rows)), TypeError, "got list_iterator"),
    "data: a dict": (dict(train_dataset={"a": 1}), TypeError, "train dataset must be a datasets.Dataset, .* got dict"),
    "data: none": (dict(train_dataset=[]), ValueError, "train dataset is empty"),
    "data: numbers": (dict(train_dataset=[3]), TypeError, "row 0 is int, expected a dict"),
    "data: texts": (dict(train_dataset=["a"]), TypeError, "row 0 is str, expected a dict"),
    "data: splits": (
        lambda it: trainer(it, train_dataset=datasets.DatasetDict(train=datasets.Dataset.from_list(it.rows))),
        TypeError,
        r"train dataset has splits \(train\)",
    ),
    "data: images": (lambda it: trainer(it, train_dataset=with_image(it)), ValueError, "column 'image': only text"),
    "eval data: a number": (dict(eval_dataset={"a": 3}), TypeError, "eval a dataset must be .* got int"),
    "collator: a number": (dict(data_collator=3), TypeError, "data_collator must be callable, got int"),
    "collator: dicts": (dict(data_collator=lambda rows: {}), TypeError, "must make a PreferenceBatch .* makes a dict"),
    "collator: no argument": (dict(data_collator=lambda: 1), TypeError, "data_collator .* it raises TypeError"),
    "collator: transformers'": (
        dict(data_collator=transformers.default_data_collator),
        TypeError,
        r"data_collator \(default_data_collator\) must make a PreferenceBatch",
    ),
    "adapter: a dict": (dict(peft_config={"r": 2}), TypeError, "peft_config must be a peft.PeftConfig, .* got dict"),
    "callbacks: a number": (dict(callbacks=3), TypeError, "callbacks must be a list of TrainerCallback or None, got 3"),
    "callbacks: of numbers": (dict(callbacks=[3]), TypeError, "callbacks must be a list of TrainerCallback"),
    "optimizers: one": (dict(optimizers=(None,)), TypeError, "optimizers must be a pair"),
    "optimizers: numbers": (dict(optimizers=(3, 3)), TypeError, "optimizers must be a pair .optimizer or None"),
    "compute_metrics": (dict(compute_metrics=len), TypeError, "takes no compute_metrics: no logits leave the model"),
    "tokenizer=": (
        lambda it: trainer(it, tokenizer=it.tokenizer),
        TypeError,
        "tokenizer: it is called processing_class",
    ),
    "an unknown argument": (dict(foo=1), TypeError, "takes no argument foo"),
    "a stream by tokens": (
        lambda it: trainer(it, train_dataset=stream(it), args=config(tokens_per_batch=9, max_steps=1)).train(),
        ValueError,
        "tokens_per_batch needs data of known length",
    ),
    "a stream, precomputed": (
        lambda it: trainer(it, train_dataset=stream(it), args=config(precompute_ref_log_probs=True, max_steps=1)),
        ValueError,
        "precompute_ref_log_probs needs data of known length",
    ),
    "evaluate: a name": (lambda it: trainer(it).evaluate("x"), ValueError, "there is no eval_dataset named 'x'"),
    "predict: None": (lambda it: trainer(it).predict(None), TypeError, "test_dataset must be a data set, got None"),
}

DATA = {
    "truncation: a number": (lambda it: prepare_dataset(it.rows, it.tokenizer, 3), TypeError, "truncation must be a"),
    "truncation: '3'": (lambda it: Truncation("3"), ValueError, "max_length must be at least 1, or None .* got '3'"),
    "truncation: 1.5": (
        lambda it: Truncation(max_prompt_length=1.5),
        ValueError,
        "max_prompt_length must be .* got 1.5",
    ),
    "tokenizer: a number": (lambda it: prepare_dataset(it.rows, 3, Truncation()), TypeError, "must be a tokenizer"),
    "processes: text": (
        lambda it: prepare_dataset(it.rows, it.tokenizer, Truncation(), num_proc="x"),
        ValueError,
        "num_proc must be an int of at least 1 or None, got 'x'",
    ),
    "template options: 3": (
        lambda it: prepare_dataset(it.rows, it.tokenizer, Truncation(), template_options=3),
        TypeError,
        "template_options must be a dict or None, got int",
    ),
    "half a character": (
        lambda it: prepare_dataset([{"prompt": "a", "chosen": "\ud800", "rejected": "b"}], it.tokenizer, Truncation()),
        ValueError,
        r"row 0: chosen holds half of a character, '\\ud800'",
    ),
    "half of the reference": (
        lambda it: prepare_dataset(tokens(ref_chosen_logps=-1.0), it.tokenizer, Truncation()),
        ValueError,
        "column ref_chosen_logps, but no ref_rejected_logps",
    ),
    "pixels": (
        lambda it: prepare_dataset(tokens(pixel_values=[1]), it.tokenizer, Truncation()),
        ValueError,
        "column 'pixel_values': only text",
    ),
    "pictures": (
        lambda it: prepare_dataset(photos(it), it.tokenizer, Truncation()),
        ValueError,
        "column 'photo': only text",
    ),
    "collator: layout": (lambda it: PairCollator(0, layout="foo"), ValueError, "layout must be one of shared_prefix"),
    "collator: raw rows": (lambda it: PairCollator(0)(it.rows), ValueError, "rows must have prompt_ids, .* got prompt"),
}

# --- stacked rows ---------------------------------------------------------------------------------------------------

IDS_OF_ROWS = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 6, 10, 0], [5, 6, 11, 12]])
MASK_OF_ROWS = (IDS_OF_ROWS > 0).long()
LABELS_OF_ROWS = IDS_OF_ROWS.masked_fill((torch.arange(4) < 2) | (IDS_OF_ROWS == 0), -100)


def of_rows(it=None, model=None, ids=IDS_OF_ROWS, mask=MASK_OF_ROWS, labels=LABELS_OF_ROWS, **knobs):
    return dpo_fast.completion_logps(it.model if model is None else model, ids, mask, labels, **knobs)


def batch_logps(logits=None, labels=LABELS_OF_ROWS, *args, **knobs):
    return dpo_fast.get_batch_logps(torch.zeros(4, 4, 16) if logits is None else logits, labels, *args, **knobs)


def with_lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))


def encoder_decoder():
    sizes = dict(d_model=16, d_kv=4, d_ff=16, num_heads=4, num_layers=1, vocab_size=32)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def with_a_hole(row=0):
    mask = MASK_OF_ROWS.clone()
    mask[row, 1] = 0
    return mask


ROWS = {
    "rows: no model": (
        lambda it: of_rows(model=3),
        TypeError,
        "completion_logps: model must be a causal language model, got int",
    ),
    "rows: no head": (
        lambda it: of_rows(model=tiny_model().model),
        TypeError,
        "completion_logps: model must be, or hold, a Hugging Face causal LM with an output head .* got LlamaModel",
    ),
    "rows: a layer": (
        lambda it: of_rows(model=torch.nn.Linear(2, 2)),
        TypeError,
        "model must be, or hold, .* got Linear",
    ),
    "rows: no head under PEFT": (
        lambda it: of_rows(model=with_lora(tiny_model().model)),
        TypeError,
        "model must be, or hold, a Hugging Face causal LM with an output head",
    ),
    "rows: an encoder-decoder": (
        lambda it: of_rows(model=encoder_decoder()),
        TypeError,
        "model must be a decoder, T5ForConditionalGeneration is an encoder-decoder",
    ),
    "rows: two models": (
        lambda it: of_rows(model=torch.nn.ModuleList([tiny_model(), tiny_model()])),
        TypeError,
        "model holds 2 language models .*: pass the one to be scored",
    ),
    "rows: DataParallel": (
        lambda it: of_rows(model=torch.nn.DataParallel(tiny_model())),
        TypeError,
        "model is a DataParallel, which splits batches by rows",
    ),
    "rows: labels of another shape": (
        lambda it: of_rows(it, labels=LABELS_OF_ROWS[:, 1:]),
        ValueError,
        r"labels must have shape \(4, 4\), got \(4, 3\)",
    ),
    "rows: logits for labels": (
        lambda it: of_rows(it, labels=torch.zeros(4, 4, 16)),
        ValueError,
        r"labels must be token ids, \(4, 4\), got \(4, 4, 16\): these may be logits",
    ),
    "rows: labels of floats": (
        lambda it: of_rows(it, labels=LABELS_OF_ROWS.float()),
        TypeError,
        "labels must have one of",
    ),
    "rows: labels in a list": (
        lambda it: of_rows(it, labels=LABELS_OF_ROWS.tolist()),
        TypeError,
        "labels must be a tensor",
    ),
    "rows: no label": (
        lambda it: of_rows(it, labels=LABELS_OF_ROWS.index_fill(0, torch.tensor([2]), -100)),
        ValueError,
        "labels have no scored token in row 2",
    ),
    "rows: a label on the first token": (
        lambda it: of_rows(it, labels=torch.full_like(LABELS_OF_ROWS, -100).index_fill(1, torch.tensor([0]), 5)),
        ValueError,
        "labels have no scored token in row 0",
    ),
    "rows: a label on padding": (
        lambda it: of_rows(it, labels=IDS_OF_ROWS.masked_fill(torch.arange(4) < 2, -100)),
        ValueError,
        r"labels are not -100 everywhere on padding \(attention_mask 0\)",
    ),
    "rows: a label out of range": (
        lambda it: of_rows(it, labels=LABELS_OF_ROWS.masked_fill(LABELS_OF_ROWS == 9, 999)),
        ValueError,
        r"completion_logps: 1 of 16 labels are outside \[0, 320\) .* the first is 999 at index \[1, 2\]",
    ),
    "rows: ids out of range": (
        lambda it: of_rows(it, ids=IDS_OF_ROWS.masked_fill(IDS_OF_ROWS == 9, 999)),
        ValueError,
        "input_ids holds the token id 999, the model's embedding has 320 rows",
    ),
    "rows: an id below 0": (
        lambda it: of_rows(it, ids=IDS_OF_ROWS.masked_fill(IDS_OF_ROWS == 9, -200)),
        ValueError,
        "input_ids are at least 0, got -200",
    ),
    "rows: ids of one dimension": (
        lambda it: of_rows(it, ids=IDS_OF_ROWS[0]),
        ValueError,
        r"input_ids must have shape \(B, T\)",
    ),
    "rows: none": (
        lambda it: of_rows(it, ids=IDS_OF_ROWS[:0], mask=MASK_OF_ROWS[:0], labels=LABELS_OF_ROWS[:0]),
        ValueError,
        "input_ids must have at least one row and one column",
    ),
    "rows: an odd number": (
        lambda it: of_rows(it, ids=IDS_OF_ROWS[:3], mask=MASK_OF_ROWS[:3], labels=LABELS_OF_ROWS[:3]),
        ValueError,
        "pairs=True takes an even number of rows of input_ids, .* got 3; pass pairs=False",
    ),
    "rows: a hole": (
        lambda it: of_rows(it, mask=with_a_hole()),
        ValueError,
        "attention_mask is not one run of ones in each",
    ),
    "rows: a hole, no pairs": (
        lambda it: of_rows(it, mask=with_a_hole(), pairs=False),
        ValueError,
        "attention_mask is not one",
    ),
    "rows: an empty row": (
        lambda it: of_rows(it, mask=MASK_OF_ROWS.index_fill(0, torch.tensor([1]), 0)),
        ValueError,
        "attention_mask is not one run of ones in each row",
    ),
    "rows: segments in the mask": (
        lambda it: of_rows(it, mask=MASK_OF_ROWS * 2),
        ValueError,
        "attention_mask is not one run",
    ),
    "rows: mask of another shape": (
        lambda it: of_rows(it, mask=MASK_OF_ROWS[:, :3]),
        ValueError,
        r"attention_mask must have shape \(4, 4\), got \(4, 3\)",
    ),
    "rows: mask in a list": (lambda it: of_rows(it, mask=[1]), TypeError, "attention_mask must be a tensor, got list"),
    "rows: pairs=2": (lambda it: of_rows(it, pairs=2), TypeError, "pairs must be True or False, got 2"),
    "rows: an unknown statistic": (
        lambda it: of_rows(it, outputs=("logit",)),
        ValueError,
        "outputs must be a sequence of names",
    ),
    "rows: ld_alpha=2": (
        lambda it: of_rows(it, ld_alpha=2),
        ValueError,
        r"ld_alpha must be in \[0, 1\] or None, got 2",
    ),
    "rows: ld_alpha='1'": (
        lambda it: of_rows(it, ld_alpha="1"),
        ValueError,
        r"ld_alpha must be in \[0, 1\] or None, got '1'",
    ),
    "rows: ld_alpha without pairs": (
        lambda it: of_rows(it, ld_alpha=0.5, pairs=False),
        ValueError,
        "it needs pairs=True",
    ),
    "rows: positions": (
        lambda it: of_rows(it, position_ids=IDS_OF_ROWS),
        TypeError,
        "takes no position_ids: rows that are packed already, or cut as for sequence parallelism",
    ),
    "rows: shifted labels": (lambda it: of_rows(it, shift_labels=IDS_OF_ROWS), TypeError, "takes no shift_labels"),
    "batch logps: labels of another shape": (
        lambda it: batch_logps(labels=LABELS_OF_ROWS[:, 1:]),
        ValueError,
        r"get_batch_logps: labels must have shape \(4, 4\), got \(4, 3\)",
    ),
    "batch logps: logits for labels": (
        lambda it: batch_logps(labels=torch.zeros(4, 4, 16)),
        TypeError,
        "labels must have one of the dtypes int64, int32, got float32",
    ),
    "batch logps: labels for logits": (
        lambda it: batch_logps(LABELS_OF_ROWS, LABELS_OF_ROWS),
        TypeError,
        "logits must have one",
    ),
    "batch logps: logits of tokens": (
        lambda it: batch_logps(torch.zeros(16, 16)),
        ValueError,
        r"logits must have shape \(B, T, V\), got \(16, 16\)",
    ),
    "batch logps: a model's output": (
        lambda it: batch_logps(SimpleNamespace(logits=1)),
        TypeError,
        "logits must be a tensor",
    ),
    "batch logps: a label out of range": (
        lambda it: batch_logps(torch.zeros(4, 4, 8)),
        ValueError,
        r"get_batch_logps: 5 of 16 labels are outside \[0, 8\).* is 8 at index \[0, 3\]",
    ),
    "batch logps: no label, mean": (
        lambda it: batch_logps(None, LABELS_OF_ROWS.index_fill(0, torch.tensor([1]), -100), True),
        ValueError,
        "labels have no scored token in row 1, so no mean",
    ),
    "batch logps: pad of another kind": (
        lambda it: batch_logps(None, LABELS_OF_ROWS, False, "pad"),
        TypeError,
        "label_pad_token_id must be an int of 64 bits, got 'pad'",
    ),
    "batch logps: average of another kind": (
        lambda it: batch_logps(None, LABELS_OF_ROWS, "mean"),
        TypeError,
        "average_log_prob must be True or False, got 'mean'",
    ),
    "batch logps: no column": (
        lambda it: batch_logps(torch.zeros(4, 0, 16), LABELS_OF_ROWS[:, :0]),
        ValueError,
        "labels must have at least one column",
    ),
}

CALLS = {
    "logits": ON_LOGITS,
    "heads": ON_HEADS,
    "linear_preference_loss": LINEAR_PREFERENCE_LOSS,
    "pairs": OF_PAIRS,
    "models": MODELS,
    "config": CONFIG,
    "trainer": TRAINER,
    "data": DATA,
    "rows": ROWS,
}


@pytest.mark.parametrize("group, name", [(group, name) for group, rows in CALLS.items() for name in rows])
def test_a_bad_argument_is_named(it, group, name, tmp_path, monkeypatch):
    what, error, said = CALLS[group][name]
    monkeypatch.chdir(tmp_path)  # a trainer makes its folder
    with pytest.raises(error, match=said) as caught:
        if isinstance(what, dict):
            (config(**what) if group == "config" else trainer(it, **what))
        else:
            what(it) if group in ("models", "trainer", "data", "rows") else what()
    assert type(caught.value) is error or error is not TypeError and issubclass(caught.type, error)


# --- the command line ------------------------------------------------------------------------------------------------

# lines of a recipe -> what the line on stderr names
RECIPES = {
    "logging_steps: -1": "logging_steps must be a finite number, at least 0, got -1",
    "save_total_limit: -3": "save_total_limit must be at least 0 or None, got -3",
    "warmup_steps: -5": "warmup_steps must be a finite number, at least 0, got -5",
    "warmup_steps: .inf": "warmup_steps must be a finite number",
    "max_grad_norm: -1": "max_grad_norm must be a number, at least 0, got -1",
    "max_grad_norm: .nan": "max_grad_norm must be a number, got '.nan'",
    "weight_decay: .nan": "weight_decay must be a number, got '.nan'",
    "weight_decay: -1": "weight_decay must be a finite number, at least 0, got -1",
    "weight_decay: .inf": "weight_decay must be a finite number",
    "adam_beta1: 2.0": "adam_beta1 must be a finite number, from 0 and below 1, got 2.0",
    "adam_beta2: -1": "adam_beta2 must be a finite number, from 0 and below 1, got -1",
    "adam_epsilon: -1": "adam_epsilon must be a finite number, at least 0",
    "eval_steps: 0": "eval_steps must be above 0, got 0; eval_strategy='no' is for never",
    "save_steps: 0": "save_steps must be above 0, got 0; save_strategy='no' is for never",
    "seed: 1099511627776": "seed must be from 0 to 4294967295",
    "seed: -1": "seed must be from 0 to 4294967295, got -1",
    "max_steps: 0": "max_steps must be at least 1",
    "eval_delay: -1": "eval_delay must be a finite number, at least 0",
    "eval_accumulation_steps: 0": "eval_accumulation_steps must be at least 1 or None, got 0",
    "torch_empty_cache_steps: 0": "torch_empty_cache_steps must be at least 1 or None, got 0",
    "ddp_timeout: -1": "ddp_timeout must be at least 1, got -1",
    "dataloader_prefetch_factor: 0": "dataloader_prefetch_factor must be at least 1",
    "dataloader_persistent_workers: true": "dataloader_persistent_workers needs dataloader_num_workers",
    "dataloader_multiprocessing_context: fork": "dataloader_multiprocessing_context needs dataloader_num_workers",
    "neftune_noise_alpha: x": "neftune_noise_alpha must be a number or null, got 'x'",
    "neftune_noise_alpha: -1": "neftune_noise_alpha must be a finite number, at least 0 or None",
    "label_smoothing_factor: 0.1": "label_smoothing_factor .* set label_smoothing",
    "gradient_accumulation_steps: 99999999999": "gradient_accumulation_steps must be at most",
    "per_device_train_batch_size: 99999999999999999999999": "per_device_train_batch_size must be at most",
    "per_device_train_batch_size: -1": "per_device_train_batch_size must be at least 1, got -1",
    "learning_rate: .nan": "learning_rate must be a number, got '.nan'",
    "learning_rate: 1e400": "learning_rate must be a finite number",
    "beta: 1e-320": "beta must be positive",
    "loss_weights: [1, 2]": "loss_weights: loss weights must be 1 finite numbers",
    "loss_type: []": "loss_type: loss must be a name",
    "extra_metrics: [x]": "extra_metrics must be a list of entropy",
    "router_aux_loss_coef: -1": "router_aux_loss_coef must be a finite number, at least 0",
    "tf32: true": "tf32",
    "fp16: true\nbf16: true": "fp16 and bf16",
    "torch_compile_backend: nonsense": "torch_compile_backend must be one of .*inductor.* got 'nonsense'",
    "torch_compile_mode: nonsense": "torch_compile_mode must be one of default.* got 'nonsense'",
    "lr_scheduler_type: nonsense": "lr_scheduler_type must be one of linear",
    "lr_scheduler_kwargs: {x: 1}": "lr_scheduler_kwargs={'x': 1}",
    "optim: nonsense": "optim must be one of adamw_torch",
    "hub_strategy: nonsense": "hub_strategy must be one of end, every_save, checkpoint, all_checkpoints",
    "parallelism_config: {tp_size: 2}": "parallelism_config must be left to Python",
    "debug: nonsense": "nonsense",
    "report_to: nonsense": "report_to must be none, all, or of .* got 'nonsense'",
    "report_to: wandb": "report_to: wandb needs a package that is not here: pip install wandb",
    "report_to: trackio": "report_to: trackio needs a package that is not here: pip install trackio",
    "optim: adamw_bnb_8bit": "optim=adamw_bnb_8bit: .*bitsandbytes",
    "optim: galore_adamw": "optim=galore_adamw: .*galore_torch",
    "optim: schedule_free_adamw": "optim=schedule_free_adamw: .*schedulefree",
    "deepspeed: {zero_optimization: {stage: 2}}": "deepspeed",
    "deepspeed: nope.json": "deepspeed must be a mapping, .* the path of a JSON file that is there",
    "use_liger_kernel: true": "use_liger_kernel needs",
    "fsdp: full_shard": "fsdp",
    "ddp_backend: nonsense": "ddp_backend must be one of",
    "accelerator_config: {split_batches: 3}": "accelerator_config: split_batches must be True or False, got 3",
    "accelerator_config: {gradient_accumulation_kwargs: {x: 3}}": "gradient_accumulation_kwargs: unexpected .*'x'",
    "accelerator_config: {dispatch_batches: true}": "dispatch_batches must not be True",
    "model_init_kwargs: {dtype: int8}": "dtype in model_init_kwargs must be",
    "model_init_kwargs: {attn_implementation: nonsense}": "attn_implementation",
    "model_init_kwargs: {device_map: nonsense}": "device_map",
    "model_init_kwargs: {num_hidden_layers: x}": "num_hidden_layers",
    "model_init_kwargs: {quantization_config: {load_in_4bit: true}}": "bitsandbytes",
    "model_init_kwargs: {pretrained_model_name_or_path: x}": "must not hold pretrained_model_name_or_path",
    "model_init_kwargs: {1: 2}": "model_init_kwargs must be a mapping",
    "push_to_hub: true": "push_to_hub",
    "lora_r: 2\nlora_alpha: 0": "lora_alpha must be at least 1, got 0",
    "lora_r: 2\nlora_dropout: -1": "lora_dropout must be from 0 to below 1, got -1",
    "lora_r: 2\nlora_target_modules: [nothing]": "the adapter .* Target modules {'nothing'} not found",
    "lora_r: 2\nlora_kwargs: {bias: x}": "the adapter .* bias: x",
    "lora_r: 2\nlora_kwargs: {rank_pattern: x}": "the adapter .* cannot be made",
    "lora_r: 2\nlora_kwargs: {trainable_token_indices: [99999]}": "the adapter .* 99999 is out of bounds",
    'model: "a\\0b"': "model must be text without NUL characters",
    'output_dir: "a\\0b"': "output_dir must be text without NUL characters",
    "model: a/b": "model 'a/b'",
    "dataset: a/b": "'a/b'",
    "output_dir: /dev/null/x": "/dev/null/x",
    "max_steps: " + "9" * 6000: "max_steps must be a whole number",
    "lr_scheduler_kwargs: {a: " + "9" * 6000 + "}": "is not YAML: a value cannot be read",
    "lr_scheduler_kwargs: {a: !!int 'x'}": "is not YAML: a value cannot be read: .*'x'",
    "lora_kwargs: {a: !!timestamp 'x'}": "is not YAML: a value cannot be read",
    "? [a, b]\n: c": "the key in line .* is no text",
}

ARGUMENTS = {
    "an option that is none": (["{recipe}", "--bta", "1"], "unknown key 'bta'; did you mean beta"),
    "an option unlike any": (["{recipe}", "--qqqqqq", "1"], "unknown key 'qqqqqq'; dpo-fast train --help lists"),
    "a rate as a word": (["{recipe}", "--learning_rate", "fast"], "learning_rate must be a number, got 'fast'"),
    "a negative beta": (["{recipe}", "--beta", "-1"], "beta must be positive"),
    "a loss that is none": (["{recipe}", "--loss_type", "sigmod"], "got 'sigmod'"),
    "a second file": (["{recipe}", "extra"], "unexpected 'extra'"),
    "a file that is not there": (["nope.yaml"], "there is no file 'nope.yaml'"),
    "a model that is not there": (["{recipe}", "--model", "{folder}/none"], "model: there is no directory"),
    "a folder that is no model": (["{recipe}", "--model", "{folder}"], "holds no config.json"),
    "a reference that is not there": (["{recipe}", "--ref_model", "{folder}/none"], "ref_model: there is no directory"),
    "data that are not there": (["{recipe}", "--dataset", "{folder}/none.jsonl"], "dataset: there is no file"),
    "data that are nowhere": (["{recipe}", "--dataset", "{folder}/none"], "there is no dataset"),
    "a recipe as data": (
        ["{recipe}", "--dataset", "{recipe}"],
        "is none of .json, .jsonl, .json.gz, .jsonl.gz, .parquet",
    ),
    "a config as data": (["{recipe}", "--dataset", "{folder}/model/config.json"], "expected prompt, chosen, rejected"),
    "a split of a file": (["{recipe}", "--dataset_split", "test"], "dataset: .* so there is no split 'test'"),
    "a split to evaluate on": (["{recipe}", "--eval_split", "test"], "eval_split: .* so there is no split 'test'"),
    "a split of saved data": (
        ["{recipe}", "--dataset", "{folder}/saved", "--dataset_split", "dev"],
        "saved has no split 'dev'; it has train",
    ),
    "no data": (["--model", "x"], "missing: --dataset"),
    "a list as a recipe": (["{folder}/list.yaml"], "must hold keys and values"),
    "a key that is misspelt": (["{folder}/typo.yaml"], "unknown key 'learning_rat'; did you mean learning_rate"),
    "a recipe that is cut": (["{folder}/cut.yaml"], "cut.yaml is not YAML"),
    **{
        f"a share of {share}": (
            ["{recipe}", "--eval_split", share],
            f"eval_split must be a name, or a share above 0 and below 1, got {share}",
        )
        for share in ("1.5", "0", "nan")
    },
    "a share beside data": (
        ["{recipe}", "--eval_split", "0.5", "--eval_dataset", "x.jsonl"],
        "leave out one of the two",
    ),
    "a share that leaves nothing": (["{recipe}", "--eval_split", "0.99"], "leaves none to train on"),
    "samples without end": (["{recipe}", "--samples", "9" * 20], "samples must be at least 0 and below"),
    "no arguments": ([], "missing: --model, --dataset"),
    "a folder": (["{folder}"], "there is no file"),
    "a device": (["/dev/null"], "there is no file '/dev/null'"),
    "a name too long": (["x" * 5000], "cannot be read as UTF-8 text: .*File name too long"),
    "a model's name too long": (["{recipe}", "--model", "x" * 5000], "File name too long"),
    "bytes": (["{folder}/bytes.yaml"], "bytes.yaml cannot be read as UTF-8 text"),
    "NUL": (["{folder}/nul.yaml"], "nul.yaml is not YAML"),
    "a pipe": (["{folder}/pipe.yaml"], "there is no file '.*pipe.yaml'"),
    "no permission": (["{folder}/locked.yaml"], "locked.yaml cannot be read"),
    "a debug that is none": (["{recipe}", "--debug", "nonsense"], "nonsense"),
    "an adapter as text": (["{recipe}", "--lora_r", "2.5"], "lora_r must be a whole number or null, got '2.5'"),
    "an impl for other devices": (["{recipe}", "--impl", "no_such"], "impl must be one of auto, triton"),
    "data: a pipe": (["{recipe}", "--dataset", "{folder}/pipe.jsonl"], "there is no file '.*pipe.jsonl'"),
    "data: a folder of nothing": (["{recipe}", "--dataset", "{folder}/nothing"], "nothing' doesn't|nothing doesn't"),
    "evaluation data": (["{recipe}", "--eval_dataset", "nope.jsonl"], "there is no file 'nope.jsonl'"),
}

TEXT, CHAT = (
    {"prompt": "the cat", "chosen": " sees", "rejected": " eats"},
    {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    },
)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def saved(path, **contents):
    path.mkdir()
    for name, content in contents.items():
        (path / name.replace("__", ".")).write_text(content)


def text_that_is_none():
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0")
    return pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xe9")])


NO_TEXT = pyarrow.array([], pyarrow.string())
# what lies at a path -> what the line on stderr names
SOURCES = {
    "a.parquet": (lambda path: parquet(path, a=[1, 2]), "has the columns a; expected prompt, chosen, rejected"),
    "empty.parquet": (lambda path: parquet(path, prompt=NO_TEXT, chosen=NO_TEXT, rejected=NO_TEXT), "holds no rows"),
    "bytes.parquet": (
        lambda path: parquet(path, prompt=["a"], chosen=[b"\xe9"], rejected=["c"]),
        r"bytes.parquet: row 0 \(the first is 0\): chosen is bytes",
    ),
    "latin1.parquet": (
        lambda path: parquet(path, prompt=["a"], chosen=text_that_is_none(), rejected=["c"]),
        "train dataset: 'utf-8' codec can't decode",
    ),
    "floats.parquet": (
        lambda path: parquet(path, prompt_ids=[[1.0]], chosen_ids=[[2.0]], rejected_ids=[[3.5]]),
        "row 0 .*: prompt_ids must be a list of token ids .* float",
    ),
    "a folder of text": (lambda path: saved(path, a__txt="x"), "has the columns text; expected"),
    "a folder of tables": (lambda path: saved(path, a__csv="a,b\n1,2\n"), "has the columns a, b; expected"),
    "a folder of pictures": (lambda path: saved(path, a__png="x"), "column 'image': only text"),
    "a script": (lambda path: saved(path, **{"a script__py": "x"}), "dataset '.*a script': .*[Ss]cript"),
    "no data set": (lambda path: saved(path, state__json="{}"), "no data set"),
    "no data sets": (lambda path: saved(path, dataset_dict__json="{}"), "dataset '.*no data sets': KeyError: 'splits'"),
    "lost data sets": (lambda path: saved(path, dataset_dict__json='{"splits": ["train"]}'), "lost data sets"),
    "a folder.jsonl": (lambda path: saved(path), "there is no file '.*a folder.jsonl'"),
}

# name of a file -> (what it holds, what the line on stderr names)
FILES = {
    "empty.jsonl": (b"", "empty.jsonl holds no rows"),
    "broken.jsonl": (b'{"a": 1}\n{oops\n', "broken.jsonl cannot be read: line 2 is no JSON"),
    "first.jsonl": (b'{oops\n{"a": 1}\n', "first.jsonl cannot be read: line 1 is no JSON"),
    "broken.json": (b'[{"a": 1},\n {oops}]', "broken.json cannot be read: line 2 is no JSON"),
    "numbers.jsonl": (b"1\n2\n", "numbers.jsonl cannot be read: line 1 is a int"),
    "numbers.json": (b"[1, 2]", "numbers.json cannot be read: element 0 is a int"),
    "gb.jsonl": ('{"a": "海"}\n'.encode("gb18030"), "gb.jsonl is not in UTF-8 .* iconv -f ENCODING -t UTF-8 gb.jsonl"),
    "latin.json": ('[{"a": "é"}]'.encode("latin-1"), "latin.json is not in UTF-8"),
    "cut.jsonl.gz": (gzip.compress(b'{"a": 1}\n' * 999)[:-20], "cut.jsonl.gz cannot be read"),
    "no.parquet": (b"PAR1 and then nothing", "no.parquet cannot be read"),
    "table.csv": (b"a,b\n", "table.csv is none of .json, .jsonl"),
    "cut.jsonl": ('{"prompt": "a", "chos', "cut.jsonl cannot be read: line 1 is no JSON"),
    "nul.jsonl": (b"\0\0\0", "nul.jsonl cannot be read: line 1 is no JSON"),
    "null.jsonl": ("null\n", "null.jsonl cannot be read: element 0 is a NoneType"),
    "texts.json": ('["a"]', "texts.json cannot be read: element 0 is a str"),
    "latin.jsonl": ('{"prompt": "é"}\n'.encode("latin-1"), "latin.jsonl is not in UTF-8"),
    "garbage.parquet": (b"hello", "garbage.parquet cannot be read"),
    "plain.jsonl.gz": (b"hello", "plain.jsonl.gz cannot be read"),
    "columns.jsonl": (lines({"a": 1}), "has the columns a; expected prompt, chosen, rejected"),
    "accepted.jsonl": (
        lines({"prompt": "a", "accepted": "b", "rejected": "c"}),
        "accepted may be chosen: rename the columns, in the file or",
    ),
    "question.jsonl": (
        lines({"question": "a", "chosen": "b", "rejected": "c"}),
        "question, .*rename it to prompt in the",
    ),
    "number.jsonl": (
        lines(TEXT, {**TEXT, "chosen": 3}),
        r"number.jsonl: row 1 \(the first is 0\): chosen is int: expected",
    ),
    "mixed.jsonl": (
        lines(TEXT, CHAT, {**TEXT, "chosen": CHAT["chosen"]}),
        r"mixed.jsonl: row 2 \(the first is 0\): exp",
    ),
    "missing.jsonl": (
        lines(TEXT, {**TEXT, "chosen": None}),
        r"missing.jsonl: row 1 \(the first is 0\): chosen is missing",
    ),
    "surrogate.jsonl": (
        lines({**TEXT, "chosen": "\ud800"}),
        "surrogate.jsonl: row 0 .*: chosen holds half of a character",
    ),
    "tools.jsonl": (lines(CHAT, {**CHAT, "tools": "[{"}), "tools.jsonl: row 1 .*: tools is no JSON"),
    "template.jsonl": (lines({**CHAT, "chat_template_kwargs": {"chat_template": ""}}), "must not hold chat_template"),
    "ids.jsonl": (lines(*tokens(chosen_ids=[6.7])), "ids.jsonl: row 0 .*: chosen_ids must be a list of token ids"),
    "beyond.jsonl": (lines(*tokens(chosen_ids=[2**70])), "beyond.jsonl: row 0 .* the model's embedding has 320 rows"),
    "half.jsonl": (lines(*tokens(ref_chosen_logps=-1.0)), "ref_chosen_logps, but no ref_rejected_logps"),
    "image.jsonl": (lines({**TEXT, "image": "x"}), "column 'image': only text"),
}


def edit(name, **changes):
    def change(folder):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, **changes}))

    return change


def write(name, content):
    def change(folder):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def delete(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def adapter(config):
    def change(folder):
        delete("config.json", "model.safetensors", "generation_config.json")(folder)
        write("adapter_config.json", config)(folder)

    return change


BASE_GONE = {"peft_type": "LORA", "base_model_name_or_path": "no/such/base"}


class Echo:
    def __reduce__(self):
        return os.system, ("touch executed",)


def instead_of_weights(name, content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        write(name, content)(folder)

    return change


# how a model's folder is changed -> what the line on stderr names, beside the folder where a library reads it.
FOLDERS = {
    "config.json: no JSON": (write("config.json", "garbage"), "config.json' is not a valid JSON"),
    "config.json: null": (write("config.json", "null"), "model '.*broken'"),
    "config.json: empty": (write("config.json", "{}"), "broken.* `?model_type`? key"),
    "a model_type that is none": (edit("config.json", model_type="nonsense"), "nonsense"),
    "an encoder": (edit("config.json", model_type="t5", architectures=["T5"]), "T5Config"),
    "layers as text": (edit("config.json", num_hidden_layers="x"), "model '.*broken'.*num_hidden_layers"),
    "no heads": (edit("config.json", num_attention_heads=0), "model '.*broken'.*ZeroDivisionError"),
    "heads that do not fit": (edit("config.json", num_attention_heads=5), "model '.*broken'.* heads"),
    "an activation that is none": (edit("config.json", hidden_act="nonsense"), "model '.*broken'.*nonsense"),
    "padding beyond the vocabulary": (edit("config.json", pad_token_id=99999), "model '.*broken'.*[Pp]adding_idx"),
    "code of its own": (
        edit("config.json", model_type="zz", auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"}),
        "custom code|remote code|trust_remote_code",
    ),
    "generation_config.json: a list": (write("generation_config.json", "[1]"), "model '.*broken'"),
    "beams below 0 to sample with": (
        edit("generation_config.json", num_beams=-3),
        "samples, .*generation_config",
    ),
    "beams as text to sample with": (
        edit("generation_config.json", num_beams="x"),
        "samples, .*generation_config",
    ),
    "an adapter without a base": (adapter("{}"), "adapter in '.*broken' does not say which model it was"),
    "an adapter whose base is gone": (adapter(json.dumps(dict(BASE_GONE))), "no/such/base"),
    "an adapter that is no JSON": (adapter("garbage"), "model '.*broken'"),
    "an adapter of no kind": (adapter(json.dumps({**BASE_GONE, "peft_type": "NONE"})), "model '.*broken'|no/such/base"),
    "no weights": (delete("model.safetensors"), "no file named model.safetensors"),
    "weights: empty": (write("model.safetensors", b""), "weights cannot be read"),
    "weights: a pickle": (
        instead_of_weights("pytorch_model.bin", pickle.dumps(Echo())),
        "weights cannot be read: the file is not one of torch.save",
    ),
    "weights: an empty .bin": (
        instead_of_weights("pytorch_model.bin", b""),
        "model '.*broken'.*|weights cannot be read",
    ),
    "an index without weights": (
        instead_of_weights("model.safetensors.index.json", "{}"),
        "model '.*broken'.*weight_map",
    ),
    "an index that is no JSON": (instead_of_weights("model.safetensors.index.json", "x"), "model '.*broken'"),
    "tokenizer.json: no JSON": (write("tokenizer.json", "garbage"), "the tokenizer in '.*broken'"),
    "tokenizer.json: empty": (write("tokenizer.json", "{}"), "the tokenizer in '.*broken'"),
    "tokenizer.json: bytes": (write("tokenizer.json", bytes(range(256))), "the tokenizer in '.*broken'"),
    "no tokenizer": (delete("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tokenizer_config.json: a list": (write("tokenizer_config.json", "[]"), "the tokenizer in '.*broken'"),
    "a tokenizer's class that is a number": (
        write("tokenizer_config.json", '{"tokenizer_class": 3}'),
        "the tokenizer in",
    ),
    "no end of text": (edit("tokenizer_config.json", eos_token=None), "has no EOS token"),
    "a longest text that is none": (edit("tokenizer_config.json", model_max_length="x"), "tokenizer .* cannot be used"),
}


@pytest.fixture(scope="module")
def recipe(it):
    """What trains: the values of a recipe that the rows change."""
    (it.folder / "bytes.yaml").write_bytes(bytes(range(256)))
    (it.folder / "nul.yaml").write_bytes(b"model: a\0b\n")
    (it.folder / "locked.yaml").write_text("model: m\n")
    (it.folder / "locked.yaml").chmod(0)
    (it.folder / "list.yaml").write_text("- a\n")
    (it.folder / "typo.yaml").write_text("learning_rat: 1\n")
    (it.folder / "cut.yaml").write_text("a: [1\n")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(tiny_rows(2))}).save_to_disk(it.folder / "saved")
    (it.folder / "nothing").mkdir()
    for name in ("pipe.yaml", "pipe.jsonl"):
        os.mkfifo(it.folder / name)
    return {
        "model": str(it.folder / "model"),
        "dataset": str(it.folder / "pairs.jsonl"),
        "output_dir": str(it.folder / "out"),
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 1,
        "samples": 0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "log_level": "error",
    }


@pytest.fixture
def said_by_train(recipe, tmp_path, monkeypatch, capsys):
    """(lines of the recipe, options) -> the one line that `dpo-fast train` says, with status 2."""
    for owner in (huggingface_hub.constants, datasets.config):  # both have read the variable
        monkeypatch.setattr(owner, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    before = transformers.logging.get_verbosity()

    def run(text="", *options, arguments=None):
        keys = {line.partition(":")[0] for line in text.splitlines()}
        kept = {key: value for key, value in recipe.items() if key not in keys}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(kept) + text + "\n")
        given = [str(tmp_path / "recipe.yaml"), *options] if arguments is None else arguments
        capsys.readouterr()
        status = main(["train", *map(str, given)])
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if line.startswith("dpo-fast train: ")]
        assert (status, len(said)) == (2, 1) and "Traceback" not in err, err
        return said[0]

    yield run
    transformers.logging.set_verbosity(before)


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text[:60])
def test_a_bad_recipe_is_one_line(said_by_train, monkeypatch, text):
    from transformers.integrations import integration_utils

    if "lora_r" in text:
        pytest.importorskip("peft")
    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", list)
    assert re.search(RECIPES[text], said_by_train(text))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bad_arguments_are_one_line(it, recipe, said_by_train, tmp_path, name):
    arguments, said = ARGUMENTS[name]
    if name == "no permission" and os.access(it.folder / "locked.yaml", os.R_OK):
        pytest.skip("root may read everything")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(recipe))
    arguments = [argument.format(folder=it.folder, recipe=tmp_path / "base.yaml") for argument in arguments]
    assert re.search(said, said_by_train(arguments=arguments))


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_of_data_is_one_line(said_by_train, tmp_path, name):
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert re.search(said, said_by_train(f"dataset: {tmp_path / name}"))


@pytest.mark.parametrize("name", SOURCES)
def test_a_bad_source_of_data_is_one_line(said_by_train, tmp_path, name):
    make, said = SOURCES[name]
    make(tmp_path / name)
    assert re.search(said, said_by_train(f"dataset: {tmp_path / name}"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_folder_of_a_model_is_one_line(it, said_by_train, tmp_path, name):
    change, said = FOLDERS[name]
    shutil.copytree(it.folder / "model", tmp_path / "broken")
    change(tmp_path / "broken")
    more = "\nsamples: 1" if name.endswith("to sample with") else ""
    assert re.search(said, said_by_train(f"model: {tmp_path / 'broken'}{more}"))
    assert not Path("executed").exists()


def cut(name):
    """Half of a file, which a kill or a full disk leaves."""
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def empty(name):
    return lambda folder: (folder / name).write_bytes(b"")


def of_run(**changes):
    """A change of the run that is to go on, not of the checkpoint."""
    return changes


def later(**changes):
    return lambda: tiny_model(**changes)


def on_adapter(**changes):
    return {"peft": changes}


def part_of_the_model():
    model = tiny_model()
    model.model.layers[0].requires_grad_(False)
    return model


def a_shard_less(folder):
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="50KB")
    next(folder.glob("model-00002*")).unlink()


def only_of_fsdp(folder):
    delete("config.json", "model.safetensors", "optimizer.pt")(folder)
    (folder / "pytorch_model_fsdp_0").mkdir()
    (folder / "optimizer_0").mkdir()


def only_of_deepspeed(folder):
    delete("config.json", "model.safetensors", "optimizer.pt")(folder)
    (folder / "global_step2").mkdir()


# how a checkpoint of a training is changed, or the training that is to go on from it -> what the message names
CHECKPOINTS = {
    "none there": (shutil.rmtree, "no such directory"),
    "a file": (lambda folder: (shutil.rmtree(folder), folder.write_text("x")), "no such directory"),
    "an empty folder": (
        lambda folder: (shutil.rmtree(folder), folder.mkdir()),
        "no trainer_state.json .*there: nothing",
    ),
    "a model alone": (delete("trainer_state.json"), r"no trainer_state.json .there: .*config.json"),
    "state: cut": (cut("trainer_state.json"), "trainer_state.json is cut"),
    "state: empty": (empty("trainer_state.json"), "trainer_state.json is cut"),
    "state: of nothing": (write("trainer_state.json", "[]"), "trainer_state.json is cut or no state"),
    "state: no step": (write("trainer_state.json", "{}"), "trainer_state.json is cut or no state"),
    "weights: gone": (delete("model.safetensors"), "model.safetensors and adapter_model.safetensors are missing"),
    "weights: cut": (cut("model.safetensors"), "model.safetensors is cut"),
    "weights: empty": (empty("model.safetensors"), "model.safetensors is cut"),
    "weights: a page": (write("model.safetensors", "<html>" * 99), "model.safetensors is cut"),
    "weights: a shard gone": (a_shard_less, "model-00002-of-0000. ?.*is missing|model-00002.*is missing"),
    "index: cut": (write("model.safetensors.index.json", "{"), "model.safetensors.index.json is cut"),
    "config: cut": (cut("config.json"), "config.json is cut"),
    "config: gone": (delete("config.json"), "it has no config.json"),
    "optimizer: gone": (delete("optimizer.pt"), "optimizer.pt is missing"),
    "optimizer: cut": (cut("optimizer.pt"), "optimizer.pt is cut"),
    "optimizer: empty": (empty("optimizer.pt"), "optimizer.pt is cut"),
    "optimizer: text": (write("optimizer.pt", "Adam"), "optimizer.pt is cut or not of torch.save"),
    "schedule: gone": (delete("scheduler.pt"), "scheduler.pt is missing"),
    "schedule: cut": (cut("scheduler.pt"), "scheduler.pt is cut"),
    "generators: cut": (cut("rng_state.pth"), "rng_state.pth is cut"),
    "weights and optimizer": (delete("model.safetensors", "optimizer.pt"), "model.safetensors .*; optimizer.pt is"),
    "more layers": (of_run(model=later(num_hidden_layers=3)), r"it lacks model\.layers\.2\."),
    "fewer layers": (of_run(model=later(num_hidden_layers=1)), r"it has model\.layers\.1\..*, which this model has"),
    "another width": (of_run(model=later(intermediate_size=64)), r"has the shape \(.*\) there and \(.*64.*\) here"),
    "another vocabulary": (
        of_run(model=later(vocab_size=999)),
        r"lm_head.weight has the shape .* and \(999, .* \(1 more\)",
    ),
    "another family": (of_run(model=lambda: tiny_model("gpt2")), "it holds a 'llama' model, this trainer a 'gpt2'"),
    "another optimizer": (of_run(optim="sgd"), "optimizer.pt is of another optimizer than SGD: it has no momentum"),
    "a factored optimizer": (of_run(optim="adafactor"), "optimizer.pt is of another optimizer than Adafactor"),
    "fewer parameters": (of_run(model=part_of_the_model), "optimizer.pt is of other parameters: .* there, .* here"),
    "an adapter for a model": (on_adapter(), "it has no adapter_config.json"),
    "adapter: a model for it": (of_run(), "it has no config.json"),
    "adapter: another rank": (on_adapter(r=3), r"lora_A.* has the shape \(2, \d+\) there and \(3, \d+\) here"),
    "adapter: another scale": (on_adapter(lora_alpha=99), "its adapter 'default' has lora_alpha=8, this one 99"),
    "adapter: rank-stabilised": (on_adapter(use_rslora=True), "use_rslora=False, this one True"),
    "adapter: other modules": (on_adapter(target_modules=["v_proj"]), "it lacks .*v_proj.*it has .*q_proj"),
    "adapter: gone": (delete("adapter_model.safetensors"), "adapter_model.safetensors are missing"),
    "adapter: cut": (cut("adapter_model.safetensors"), "adapter_model.safetensors is cut"),
    "adapter: config cut": (cut("adapter_config.json"), "adapter_config.json is cut"),
    "FSDP's: no metadata": (only_of_fsdp, r"pytorch_model_fsdp_0/\.metadata is missing"),
    "DeepSpeed's: no name": (only_of_deepspeed, "latest, which names DeepSpeed's folder, is missing or wrong"),
}


@pytest.fixture(scope="module")
def checkpoints_of(it, tmp_path_factory):
    """Whether of an adapter -> a checkpoint after two steps."""
    import peft

    made = {}
    for adapter in (False, True):
        out = tmp_path_factory.mktemp("runs")
        peft_config = peft.LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None
        args = config(output_dir=str(out), max_steps=2, save_strategy="steps", save_steps=2)
        trainer(it, model=tiny_model(), args=args, peft_config=peft_config).train()
        made[adapter] = out / "checkpoint-2"
    return made


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_is_refused_before_a_step(it, checkpoints_of, tmp_path, monkeypatch, name):
    import peft

    change, said = CHECKPOINTS[name]
    folder = shutil.copytree(checkpoints_of[name.startswith("adapter")], tmp_path / "checkpoint-2")
    changes = dict(change) if isinstance(change, dict) else {}
    if not isinstance(change, dict):
        change(folder)
    model = changes.pop("model", tiny_model)()
    options = changes.pop("peft", {} if name.startswith("adapter") and not isinstance(change, dict) else None)
    new = None if options is None else peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options})
    args = config(output_dir=str(tmp_path), max_steps=4, **changes)
    taken_up = trainer(it, model=model, args=args, peft_config=new)
    monkeypatch.setattr(FastDPOTrainer, "training_step", None)
    with pytest.raises(ValueError, match=said):
        taken_up.train(resume_from_checkpoint=str(folder))


def test_with_debug_the_line_comes_after_the_traceback(recipe, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "beta": "much"}))
    for arguments in ([str(tmp_path / "recipe.yaml"), "--debug"], ["--debug", str(tmp_path / "recipe.yaml")]):
        assert main(["train", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith("Traceback") and err.splitlines()[-1].startswith("dpo-fast train: ") and "'much'" in err
    assert main(["train", str(tmp_path / "recipe.yaml"), "--debug", "underflow_overflow"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--debug"]) == 2
    assert capsys.readouterr().err.startswith("Traceback")
    assert main(["train", "--help"]) == 0
    assert "--debug without a value" in " ".join(capsys.readouterr().out.split())


# --- `dpo-fast trl` --------------------------------------------------------------------------------------------------

OF_TRL = "--output_dir out --use_cpu --bf16 false".split()  # enough for TRL's parser
# arguments -> what the line on stderr names
TRL_ARGUMENTS = {
    "nothing": ([], "name dpo or kto after trl, got nothing"),
    "another script": (["sft"], "name dpo or kto after trl, got sft; TRL's other scripts have no trainer of this"),
    "options first": (["--beta", "0.1", "dpo"], "name dpo or kto after trl, got --beta"),
    "no configuration": (["dpo", *OF_TRL, "--accelerate_config"], "--accelerate_config needs a value"),
    "an unknown configuration": (
        ["dpo", *OF_TRL, "--accelerate_config", "zero4"],
        "--accelerate_config must be a file or one of .*zero2, zero3, got zero4",
    ),
}


@pytest.mark.parametrize("name", TRL_ARGUMENTS)
def test_bad_arguments_for_trl_are_one_line(name, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trl")
    arguments, said = TRL_ARGUMENTS[name]
    monkeypatch.chdir(tmp_path)
    assert main(["trl", *arguments]) == 2
    assert re.fullmatch(f"dpo-fast trl: {said}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("script, trainer", [("dpo", "DPOTrainer"), ("kto", "KTOTrainer")])
def test_a_trl_without_a_seam_is_one_line(script, trainer, monkeypatch, capsys):
    pytest.importorskip("trl")
    import dpo_fast.trl

    def missing(name: str):
        raise ImportError(f"dpo_fast.trl.{name} replaces what is not there")

    monkeypatch.delitem(vars(dpo_fast.trl), trainer, raising=False)
    monkeypatch.setattr(dpo_fast.trl, "__getattr__", missing)
    assert main(["trl", script, *OF_TRL]) == 1
    assert capsys.readouterr().err == f"\ndpo-fast trl: dpo_fast.trl.{trainer} replaces what is not there\n"


def test_the_table_holds_what_it_should():
    rows = sum(map(len, (*CALLS.values(), RECIPES, ARGUMENTS, FILES, SOURCES, FOLDERS, CHECKPOINTS, TRL_ARGUMENTS)))
    assert rows >= 400, rows
