"""`pytest benchmarks`: the suite's cases as pytest-benchmark's rows, which `--benchmark-compare` follows over commits.

Whoever computes the same thing is a group. Its members take turns in `measure.interleaved` and only then get to
pytest-benchmark, which is told each time by a clock that replays it: there is one way to measure, and neighbours on the
machine hit all members alike. Times are the processor's (all threads), on CUDA those of events on the device.
"""

from collections.abc import Callable, Mapping

import pytest
import torch

from benchmarks.groups import CUDA, OURS, Clock, Left, Measured
from benchmarks.record import PACKAGES, stamp


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_timer = "benchmarks.groups.clock"


def pytest_benchmark_update_machine_info(config, machine_info):
    """Versions of what is compared, and the GPU."""
    machine_info["packages"] = {name: version for name, version in stamp()["versions"].items() if name in PACKAGES}
    machine_info["torch"] = torch.__version__
    if CUDA:
        machine_info["gpu"] = torch.cuda.get_device_name()


@pytest.fixture(scope="module")
def measured() -> Callable:
    """Measures a group once a module: (group, how, *arguments) -> what `how(*arguments)` returns."""
    found: dict[str, Mapping] = {}

    def measure(group: str, how: Callable, *arguments) -> Mapping:
        if group not in found:
            found[group] = how(*arguments)
        return found[group]

    return measure


@pytest.fixture
def speed(request) -> Callable:
    """Gives a member's times to pytest-benchmark: (group, member, what `take_turns` returned)."""

    def report(group: str, member: str, found: Mapping[str, Measured | Left]) -> None:
        here = found.get(member, Left("not installed", wrong=False))
        if isinstance(here, Left):
            give_up = pytest.fail if here.wrong and member.startswith(OURS) else pytest.skip
            give_up(f"no speed: {here.reason}")
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = group
        benchmark.extra_info |= here.extra
        times = iter(here.times_ms)

        def replay():
            Clock.seconds += next(times) / 1e3

        benchmark.pedantic(replay, rounds=len(here.times_ms))

    return report
