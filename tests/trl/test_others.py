"""TRL's CPO, ORPO and KTO trainers with this package's forward against TRL's own: the same trainings."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from tiny import QUIET, tiny_model, tiny_rows, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

import dpo_fast.trl  # noqa: E402
from dpo_fast.trl import kto  # noqa: E402
from dpo_fast.trl.others import config_of, trainer_with  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

OURS = {name: getattr(dpo_fast.trl, f"{name}Trainer") for name in ("CPO", "ORPO", "KTO")}
OF_ALL_POSITIONS = ("logits/chosen", "logits/rejected")  # in TRL's CPO and ORPO, of prompts and padding, too
TIMES = ("runtime", "per_second", "flos")


def rows_for(name: str) -> list[dict]:
    rows = tiny_rows(24)
    if name != "KTO":
        return rows
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
        for i, row in enumerate(rows)
    ]


def training(name: str, kind: type, folder, adapter: bool = False, **options):
    """The trainer after six steps of four rows; the model's logits are far from uniform."""
    config = config_of(trainer_with(f"{name}Trainer", "compute_loss"))
    model = tiny_model()
    for p in model.parameters():
        p.data.mul_(2 if p.ndim > 1 else 1)
    model.save_pretrained(folder)
    model = type(model).from_pretrained(folder)  # KTO loads its reference from the model's path
    settings = dict(per_device_train_batch_size=4, max_steps=6, learning_rate=1e-3, bf16=False)
    others = {}
    if adapter:
        peft = pytest.importorskip("peft")
        others["peft_config"] = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = kind(
        model=model,
        args=config(output_dir=str(folder / "out"), gradient_checkpointing=False, **{**QUIET, **settings, **options}),
        train_dataset=datasets.Dataset.from_list(rows_for(name)),
        processing_class=tiny_tokenizer(),
        **others,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "name, options",
    [
        ("CPO", {}),
        ("CPO", dict(loss_type="simpo", cpo_alpha=0.0)),
        ("CPO", dict(loss_type="ipo", adapter=True)),
        ("ORPO", {}),
        ("KTO", {}),
        ("KTO", dict(loss_type="apo_zero_unpaired", per_device_train_batch_size=3)),
        ("KTO", dict(precompute_ref_log_probs=True)),
        ("KTO", dict(adapter=True)),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())) or "defaults",
)
def test_the_training_is_trls(name, options, tmp_path):
    theirs = training(name, trainer_with(f"{name}Trainer", "compute_loss"), tmp_path, **options)
    mine = training(name, OURS[name], tmp_path, **options)
    assert len(mine.state.log_history) == 7
    for a, b in zip(theirs.state.log_history, mine.state.log_history, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(word in key for word in TIMES) and not (name != "KTO" and key in OF_ALL_POSITIONS):
                assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5), key
    for (key, a), b in zip(theirs.model.named_parameters(), mine.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=0), key


@pytest.mark.parametrize("name", ["CPO", "ORPO"])
def test_logits_are_of_the_completions(name, tmp_path):
    """By hand, of the model's own logits."""
    trainer = training(name, OURS[name], tmp_path, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    found = trainer.concatenated_forward(trainer.model, batch)
    for side, mean in zip(("chosen", "rejected"), found[2:4], strict=True):
        ids, mask, labels = (batch[f"{side}_{key}"] for key in ("input_ids", "attention_mask", "labels"))
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        assert torch.allclose(mean, logits[labels[:, 1:] != -100].mean(), atol=1e-6)


def test_rows_of_experts_bring_their_balancing_loss(tmp_path):
    """As TRL's, of rows without padding, where its mean over positions is ours."""
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8, output_router_logits=True)
    model = tiny_model("qwen3_moe", **sizes)
    ids = torch.randint(3, 300, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.index_fill(1, torch.arange(4), -100)
    batch = {
        f"{side}_{key}": value
        for side, half in (("chosen", slice(0, 2)), ("rejected", slice(2, 4)))
        for key, value in (
            ("input_ids", ids[half]),
            ("attention_mask", torch.ones_like(ids[half])),
            ("labels", labels[half]),
        )
    }
    for kind in (OURS["CPO"], OURS["ORPO"]):
        trainer = object.__new__(kind)
        vars(trainer).update(
            is_encoder_decoder=False, aux_loss_enabled=True, cpo_alpha=1.0, loss_type="sigmoid", padding_value=0,
            pad_token_id=0, accelerator=SimpleNamespace(device=torch.device("cpu")),
        )  # fmt: skip
        theirs, mine = (
            super(kind, trainer).concatenated_forward(model, batch),
            trainer.concatenated_forward(model, batch),
        )
        assert len(theirs) == len(mine) == 6
        for i in (0, 1, 4, 5):
            assert torch.allclose(theirs[i], mine[i], atol=1e-5), i


# --- the seam of TRL 0.18 to 1.3's KTOTrainer, which need not be installed -----------------------------------------


class OfOldTRL:
    """As TRL 0.28's, of what ours replaces."""

    def forward(self, model, batch):
        logits = model(batch["completion_input_ids"], attention_mask=batch["completion_attention_mask"]).logits
        logps = self.get_batch_logps(logits, batch["completion_labels"])
        which = [[i for i, label in enumerate(batch["label"]) if label is kind] for kind in (True, False)]
        kl_logps = self._compute_kl_logps(model, batch)
        return (*(logps[i] for i in which), *(logits[i] for i in which), kl_logps)

    def _compute_kl_logps(self, model, batch):
        with torch.no_grad():
            logits = model(
                batch["KL_completion_input_ids"], attention_mask=batch["KL_completion_attention_mask"]
            ).logits
        return self.get_batch_logps(logits, batch["KL_completion_labels"])

    def get_batch_logps(self, logits, labels):
        scored, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
        return (logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1) * scored).sum(1)


class OverOldTRL(kto._Forward, OfOldTRL):
    calculate_KL, aux_loss_enabled, label_pad_token_id, ref_model = True, False, -100, None

    def null_ref_context(self):
        self.used = True
        return torch.no_grad()


def test_ktos_forward_of_older_trls():
    trainer, model = OverOldTRL(), tiny_model()
    trainer.model = model
    generator = torch.Generator().manual_seed(0)
    batch: dict = {"label": [True, False, True]}
    for kind in ("", "KL_"):
        ids = torch.randint(3, 300, (3, 9), generator=generator)
        lengths = torch.tensor([9, 7, 8])[:, None]
        mask = (torch.arange(9) < lengths).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(9) < 4), -100)
        batch |= {
            f"{kind}completion_{k}": v for k, v in dict(input_ids=ids, attention_mask=mask, labels=labels).items()
        }
    theirs, mine = OfOldTRL.forward(trainer, model, batch), trainer.forward(model, batch)
    for i in (0, 1, 4):
        assert torch.allclose(theirs[i], mine[i], atol=1e-5), i
    scored = batch["completion_labels"][:, 1:] != -100
    for i, which in ((2, [0, 2]), (3, [1])):
        sums = (theirs[i][:, :-1].sum(-1) * scored[which]).sum(1)
        assert torch.allclose(mine[i], sums, atol=1e-4), i
    logps, kl_logps = trainer.compute_reference_log_probs(batch)
    assert trainer.used and not logps.requires_grad
    assert torch.allclose(logps, torch.stack([mine[0][0], mine[1][0], mine[0][1]]), atol=1e-5)
    assert torch.allclose(kl_logps, mine[4], atol=1e-5)


@pytest.mark.parametrize("name", ["KTOTrainer", "NoSuchTrainer"])
def test_what_this_trl_lacks_is_one_sentence(name):
    with pytest.raises(ImportError, match=f"dpo_fast.trl.{name} replaces no_such_method of TRL's {name}, which TRL"):
        trainer_with(name, "no_such_method")


def test_a_trainer_that_has_only_moved_is_found(monkeypatch):
    moved = type("KTOTrainer", (trl.KTOTrainer,), {"__init__": lambda self: None})
    monkeypatch.setattr(trl, "KTOTrainer", moved)
    assert trainer_with("KTOTrainer", "compute_loss") is importlib.import_module("trl.trainer.kto_trainer").KTOTrainer
