"""The head, from hidden states to log-probs or a DPO loss and its gradients: providers, shapes and gate of `head`."""

import pytest

from benchmarks.groups import CUDA, take_turns
from benchmarks.head import Gates
from benchmarks.head_providers import MODES, OTHERS, SHAPES, Problem, case, providers

SHAPE, ROUNDS = ("llama3-1b-chat", 10) if CUDA else ("cpu-quick", 3)
MEMBERS = ("ours", "ours-fused", "eager", *OTHERS)


@pytest.fixture(scope="module")
def gates() -> Gates:
    return Gates(Problem.make(*SHAPES[SHAPE], "cuda" if CUDA else "cpu"))


def measure(gates: Gates, mode: str) -> dict:
    fitting = {k: v for k, v in providers(gates.p).items() if mode == "trained" or k != "ours-fused"}
    members = {name: case(gates.of(name).p, provider, mode) for name, provider in fitting.items()}
    return take_turns(members, lambda name, result: gates.of(name).errors(name, *result), ROUNDS)


@pytest.mark.parametrize(
    "mode, member", [(mode, name) for mode in MODES for name in MEMBERS if mode == "trained" or name != "ours-fused"]
)
def test_head(measured, speed, gates, mode, member):
    group = f"head, {SHAPE}, {mode}"
    speed(group, member, measured(group, measure, gates, mode))
