"""Attention over a shared-prefix row, forward and backward: each implementation against eager in fp64."""

import pytest

from benchmarks.attention import CASES, Problem
from benchmarks.groups import CUDA, take_turns
from dpo_fast.attention import IMPLEMENTATIONS, reasons_against_implementation

CASE, ROUNDS = ("chat", 10) if CUDA else ("small", 5)


def measure() -> dict:
    p = Problem(CASES[CASE])
    against = {name: reasons_against_implementation(name, *p.inputs) for name in IMPLEMENTATIONS}
    members = {f"ours-{name}": ImportError("; ".join(r)) if r else p.both(name) for name, r in against.items()}
    return take_turns(members, p.check, ROUNDS)


@pytest.mark.parametrize("member", [f"ours-{name}" for name in IMPLEMENTATIONS])
def test_attention(measured, speed, member):
    group = f"attention, {CASE} rows, forward + backward"
    speed(group, member, measured(group, measure))
