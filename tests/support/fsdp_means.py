"""What FSDP2 makes of gradients on CPU."""

import torch

NO_MEANS = 77  # exit status of a rank that has found sums


def averages(mesh) -> bool:
    """Whether gradients of FSDP2 are means over ranks here: those of torch 2.8 are sums on CPU."""
    from torch.distributed.fsdp import fully_shard

    layer = fully_shard(torch.nn.Linear(2, 2, bias=False), mesh=mesh)
    layer(torch.ones(1, 2)).sum().backward()
    return torch.equal(layer.weight.grad.full_tensor(), torch.ones(2, 2))
