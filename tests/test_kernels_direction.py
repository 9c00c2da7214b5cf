"""A 16-bit D written over the fp32 tile that it is computed from."""

import pytest
import torch

pytest.importorskip("triton")
from dpo_fast.kernels.token_logps import token_logps_bwd, token_logps_direction, token_logps_fwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def direction_both_ways(rows, V, dtype, *, device=DEVICE, softcap=None, seed=0):
    """(over its own tile, into a tensor of its own), both (rows, V)."""
    torch.manual_seed(seed)
    tile = torch.randn(rows, V, device=device) * 3
    tile[0] = -torch.inf
    labels = torch.randint(V, (rows,), device=device)
    coefficient = torch.randn(rows, device=device)
    coefficient[1::4] = 0
    knobs = dict(logit_scale=0.5, softcap=softcap, temperature=0.7)
    out = {name: torch.empty(rows, device=device) for name in ("logps", "row_max", "log_sum")}
    whole = (1, rows, 0, V)
    token_logps_fwd(tile, whole, labels, out, ignore_index=-1, **knobs)
    arguments = (labels, out["row_max"], out["log_sum"], coefficient)
    elsewhere = torch.empty(rows, V, dtype=dtype, device=device)
    token_logps_bwd(tile, elsewhere, whole, whole, *arguments, ignore_index=-1, **knobs)
    over = tile.view(dtype)[:, :V]
    token_logps_direction(tile, over, *arguments, **knobs)
    return over, elsewhere


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [1, 7, 4096, 9001, 12_288])
def test_it_is_what_the_backward_writes(V, dtype, softcap):
    over, elsewhere = direction_both_ways(5, V, dtype, softcap=softcap)
    assert torch.equal(over, elsewhere) and (V == 1 or over.abs().max() > 0)
