"""The head, from hidden states to log-probs or a DPO loss and its gradients: providers, shapes and gate of `head`."""

import pytest

from benchmarks.groups import CUDA, take_turns
from benchmarks.head_gate import Gate
from benchmarks.head_providers import MODES, OTHERS, SHAPES, Problem, case, providers

SHAPE, ROUNDS = ("llama3-1b-chat", 10) if CUDA else ("cpu-quick", 3)
MEMBERS = ("ours", "ours-fused", "eager", *OTHERS)


@pytest.fixture(scope="module")
def problem() -> tuple[Problem, Gate]:
    p = Problem.make(*SHAPES[SHAPE], "cuda" if CUDA else "cpu")
    return p, Gate(p)


def measure(p: Problem, gate: Gate, mode: str) -> dict:
    fitting = {k: v for k, v in providers(p).items() if mode == "trained" or k != "ours-fused"}
    members = {name: case(p, provider, mode) for name, provider in fitting.items()}
    return take_turns(members, lambda name, result: gate.errors(name, *result), ROUNDS)


@pytest.mark.parametrize(
    "mode, member", [(mode, name) for mode in MODES for name in MEMBERS if mode == "trained" or name != "ours-fused"]
)
def test_head(measured, speed, problem, mode, member):
    group = f"head, {SHAPE}, {mode}"
    speed(group, member, measured(group, measure, *problem, mode))
