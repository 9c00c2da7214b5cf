"""Adapters to other frameworks' trainers, on stand-ins with the methods that they meet there."""

import importlib
import logging
import sys
import types

import pytest
import torch
from tiny import tiny_model

from dpo_fast.integrations import Swap, llamafactory, ms_swift

PROMPT, LENGTHS, WIDTH = 5, (12, 9, 7, 11), 14  # rows [chosen, rejected] of two pairs


def rows(padding: str = "right") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids, mask = torch.randint(3, 320, (4, WIDTH)), torch.zeros(4, WIDTH, dtype=torch.int64)
    ids[2:, :PROMPT] = ids[:2, :PROMPT]
    labels = torch.full_like(ids, -100)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
        labels[row, PROMPT:length] = ids[row, PROMPT:length]
    if padding == "left":
        ids, mask, labels = (
            torch.stack([x.roll(WIDTH - n) for x, n in zip(t, LENGTHS, strict=True)]) for t in (ids, mask, labels)
        )
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def token_logps(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(B, T - 1) log-probs and mean logits, 0 where nothing is scored; (B, T - 1) bool where something is."""
    labels = batch["labels"][:, 1:]
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    scored = labels != -100
    logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return logps * scored, logits.mean(-1) * scored, scored


def ld_weighted(logps, scored, alpha):
    if alpha is None:
        return logps.sum(1)
    shorter = torch.stack(scored.sum(1).chunk(2)).amin(0).repeat(2)
    place = scored.cumsum(1)
    return (logps * torch.where(place <= shorter[:, None], 1.0, alpha)).sum(1)


class CustomDPOTrainer:
    """LLaMA-Factory's, in what the adapter meets; its logits are means over tokens here, whose mean is compared."""

    def __init__(self, loss_type="sigmoid", ld_alpha=None):
        self.loss_type, self.ld_alpha = loss_type, ld_alpha

    def concatenated_forward(self, model, batch, is_ref_model=False):
        logps, logits, scored = token_logps(model, batch)
        lengths = scored.sum(1)
        sums = ld_weighted(logps, scored, None if is_ref_model else self.ld_alpha)
        if self.loss_type in ("ipo", "orpo", "simpo"):
            sums = sums / lengths
        average = sums if self.loss_type in ("ipo", "orpo", "simpo") else sums / lengths
        return {
            "chosen_logps": sums[:2],
            "rejected_logps": sums[2:],
            "chosen_logits": logits[:2][scored[:2]],
            "rejected_logits": logits[2:][scored[2:]],
            "chosen_logps_avg": average[:2],
        }


class CustomKTOTrainer:
    def forward(self, model, batch, prefix=""):
        logps, logits, scored = token_logps(model, {name: batch[prefix + name] for name in rows()})
        return logits.sum(1) / scored.sum(1), logps.sum(1), logps.sum(1) / scored.sum(1)


class SwiftDPOTrainer:
    """ms-swift's. A batch with positions is one row, as with its padding_free."""

    is_encoder_decoder = aux_loss_enabled = False

    def __init__(self, ld_alpha=None, padding_free=False):
        self.args = types.SimpleNamespace(ld_alpha=ld_alpha)
        self.template = types.SimpleNamespace(sequence_parallel_size=1, padding_free=padding_free)

    def concatenated_forward(self, model, batch, is_ref_model=False):
        logps, logits, scored = token_logps(model, batch)
        sums = ld_weighted(logps, scored, None if is_ref_model else self.args.ld_alpha)
        found = {} if is_ref_model else {"nll_loss": -logps[:2][scored[:2]].mean()}
        for name, half in (("chosen", slice(0, 2)), ("rejected", slice(2, 4))):
            found[f"{name}_logps"] = sums[half]
            found[f"{name}_completion_token_counts"] = scored[half].sum(1)
            found[f"mean_{name}_logits"] = logits[half][scored[half]].mean()
        return found


def module(monkeypatch, name: str, **names):
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        part = ".".join(parts[:i])
        if part not in sys.modules:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    for key, value in names.items():
        monkeypatch.setattr(sys.modules[name], key, value, raising=False)
    return sys.modules[name]


@pytest.fixture
def llama_factory(monkeypatch):
    enabled: set[str] = set()
    module(monkeypatch, "llamafactory.extras.misc", is_env_enabled=enabled.__contains__)
    module(monkeypatch, "llamafactory.train.dpo.trainer", CustomDPOTrainer=CustomDPOTrainer)
    module(monkeypatch, "llamafactory.train.kto.trainer", CustomKTOTrainer=CustomKTOTrainer)
    return enabled


@pytest.fixture
def swift(monkeypatch):
    module(monkeypatch, "swift.rlhf_trainers", DPOTrainer=SwiftDPOTrainer)


def gradients(model, found) -> list[torch.Tensor]:
    values = found.values() if isinstance(found, dict) else found
    loss = sum((value * torch.arange(1.0, value.numel() + 1)).sum() for value in values if value.requires_grad)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same(ours, theirs, model):
    """As torch's default for fp32 has it, means of logits and counts included."""
    ours, theirs = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        mean = "logits" in str(name)
        a, b = (ours[name].mean(), theirs[name].mean()) if mean else (ours[name], theirs[name])
        torch.testing.assert_close(a, b, msg=lambda said, name=name: f"{name}: {said}")
    differentiable = [name for name in theirs if "logits" not in str(name) and ours[name].requires_grad]
    grads = [gradients(model, {name: found[name] for name in differentiable}) for found in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("loss_type, ld_alpha", [("sigmoid", None), ("simpo", None), ("sigmoid", 0.3)])
def test_llama_factory_pairs(llama_factory, loss_type, ld_alpha, padding):
    model, batch, trainer = tiny_model(), rows(padding), CustomDPOTrainer(loss_type, ld_alpha)
    for reference in (False, True):
        theirs = trainer.concatenated_forward(model, batch, reference)
        with llamafactory.swap():
            ours = trainer.concatenated_forward(model, batch, is_ref_model=reference)
        assert_same(ours, theirs, model)


@pytest.mark.parametrize("prefix", ["", "kl_"])
def test_llama_factory_single_rows(llama_factory, prefix):
    """KTO's; the first entry is each row's mean logit, of which no gradient is asked."""
    model, trainer = tiny_model(), CustomKTOTrainer()
    batch = {**rows(), **{f"kl_{name}": x.flip(0) for name, x in rows().items()}, "kto_tags": torch.ones(4).bool()}
    theirs = trainer.forward(model, batch, prefix)
    with llamafactory.swap():
        ours = trainer.forward(model, batch, prefix=prefix)
    torch.testing.assert_close(ours[0], theirs[0].detach())
    assert_same(ours[1:], theirs[1:], model)


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("padding_free", [False, True])
def test_ms_swift_pairs(swift, padding_free, ld_alpha):
    model, batch, trainer = tiny_model(), rows(), SwiftDPOTrainer(ld_alpha, padding_free)
    given = batch
    if padding_free:
        kept = batch["attention_mask"].bool()
        positions = torch.arange(WIDTH).expand(4, -1)
        given = {name: batch[name][kept].unsqueeze(0) for name in ("input_ids", "labels")}
        given["position_ids"] = positions[kept].unsqueeze(0)
    for reference in (False, True):
        theirs = trainer.concatenated_forward(model, batch, reference)
        with ms_swift.swap():
            ours = trainer.concatenated_forward(model, given, is_ref_model=reference)
        assert_same(ours, theirs, model)


@pytest.mark.parametrize("adapter, kind", [(llamafactory, CustomDPOTrainer), (ms_swift, SwiftDPOTrainer)])
def test_a_swap_is_logged_and_undone(llama_factory, swift, caplog, adapter, kind):
    theirs = kind.concatenated_forward
    with caplog.at_level(logging.WARNING, logger="dpo_fast"):
        on = adapter.swap()
    assert kind.concatenated_forward is not theirs
    assert f"{kind.__name__}.concatenated_forward is swapped" in caplog.text
    with pytest.raises(RuntimeError, match="is swapped already"):
        adapter.swap()
    on.undo()
    assert kind.concatenated_forward is theirs
    with adapter.swap():
        assert kind.concatenated_forward is not theirs
    assert kind.concatenated_forward is theirs


@pytest.mark.parametrize("adapter, kind", [(llamafactory, CustomDPOTrainer), (ms_swift, SwiftDPOTrainer)])
def test_images_go_the_old_way_with_a_line(llama_factory, swift, caplog, monkeypatch, adapter, kind):
    adapter.say_once.cache_clear()
    monkeypatch.setattr(kind, "concatenated_forward", lambda self, model, batch, is_ref_model=False: "theirs")
    with adapter.swap(), caplog.at_level(logging.WARNING, logger="dpo_fast"):
        found = kind().concatenated_forward(None, {**rows(), "pixel_values": torch.ones(1)})
    assert found == "theirs" and "own forward, because the batch has pixel_values" in caplog.text


@pytest.mark.parametrize(
    "name, value, reason",
    [
        ("is_encoder_decoder", True, "encoder-decoder"),
        ("aux_loss_enabled", True, "balancing loss"),
        ("template", types.SimpleNamespace(sequence_parallel_size=2, padding_free=False), "spread over devices"),
    ],
)
def test_ms_swift_says_what_it_leaves(name, value, reason):
    trainer = SwiftDPOTrainer()
    setattr(trainer, name, value)
    assert reason in ms_swift._reason_against(trainer, rows())


def test_a_method_with_other_arguments_is_refused_and_nothing_stays(llama_factory, monkeypatch):
    theirs = CustomDPOTrainer.concatenated_forward
    monkeypatch.setattr(CustomKTOTrainer, "forward", lambda self, model, batch: None)
    with pytest.raises(ImportError, match=r"forward takes \(self, model, batch\), and this swap knows"):
        llamafactory.swap()
    assert CustomDPOTrainer.concatenated_forward is theirs
    with Swap() as on, pytest.raises(ImportError, match="has no method nothing"):
        on.replace(CustomDPOTrainer, "nothing", lambda theirs: theirs)


def test_llama_factory_refuses_what_trains_elsewhere(llama_factory):
    llama_factory.add("USE_RAY")
    with pytest.raises(ValueError, match="USE_RAY: LLaMA-Factory then trains with code that is not swapped"):
        llamafactory.swap()


@pytest.mark.parametrize("under_torchrun", [False, True])
def test_llama_factorys_command(llama_factory, monkeypatch, under_torchrun):
    """Where it starts processes of its own, they run the adapter's module, and the swap is on in each."""
    called = []
    launcher = module(monkeypatch, "llamafactory.launcher", launch=lambda: called.append("launch"), __file__="theirs")
    monkeypatch.setattr(sys.modules["llamafactory"], "launcher", launcher, raising=False)
    module(monkeypatch, "llamafactory.train.tuner", run_exp=lambda: called.append("run_exp"))
    monkeypatch.setattr(sys, "argv", ["llamafactory", *([] if under_torchrun else ["train"]), "dpo.yaml"])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if under_torchrun:
        monkeypatch.setenv("LOCAL_RANK", "0")
    theirs = CustomDPOTrainer.concatenated_forward, CustomKTOTrainer.forward
    monkeypatch.setattr(CustomDPOTrainer, "concatenated_forward", theirs[0])  # put back afterwards
    monkeypatch.setattr(CustomKTOTrainer, "forward", theirs[1])
    llamafactory.main()
    assert called == ["run_exp" if under_torchrun else "launch"]
    assert CustomDPOTrainer.concatenated_forward is not theirs[0]
    if not under_torchrun:
        assert launcher.__file__ == "-m dpo_fast.integrations.llamafactory"
        monkeypatch.setattr(CustomDPOTrainer, "concatenated_forward", theirs[0])
        monkeypatch.setattr(CustomKTOTrainer, "forward", theirs[1])
        monkeypatch.setattr(sys, "argv", ["llamafactory", "export"])
        with pytest.raises(SystemExit, match="usage: .* train"):
            llamafactory.main()


def test_axolotls_class(monkeypatch):
    """The mixin stands before Axolotl's class, which keeps what it overrides."""
    trl = pytest.importorskip("trl")

    class AxolotlDPOTrainer(trl.DPOTrainer):
        def training_step(self, *args, **kwargs):
            return "axolotl's"

    module(monkeypatch, "axolotl.core.trainers.dpo.trainer", AxolotlDPOTrainer=AxolotlDPOTrainer)
    monkeypatch.delitem(sys.modules, "dpo_fast.integrations.axolotl", raising=False)
    kind = importlib.import_module("dpo_fast.integrations.axolotl").DPOTrainer
    fast = importlib.import_module("dpo_fast.trl").FastDPO
    assert kind.__mro__.index(fast) < kind.__mro__.index(AxolotlDPOTrainer)
    assert kind.training_step is AxolotlDPOTrainer.training_step
    monkeypatch.delitem(sys.modules, "dpo_fast.integrations.axolotl")
