"""FlexAttention's block masks from a row's runs against `create_block_mask` over every entry of the dense mask."""

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trees import TREES, pairs_as_trees, sees

from dpo_fast.block_mask import block_mask
from dpo_fast.layout import SharedPrefixLayout, make_layout

TENSORS = ["kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"]
TENSORS += ["q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"]
PAIRS = {
    "one pair in a block": [(2, 1, 1)],
    "several pairs in a block": [(2, 1, 1), (1, 2, 3), (0, 1, 1), (1, 0, 0)],
    "a block is a pair": [(4, 2, 2), (2, 4, 2)],
    "pairs of many blocks": [(40, 13, 22), (9, 30, 31)],
    "no prefix": [(0, 17, 20), (0, 3, 2)],
    "no chosen branch: a rejected branch touches its prefix": [(17, 0, 20), (16, 0, 16)],
    "no rejected branch": [(17, 20, 0)],
    "prefix alone": [(33, 0, 0)],
    "a pair of nothing": [(3, 2, 1), (0, 0, 0), (3, 2, 1)],
    "one token": [(1, 0, 0)],
}


def random_pairs(seed):
    rng = random.Random(seed)
    return [tuple(rng.choice([0, 1, 8, 16, rng.randrange(40)]) for _ in range(3)) for _ in range(rng.randrange(1, 6))]


PAIRS |= {f"random {seed}": random_pairs(seed) for seed in range(12)}


ROWS = {name: pairs_as_trees(pairs) for name, pairs in PAIRS.items()} | TREES


@pytest.mark.parametrize("lengths, shared", ROWS.values(), ids=ROWS)
def test_equals_create_block_mask(lengths, shared):
    layout = SharedPrefixLayout.make(lengths, shared)
    S = layout.length
    rows = torch.arange(S)
    for window in (None, 1, 2, 7, 16, 500):
        mask = sees(layout, window)
        for block in (4, 8, 16):
            found = block_mask(layout, window, block)
            assert torch.equal(found.mask_mod(0, 0, rows[:, None], rows), mask)
            size = dict(Q_LEN=S, KV_LEN=S, device="cpu", BLOCK_SIZE=block)
            true = create_block_mask(lambda b, h, q, k, mask=mask: mask[q, k], None, None, **size)
            assert found.seq_lengths == true.seq_lengths and found.BLOCK_SIZE == true.BLOCK_SIZE
            for name in TENSORS:
                a, b = getattr(found, name), getattr(true, name)
                assert a.dtype == b.dtype and torch.equal(a, b), name


def test_default_blocks():
    layout = make_layout([(300, 200, 100), (0, 50, 70), (513, 1, 0)])
    mask = sees(layout)
    size = dict(Q_LEN=layout.length, KV_LEN=layout.length, device="cpu")
    true = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, **size)
    found = block_mask(layout, None)
    assert found.BLOCK_SIZE == true.BLOCK_SIZE == (128, 128)
    assert all(torch.equal(getattr(found, name), getattr(true, name)) for name in TENSORS)


class Allocated(TorchDispatchMode):
    """Bytes of the results of operations: the most of one, and of all together, which bounds any peak."""

    bytes = total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
                self.total += x.untyped_storage().nbytes()
        return out


@pytest.mark.parametrize("pairs, mib, made", [(8, 0.6, 30), (32, 9.1, 200)])
def test_memory_is_that_of_the_blocks(pairs, mib, made):
    """Pairs of 3 x 1,024 tokens; create_block_mask takes 6 GB for 8 of them and 98 GB for 32."""
    layout = make_layout([(1024, 1024, 1024)] * pairs)
    with Allocated() as allocated:
        found = block_mask(layout, None)
    blocks = layout.length // 128
    print(f"{layout.length} tokens: {allocated.total / 2**20:.1f} MiB in all, {allocated.bytes / 2**20:.1f} at once")
    assert layout.length in (24_576, 98_304)
    kept = sum(getattr(found, name).nbytes for name in TENSORS)
    assert kept == 4 * (4 * blocks**2 + 4 * blocks) and kept <= mib * 2**20
    assert allocated.total <= made * 2**20
    assert allocated.bytes <= 8 * (blocks + 1) ** 2 + 8 * layout.length  # the indices of a sort, in int64
