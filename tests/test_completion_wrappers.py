"""`completion_logps` of a model as loops wrap it: under an engine, inside a module of a framework's own, compiled, with
adapters, of few bits. On two ranks, one step is the step of one process on the mean of both ranks' losses."""

import importlib.util
import os
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from fsdp_means import NO_MEANS, averages
from tiny import tiny_model, tiny_pairs
from torch import Tensor, nn

import dpo_fast

EXACT = 1e-6  # of log-probs and weights of size 1 to 10: rounding in fp32


class Actor(nn.Module):
    """A framework's module around the model: its forward takes other arguments and builds logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, sequences, action_mask=None, attention_mask=None, return_output=False):
        raise AssertionError("the actor's own forward ran")


def stacked(seed: int = 0, pairs: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, attention_mask, labels of [chosen, rejected] rows, padded on the right."""
    found = tiny_pairs(pairs, seed=seed)
    rows = [(p.chosen_prompt, p.chosen) for p in found] + [(p.rejected_prompt, p.rejected) for p in found]
    width = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids, mask, labels = [], [], []
    for prompt, completion in rows:
        pad = width - len(prompt) - len(completion)
        ids.append(prompt + completion + [0] * pad)
        mask.append([1] * (width - pad) + [0] * pad)
        labels.append([-100] * len(prompt) + completion + [-100] * pad)
    return torch.tensor(ids), torch.tensor(mask), torch.tensor(labels)


def own_logps(model: nn.Module, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """(B,) by the model's own logits, in fp64 from there."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    targets = labels[:, 1:]
    logps = logits.double().log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (logps * (targets != -100)).sum(1)


def loss_of(logps: Tensor) -> Tensor:
    chosen, rejected = logps.chunk(2)
    return -nn.functional.logsigmoid(chosen - rejected).mean()


def completions(model: nn.Module, rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return dpo_fast.completion_logps(model, *rows).logps


# --- one process ---------------------------------------------------------------------------------------------------


def lora(model: nn.Module, **kwargs) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **kwargs)
    return peft.get_peft_model(model, config)


MADE = {
    "an actor of LoRA in an actor": lambda: Actor(Actor(lora(tiny_model()))),
    "a compiled actor": lambda: torch.compile(Actor(tiny_model()), backend="eager"),
}


@pytest.mark.parametrize("kind", MADE)
def test_gradients_are_those_of_the_models_own_logits(kind, caplog):
    torch.manual_seed(0)
    model = MADE[kind]()
    torch.manual_seed(0)
    plain = lora(tiny_model()) if "LoRA" in kind else tiny_model()
    rows = stacked()
    found, true = completions(model, rows), own_logps(plain, *rows)
    assert (found - true).abs().max() <= EXACT * true.abs().max()
    loss_of(found).backward()
    loss_of(true).backward()
    for p, (name, q) in zip(model.parameters(), plain.named_parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name
    assert "padded rows" not in caplog.text


def test_a_disabled_adapter_is_the_reference():
    model, rows = lora(tiny_model()), stacked()
    outer = Actor(model)
    policy = completions(outer, rows)
    with torch.no_grad(), model.disable_adapter():
        reference = completions(outer, rows)
    true = own_logps(tiny_model(), *rows)
    assert (reference - true).abs().max() <= EXACT * true.abs().max() < (policy - true).abs().max()
    assert torch.equal(completions(outer, rows), policy)


def test_of_two_adapters_the_active_one_is_scored():
    peft = pytest.importorskip("peft")
    model, rows = lora(tiny_model()), stacked()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["o_proj"], init_lora_weights=False))
    found = {}
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        found[name] = completions(model, rows)
        assert (found[name] - own_logps(model, *rows)).abs().max() <= 2 * EXACT * found[name].abs().max()
    assert not torch.allclose(found["default"], found["other"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", [{"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}, {"load_in_8bit": True}])
def test_weights_of_few_bits_under_an_adapter(tmp_path, bits, training):
    """On a CPU, bitsandbytes' product refuses some of what a packed row is. One without adapter serves as reference."""
    pytest.importorskip("bitsandbytes")
    import transformers

    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**bits)
    kwargs = dict(quantization_config=config, dtype=torch.float32)
    model = lora(transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **kwargs)).train(training)
    rows, grads = stacked(), []
    for score in (completions, lambda model, rows: own_logps(model, *rows)):
        logps = score(model, rows)
        loss_of(logps).backward()
        with torch.no_grad(), model.disable_adapter():
            grads.append([logps, score(model, rows), *(p.grad for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    for found, true in zip(*grads, strict=True):
        assert (found - true).norm() <= 1e-5 * true.norm()


# --- two ranks -----------------------------------------------------------------------------------------------------


def shard(lm: nn.Module, root: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for unit in [*lm.model.layers, root]:
        fully_shard(unit, mesh=mesh)
    return root


def flat(lm: nn.Module, root: nn.Module, **kwargs) -> nn.Module:
    """FSDP1, as torch has had it since 1.11."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(lm.model.layers[0])})
    return FullyShardedDataParallel(root, auto_wrap_policy=policy, device_id=torch.device("cpu"), **kwargs)


def engine(lm: nn.Module, root: nn.Module, stage: int) -> nn.Module:
    import deepspeed

    config = dict(
        zero_optimization=dict(stage=stage),
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,
        train_micro_batch_size_per_gpu=1,
        gradient_clipping=0.0,
    )
    optimizer = torch.optim.SGD(root.parameters(), lr=1.0)
    return deepspeed.initialize(model=root, config=config, optimizer=optimizer)[0]


DDP = nn.parallel.DistributedDataParallel
WRAPPED = {
    "DDP(LM)": lambda lm: DDP(lm),
    "DDP(Actor(LM))": lambda lm: DDP(Actor(lm)),
    "Actor(DDP(LM))": lambda lm: Actor(DDP(lm)),
    "DDP(compiled LM)": lambda lm: DDP(torch.compile(lm, backend="eager")),
    "FSDP1(LM)": lambda lm: flat(lm, lm),
    "FSDP1(LM), use_orig_params": lambda lm: flat(lm, lm, use_orig_params=True),
    "FSDP1(Actor(LM))": lambda lm: flat(lm, Actor(lm)),
    "FSDP2(LM)": lambda lm: shard(lm, lm),
    "FSDP2(Actor(LM))": lambda lm: shard(lm, Actor(lm)),
}
ENGINES = {
    f"ZeRO-{stage}: {how}": (lambda lm, stage=stage, order=order: order(lm, stage))
    for stage in (1, 2, 3)
    for how, order in {
        "engine(LM)": lambda lm, stage: engine(lm, lm, stage),
        "Actor(engine(LM))": lambda lm, stage: Actor(engine(lm, lm, stage)),
        "engine(Actor(LM))": lambda lm, stage: engine(lm, Actor(lm), stage),
    }.items()
}


def step(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """One of SGD, with a learning rate of 1."""
    engines = [module for module in model.modules() if hasattr(type(module), "allreduce_gradients")]
    optimizer = None if engines else torch.optim.SGD(model.parameters(), lr=1.0)  # of FSDP2's shards: before a forward
    if optimizer is None:
        engines[0].backward(loss())
        engines[0].step()
    else:
        loss().backward()
        optimizer.step()


def whole_weights(lm: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    from dpo_fast.copies import gathered

    found = {}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        for name, p in lm.named_parameters():
            with gathered(p):
                whole = p.full_tensor() if hasattr(p, "full_tensor") else p
                found[name.replace("_fsdp_wrapped_module.", "")] = whole.detach().clone()
    return found


def rank(kinds: dict) -> None:
    """Exits with NO_MEANS where this torch's FSDP2 has none on CPU."""
    from torch.distributed.device_mesh import init_device_mesh

    if kinds is ENGINES:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        torch.distributed.init_process_group("gloo")
        if not averages(init_device_mesh("cpu", (2,))):
            os._exit(NO_MEANS)
    plain = tiny_model()
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    step(plain, lambda: sum(loss_of(own_logps(plain, *stacked(seed))) / 2 for seed in range(2)))
    true, rows = dict(plain.named_parameters()), stacked(torch.distributed.get_rank())
    assert all((true[name] - start[name]).abs().max() > 100 * EXACT for name in start)
    for kind, wrap in kinds.items():
        lm = tiny_model()
        model = wrap(lm)
        step(model, lambda model=model: loss_of(completions(model, rows)))
        found = whole_weights(lm, model)
        assert found.keys() == true.keys(), kind
        for name in true:
            difference = (found[name] - true[name]).abs().max()
            assert difference <= EXACT, f"{kind}: {name} is off by {difference:.3g}"
        print(kind, "is one process", flush=True)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads at times abort a process that leaves the long way, with nothing left to do


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("group", ["torch", "deepspeed"])
def test_a_step_on_two_ranks_is_that_of_one_process(group):
    if importlib.util.find_spec(group) is None:
        pytest.skip(f"no {group}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, group],
            env={**environment, "RANK": str(index), "LOCAL_RANK": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    kinds = WRAPPED if group == "torch" else ENGINES
    for process in ranks:
        output, _ = process.communicate(timeout=300)
        if process.returncode == NO_MEANS:
            pytest.skip(f"FSDP2 of torch {torch.__version__} adds up gradients on CPU where it should average them")
        assert process.returncode == 0, output[-3000:]
        assert [kind for kind in kinds if f"{kind} is one process" not in output] == []
        assert "padded rows" not in output


if __name__ == "__main__":
    rank(WRAPPED if sys.argv[1] == "torch" else ENGINES)
