"""FSDP2 on two ranks: each parameter's gradient is the mean of what the ranks' batches give one process."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from fsdp_means import NO_MEANS, averages
from tiny import tiny_model, tiny_pairs

from dpo_fast import Objective, attach
from dpo_fast.layout import shared_prefix_batch


def loss(model, batch):
    return model(batch, objective=Objective(), reference_logps=torch.zeros(4)).loss


def worker(own_unit: bool, attach_first: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    if not averages(init_device_mesh("cpu", (2,))):
        os._exit(NO_MEANS)
    pairs = tiny_pairs(4)
    batches = [shared_prefix_batch(pairs[:2]), shared_prefix_batch(pairs[2:])]
    plain = attach(tiny_model())
    sum(loss(plain, batch) / 2 for batch in batches).backward()

    model, mesh = tiny_model(), init_device_mesh("cpu", (2,))
    if attach_first:
        attach(model)
    for unit in [*model.model.layers, *([model.lm_head] if own_unit else []), model]:
        fully_shard(unit, mesh=mesh)
    attach(model)
    loss(model, batches[torch.distributed.get_rank()]).backward()
    for name, parameter in model.named_parameters():
        found, true = parameter.grad.full_tensor(), plain.get_parameter(name).grad
        assert (found - true).norm() <= 1e-5 * true.norm(), name
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads at times abort a process that leaves the long way, with nothing left to do


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    "own_unit, attach_first", [(False, True), (True, False)], ids=["head in the root", "head by itself, attached last"]
)
def test_gradients_are_means_over_ranks(own_unit, attach_first):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": port}
    command = [sys.executable, __file__, str(int(own_unit)), str(int(attach_first))]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        if rank.returncode == NO_MEANS:
            pytest.skip(f"FSDP2 of torch {torch.__version__} adds up gradients on CPU where it should average them")
        assert rank.returncode == 0, errors[-3000:]


if __name__ == "__main__":
    worker(*(argument == "1" for argument in sys.argv[1:]))
