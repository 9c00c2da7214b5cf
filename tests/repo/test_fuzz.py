"""A few of the random calls of `make fuzz`, the same in each run."""

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("triton")
from fuzz import OPS, modes_of, options
from hypothesis import given

from dpo_fast.ops.dispatch import interpreting

COUNTS = {"eager": 40, "interpreter": 8, "compiled": 1}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # of create_graph=True
@pytest.mark.parametrize("op, mode", [(op, mode) for op in OPS for mode in modes_of(op)])
def test_random_calls(op, mode):
    if mode == "interpreter" and not interpreting():
        pytest.skip("Triton runs on a device here")

    @options(COUNTS[mode], derandomize=True)
    @given(OPS[op].drawn(op, mode))
    def check(case):
        case.check(mode)

    check()
