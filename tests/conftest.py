"""Without a GPU, kernels run in Triton's interpreter. The switch is read when triton is imported, so it is set here,
before any test module is; everything that does not ask for an implementation takes the eager path, which is faster."""

import importlib.metadata
import os
from pathlib import Path

import pytest
import torch

# Modules that train models, start processes or run kernels in the interpreter: nothing for `make check`, as are single
# tests that do, or that compile
THOROUGH = {
    "benchmarks/test_results",
    "benchmarks/test_suite",
    "benchmarks/test_train_step",
    "integrations/test_openrlhf",
    "integrations/test_original",
    "kernels/test_aot",
    "kernels/test_gpu",
    "repo/test_packaging",
    "test_bad_inputs",
    "test_cli",
    "test_completion_wrappers",
    "test_demo",
    "training/test_checkpoints",
    "training/test_engines",
    "training/test_fsdp",
    "training/test_ranks",
    "training/test_quantised",
    "training/test_resume",
    "training/test_runs",
    "training/test_trainer",
    "trl/test_curves",
    "trl/test_trainer",
    "trl/test_trl",
    "trl/test_trl_rows",
}

# Processes that tests start import the checkout that is tested, installed or not, and what its tests share
_TESTS = Path(__file__).resolve().parent
_PATHS = (str(_TESTS.parent), str(_TESTS), str(_TESTS / "support"), os.environ.get("PYTHONPATH"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _PATHS))

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("DPO_FAST_IMPL", "torch")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture(autouse=True)
def environment():
    """A test leaves the environment as it was: arguments of a training set it, for accelerate."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


def pytest_configure(config):
    """Say what is wrong before hundreds of tests do: until 3.7, Triton's interpreter fails with numpy 2.4 and later."""
    try:
        versions = [importlib.metadata.version(name).split(".")[:2] for name in ("triton", "numpy")]
    except importlib.metadata.PackageNotFoundError:
        return
    triton, numpy = (tuple(map(int, version)) for version in versions)
    if os.environ.get("TRITON_INTERPRET") == "1" and triton < (3, 7) and numpy >= (2, 4):
        raise pytest.UsageError(f"the interpreter of Triton {triton[0]}.{triton[1]} needs numpy < 2.4 (without a GPU)")


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = getattr(item, "callspec", None)
        interpreted = parameters is not None and "triton" in parameters.params.values()
        if (
            interpreted
            or item.path.relative_to(_TESTS).with_suffix("").as_posix() in THOROUGH
            or "compile" in item.name
        ):
            item.add_marker("thorough")
