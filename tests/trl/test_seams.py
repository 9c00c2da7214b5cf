"""The older seams, on stand-ins of their trainers with the same methods; the mixin; what stands for logits.

Real older releases: `make trl-versions`.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import trl_versions as versions  # noqa: E402
from trl.trainer import dpo_trainer  # noqa: E402
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402
from trl.trainer.utils import entropy_from_logits, flush_left, selective_log_softmax  # noqa: E402

from dpo_fast.rows import IGNORED  # noqa: E402
from dpo_fast.trl import DPOTrainer, FastDPO, checks, concatenated, full_logits, scoring  # noqa: E402
from dpo_fast.trl.token_logits import TokenLogits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


# --- the mixin -----------------------------------------------------------------------------------------------------


class Theirs(trl.DPOTrainer):
    """A trainer as frameworks build them: another constructor, more attributes, methods overridden."""

    def __init__(self, *args, tags=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.tags, self.steps = tags, 0

    def training_step(self, *args, **kwargs):
        self.steps += 1
        return super().training_step(*args, **kwargs)

    def _compute_loss(self, model, inputs, return_outputs):
        return 2 * super()._compute_loss(model, inputs, return_outputs)


class Ours(FastDPO, Theirs):
    pass


def trainer_of(kind, folder, model=None, **options):
    settings = dict(output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, bf16=False, **QUIET)
    data = datasets.Dataset.from_list(tiny_rows(6))
    named = {key: options.pop(key) for key in ("layout", "tags", "ref_model") if key in options}
    args = trl.DPOConfig(**{**settings, **options})
    model = tiny_model() if model is None else model
    reference = named.pop("ref_model", None) or tiny_model(seed=1)
    return kind(model, reference, args, None, data, processing_class=tiny_tokenizer(), **named)


def widths_of(model) -> list:
    """Notes the shape of every row that the backbone is given."""
    seen: list = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def test_a_class_built_on_trls_keeps_what_it_overrides(tmp_path):
    theirs, ours = (trainer_of(kind, tmp_path, tags=["a"]) for kind in (Theirs, Ours))
    seen = widths_of(ours.model)
    losses = [trainer.train().training_loss for trainer in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert ours.tags == ["a"] and ours.steps == 2 and seen and all(rows == 1 for rows, _width in seen)


def test_positional_arguments_of_another_constructor_are_checked(tmp_path):
    args = trl.DPOConfig(output_dir=str(tmp_path), **QUIET)
    with pytest.raises(TypeError, match="ref_model must be a model"):
        Ours(tiny_model(), "path", args, tags=[])
    with pytest.raises(TypeError, match="args must be a trl.DPOConfig, got dict"):
        Ours(tiny_model(), None, {}, tags=[])


def test_the_order_and_the_kind_of_bases_are_checked():
    with pytest.raises(TypeError, match=r"FastDPO comes first, class Late\(FastDPO, ...\)"):
        type("Late", (Theirs, FastDPO), {})
    with pytest.raises(TypeError, match="Other: FastDPO is for classes that are built on trl.DPOTrainer"):
        type("Other", (FastDPO, trl.SFTTrainer), {})
    assert isinstance(type("Part", (FastDPO,), {}), type)  # a part of a trainer yet to be built


# --- stand-ins of older trainers -----------------------------------------------------------------------------------


class Older(trl.DPOTrainer):
    """Without the head that TRL puts on its models since 1.15."""

    def __init__(self, *args, **kwargs):
        with checks.in_trl(add_fused_lm_head=lambda model, outputs=(): None):
            super().__init__(*args, **kwargs)


class WithLogits(Older):
    """As TRL 0.29 to 1.14: the loss reads logits."""

    def _compute_loss(self, model, inputs, return_outputs):
        keys = ("input_ids", "attention_mask", *(k for k in inputs if k.startswith("pixel")))
        named = {key: inputs[key] for key in keys}
        outputs = model(**named, use_cache=False)
        logits, labels = outputs.logits[..., :-1, :], named["input_ids"][..., 1:]
        mask = inputs["completion_mask"][..., 1:]
        logps = selective_log_softmax(logits, labels) * mask
        with torch.no_grad():
            reference = self.ref_model(**named, use_cache=False).logits[..., :-1, :]
        ratios = (logps - selective_log_softmax(reference, labels) * mask).sum(1)
        chosen, rejected = ratios.chunk(2)
        loss = -F.logsigmoid(self.beta * (chosen - rejected)).mean()
        if "sft" in self.loss_types:
            kept = mask.chunk(2)[0].bool()
            loss = loss + F.cross_entropy(logits.chunk(2)[0][kept], labels.chunk(2)[0][kept])
        if self.use_weighting:
            with torch.no_grad():
                denominator = torch.logsumexp(2.0 * logits, dim=-1) - 2.0 * torch.logsumexp(logits, dim=-1)
                weights = ((logps - denominator) * mask).sum(1).div(mask.sum(1)).exp()
            loss = loss * weights.mean()
        found = logits.detach()
        self.found = {
            "entropy": entropy_from_logits(found)[mask.bool()],
            "mean": found.chunk(2)[1][mask.chunk(2)[1].bool()].mean(-1),
            "right": (found.argmax(dim=-1) == labels)[mask.bool()],
        }
        return (loss, outputs) if return_outputs else loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self._compute_loss(model, inputs, return_outputs)


class Concatenated(Older):
    """As TRL 0.18 to 0.28: rows are built in `concatenated_forward`, which returns sums of log-probs."""

    truncation_mode, cut, max_length = "keep_start", None, None

    def concatenated_forward(self, model, batch, is_ref_model=False):
        ids, mask, loss_mask = self.rows(batch)
        logits = model(ids, attention_mask=mask, output_hidden_states=True).logits
        labels, loss_mask = torch.roll(ids, -1, 1), torch.roll(loss_mask, -1, 1).bool()
        labels[~loss_mask] = 0
        logps = selective_log_softmax(logits, labels)
        logps[~loss_mask] = 0
        pairs = len(ids) // 2
        nll = F.cross_entropy(logits[:pairs, :-1].flatten(0, 1), labels[:pairs, :-1].flatten(0, 1), ignore_index=0)
        return {
            "logps": torch.roll(logps, 1, 1)[:, 1:].sum(-1),
            "nll_loss": nll,
            "mean_chosen_logits": logits[:pairs][loss_mask[:pairs]].mean(),
        }

    def rows(self, batch):
        prompts = [torch.cat([batch[f"prompt_{name}"]] * 2) for name in ("input_ids", "attention_mask")]
        width = max(batch[f"{name}_input_ids"].shape[1] for name in ("chosen", "rejected"))
        ends = [
            torch.cat([F.pad(x, (0, width - x.shape[1])) for x in (batch[f"chosen_{name}"], batch[f"rejected_{name}"])])
            for name in ("input_ids", "attention_mask")
        ]
        ids, mask = (torch.cat(both, 1) for both in zip(prompts, ends, strict=True))
        mask, ids, loss_mask = flush_left(mask, ids, torch.cat([torch.zeros_like(prompts[1]), ends[1]], 1))
        if self.cut is None:
            return ids, mask, loss_mask
        if self.truncation_mode == "keep_start":
            return [x[:, : self.cut] for x in (ids, mask, loss_mask)]
        lengths = mask.sum(1, keepdim=True)
        begins = (lengths - self.cut).clamp(min=0)
        columns = (torch.arange(self.cut) + begins).clamp(max=ids.shape[1] - 1)
        kept = torch.arange(self.cut) < lengths - begins
        return [x.gather(1, columns) * kept for x in (ids, mask, loss_mask)]


class FastWithLogits(full_logits.FastDPO, WithLogits):
    pass


class FastConcatenated(concatenated.FastDPO, Concatenated):
    pass


def batch_of(trainer) -> dict:
    rows = [
        dict(prompt_ids=[5, 6, 7, 8], chosen_ids=[9, 10, 11], rejected_ids=[12, 13]),
        dict(prompt_ids=[5, 6], chosen_ids=[20, 21, 22, 0], rejected_ids=[20, 21, 30]),
        dict(prompt_ids=[60, 61, 62], chosen_ids=[63], rejected_ids=[63, 64]),
    ]
    if isinstance(trainer, WithLogits):
        return DataCollatorForPreference(pad_token_id=0)(rows)
    found = {}
    for part, left in (("prompt", True), ("chosen", False), ("rejected", False)):
        width = max(len(row[f"{part}_ids"]) for row in rows)
        padded, mask = [], []
        for row in rows:
            ids, pad = row[f"{part}_ids"], [0] * (width - len(row[f"{part}_ids"]))
            padded.append(pad + ids if left else ids + pad)
            mask.append([0] * len(pad) + [1] * len(ids) if left else [1] * len(ids) + [0] * len(pad))
        found[f"{part}_input_ids"], found[f"{part}_attention_mask"] = torch.tensor(padded), torch.tensor(mask)
    return found


def both(kinds, folder, **options):
    made = []
    for kind in kinds:
        model, reference = tiny_model(), tiny_model(seed=1)
        for p in (*model.parameters(), *reference.parameters()):
            p.data.mul_(8 if p.ndim > 1 else 1)  # logits are far from uniform
        made.append(trainer_of(kind, folder, model, ref_model=reference, **options))
    return made


def same_gradients(theirs, ours):
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm().clamp(min=1e-3), name


@pytest.mark.parametrize("options", [{}, dict(loss_type=["sigmoid", "sft"]), dict(use_weighting=True)], ids=str)
def test_a_loss_that_reads_logits(tmp_path, options):
    theirs, ours = both((WithLogits, FastWithLogits), tmp_path, **options)
    seen = widths_of(ours.model)
    losses = [trainer.compute_loss(trainer.model, batch_of(trainer)) for trainer in (theirs, ours)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, rtol=1e-5) and len(seen) == 1 and seen[0][0] == 1
    same_gradients(theirs, ours)
    for name, values in theirs.found.items():
        assert torch.allclose(ours.found[name].float(), values.float(), atol=1e-5), name


@pytest.mark.parametrize("cut", [None, ("keep_start", 6), ("keep_end", 5)], ids=str)
def test_a_forward_that_builds_rows(tmp_path, cut):
    theirs, ours = both((Concatenated, FastConcatenated), tmp_path)
    if cut is not None:
        theirs.truncation_mode, theirs.cut = ours.truncation_mode, ours.cut = cut
    seen = widths_of(ours.model)
    a, b = (trainer.concatenated_forward(trainer.model, batch_of(trainer)) for trainer in (theirs, ours))
    for found in (a, b):
        (found["logps"][:3].sum() - 2 * found["logps"][3:].sum() + found["nll_loss"]).backward()
    assert a.keys() == b.keys() and len(seen) == 1 and seen[0][0] == 1
    for name, values in a.items():
        assert torch.allclose(b[name], values, rtol=1e-5, atol=1e-5), name
    same_gradients(theirs, ours)


def test_whoever_asks_for_outputs_gets_logits(tmp_path, caplog):
    checks.log_once.cache_clear()
    theirs, ours = both((WithLogits, FastWithLogits), tmp_path)
    found = [t.compute_loss(t.model, batch_of(t), return_outputs=True)[1].logits for t in (theirs, ours)]
    assert torch.equal(*found) and "asks for them" in caplog.text


def test_what_is_not_scored_runs_as_in_trl(tmp_path, caplog):
    checks.log_once.cache_clear()
    place = torch.arange(3, 15)[None]

    def asked(trainer):
        return lambda ids, **named: trainer.model(ids, position_ids=place[:, : ids.shape[1]], **named)

    theirs, ours = both((Concatenated, FastConcatenated), tmp_path)
    a, b = (trainer.concatenated_forward(asked(trainer), batch_of(trainer)) for trainer in (theirs, ours))
    assert torch.equal(a["logps"], b["logps"]) and "position_ids" in caplog.text
    ours = both((FastConcatenated,), tmp_path, layout="shared_prefix")[0]
    with pytest.raises(ValueError, match="layout='shared_prefix' cannot run: it is called with position_ids"):
        ours.concatenated_forward(asked(ours), batch_of(ours))


def test_a_model_that_cannot_be_scored_runs_as_in_trl(tmp_path, caplog, monkeypatch):
    checks.log_once.cache_clear()
    monkeypatch.setattr(scoring, "attach", lambda model: (_ for _ in ()).throw(ValueError("no such head")))
    theirs, ours = both((WithLogits, FastWithLogits), tmp_path)
    losses = [trainer.compute_loss(trainer.model, batch_of(trainer)) for trainer in (theirs, ours)]
    assert torch.equal(*losses) and "LlamaForCausalLM runs as in TRL, with logits, because no such head" in caplog.text


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_layouts(tmp_path, layout):
    theirs = both((WithLogits,), tmp_path)[0]
    ours = both((FastWithLogits,), tmp_path, layout=layout)[0]
    seen = widths_of(ours.model)
    losses = [trainer.compute_loss(trainer.model, batch_of(trainer)) for trainer in (theirs, ours)]
    assert torch.allclose(*losses, rtol=1e-5) and [rows for rows, _ in seen] == [6 if layout == "padded" else 1]


def test_neftune_runs_padded_rows(tmp_path):
    ours = both((FastWithLogits,), tmp_path, neftune_noise_alpha=5)[0]
    seen = widths_of(ours.model)
    ours.compute_loss(ours.model, batch_of(ours))
    assert [rows for rows, _ in seen] == [6]


def test_models_are_left_as_they_came(tmp_path):
    theirs, ours = both((WithLogits, FastWithLogits), tmp_path)
    seen = widths_of(ours.model)
    for trainer in (theirs, ours):
        trainer.train()
    assert seen and all(rows == 1 for rows, _ in seen)
    assert theirs.state.log_history[0]["loss"] == pytest.approx(ours.state.log_history[0]["loss"], rel=1e-5)
    for model in (ours.model, ours.ref_model):
        assert vars(model).keys().isdisjoint({"forward", "_original_forward"})
    assert b"dpo_fast" not in pickle.dumps(ours.ref_model)


def test_a_copy_computes_with_its_own_weights(tmp_path):
    ours = both((FastWithLogits,), tmp_path)[0]
    before = ours.compute_loss(ours.model, batch_of(ours))
    twin = copy.deepcopy(ours.model)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(ours.compute_loss(ours.model, batch_of(ours)), before)
    assert not torch.equal(ours.compute_loss(twin, batch_of(ours)), before)


# --- what stands for logits ----------------------------------------------------------------------------------------


def stand_in(labelled=True):
    """Logits (2, 5, 7), and what stands for them."""
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    labels[0, 1] = logits[0, 1].argmax()
    if labelled:
        labels[1, 3:] = IGNORED
    logps = logits.log_softmax(-1)
    kept = labels != IGNORED
    of_labels = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return logits, TokenLogits(
        labels=labels,
        logps=of_labels * kept,
        vocabulary=7,
        entropy=-(logps.exp() * logps).sum(-1) * kept,
        mean_logits=logits.mean(-1) * kept,
        is_top1=(logits.argmax(-1) == labels) & kept,
        log_sum_sq_probs=torch.logsumexp(2 * logps, -1) * kept,
    )


ASKED = {
    "log-probs": lambda x, labels: selective_log_softmax(x, labels.clamp(min=0)),
    "log-probs of a softmax": lambda x, labels: F.log_softmax(x, -1).gather(-1, labels.clamp(min=0)[..., None]),
    "entropy": lambda x, _: entropy_from_logits(x),
    "means": lambda x, _: x.mean(-1),
    "one mean": lambda x, labels: x[labels != IGNORED].mean(),
    "squares": lambda x, _: torch.logsumexp(2 * F.log_softmax(x, dim=-1), dim=-1),
    "squares of logits": lambda x, _: torch.logsumexp(2.0 * x, dim=-1) - 2.0 * torch.logsumexp(x, dim=-1),
    "a log-prob by hand": lambda x, labels: torch.sub(
        x.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1), torch.stack([torch.logsumexp(row, -1) for row in x])
    ),
    "right": lambda x, labels: x.argmax(dim=-1) == labels,
    "cross-entropy": lambda x, labels: F.cross_entropy(x[labels != IGNORED], labels[labels != IGNORED]),
    "cross-entropy, flat": lambda x, labels: F.cross_entropy(torch.flatten(x, end_dim=1), labels.flatten()),
    "halves": lambda x, _: x.chunk(2, dim=0)[1][..., 1:, :].mean(-1),
    "shape": lambda x, _: torch.tensor([*x.shape, x.ndim, x.size(-1), x.size(0)]),
}


@pytest.mark.parametrize("name", ASKED)
def test_statistics_answer_for_logits(name):
    logits, stands = stand_in()
    theirs, ours = (ASKED[name](x, stands.labels) for x in (logits, stands))
    kept = stands.labels != IGNORED
    if theirs.shape[:2] == kept.shape:
        theirs, ours = theirs[kept], ours[kept]
    elif name == "halves":
        theirs, ours = theirs[kept[1:, 1:]], ours[kept[1:, 1:]]
    assert theirs.shape == ours.shape and torch.allclose(ours.float(), theirs.float(), atol=1e-6)


REFUSED = {
    "a softmax": lambda x: torch.softmax(x, -1),
    "a mean of probabilities": lambda x: x.log_softmax(-1).exp().mean(-1),
    "a mean over tokens": lambda x: x.mean(1),
    "a sum": lambda x: x.sum(-1),
    "three times": lambda x: torch.logsumexp(x * 3, -1),
    "added": lambda x: torch.ones(7) + x,
    "two labels": lambda x: x.gather(-1, torch.zeros(2, 5, 2, dtype=torch.long)),
    "smoothed": lambda x: F.cross_entropy(torch.flatten(x, end_dim=1), x.labels.flatten(), label_smoothing=0.1),
    "a label's logit": lambda x: x.gather(-1, x.labels.clamp(min=0)[..., None]).mean(),
    "a label's logit in a loss": lambda x: torch.sigmoid(x.gather(-1, x.labels.clamp(min=0)[..., None])),
    "the logsumexp": lambda x: torch.logsumexp(x, -1) ** 2,
    "a sum of logsumexps": lambda x: torch.logsumexp(x, -1).sum(),
    "a product with the logsumexp": lambda x: torch.ones(2, 5) * torch.logsumexp(x, -1),
    "the squares alone": lambda x: torch.logsumexp(2 * x, -1).exp(),
    "what was not kept": lambda x: TokenLogits(labels=x.labels, logps=x.logps, vocabulary=7).mean(-1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_statistics_cannot_answer_is_refused(name):
    said = "keeps statistics of each token instead of logits|unsupported operand|UpToLogsumexp"
    with pytest.raises((TypeError, AttributeError), match=said):
        REFUSED[name](stand_in()[1])


def test_cross_entropy_of_prompts_is_refused():
    _, stands = stand_in()
    with pytest.raises(RuntimeError, match="cross_entropy of tokens outside the completions"):
        F.cross_entropy(torch.flatten(stands, end_dim=1), stands.labels.clamp(min=0).flatten())


def test_wrappers_find_the_tensors_of_an_output():
    """DDP's static graph takes the gradient's way from those that it finds."""
    _, stands = stand_in()
    found, spec = torch.utils._pytree.tree_flatten(scoring.ScoredOutput(logits=stands, log_probs=stands.logps))
    assert sum(x is stands.entropy for x in found) == 1 and sum(x is stands.logps for x in found) == 2
    assert torch.utils._pytree.tree_unflatten(found, spec).logits.vocabulary == stands.vocabulary


def test_other_labels_are_refused():
    _, stands = stand_in(labelled=False)
    with pytest.raises(RuntimeError, match="other labels"):
        selective_log_softmax(stands, (stands.labels + 1) % 7)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "ld_alpha" else pytest.mark.slow) for name in versions.CASES]
)
def test_the_installed_trl_and_ours_log_the_same(tmp_path, name):
    try:
        apart, rows = versions.compare(name, str(tmp_path))
    except versions.Unknown as reason:
        pytest.skip(f"TRL {trl.__version__}: {reason}")
    assert max(apart.values()) <= versions.TOLERANCE, apart
    assert (rows == {1}) == (name not in ("left of padded rows", "prompt tuning"))


def test_trls_is_the_class_that_is_there():
    assert issubclass(DPOTrainer, FastDPO) and issubclass(DPOTrainer, dpo_trainer.DPOTrainer)
