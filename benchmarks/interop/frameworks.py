"""The frameworks of docs/swap.md: what is installed, what is asked of the swap, what it does not reach."""

from dataclasses import dataclass

COMMON = ("torch==2.13.0", "triton==3.7.1", "numpy==2.4.6", "accelerate==1.15.0", "datasets==5.2.0", "psutil==7.2.2")
HUGGING_FACE = (*COMMON, "transformers==5.23.0")


@dataclass(frozen=True)
class Framework:
    """A row of the table. `name` is that of its result and of `make interop NAME`."""

    name: str
    title: str
    heading: str  # of docs/swap.md, where its lines are
    script: str  # benchmarks/interop/SCRIPT.py
    pins: tuple[str, ...] = ()  # what pip installs, versions fixed
    bare: tuple[str, ...] = ()  # and without their dependencies: frameworks whose own bounds exclude a pin
    environment: str = ""  # the name of the row that has it, where it is not its own
    options: tuple[str, ...] = ()  # to the script
    faster: float | None = None  # bars: processor seconds before / after at least, memory after / before at most
    memory: float | None = None
    beside: str = ""  # what is not covered, and why
    not_run: str = ""  # why there is no result


def _trl(version: str, pins: tuple[str, ...] = HUGGING_FACE, **more) -> Framework:
    release = ".".join(version.split(".")[:2])
    return Framework(f"trl-{release}", f"TRL {version}", "TRL", "trl", (*pins, f"trl=={version}"), **more)


OLD_TRL = ("--transformers-5",)
FRAMEWORKS = (
    _trl("0.24.0", options=OLD_TRL, faster=3.0, memory=0.4),
    _trl("0.29.1"),
    _trl("1.0.0"),
    _trl("1.9.0", faster=3.0, memory=0.4),
    _trl("1.14.2"),
    _trl("1.16.0"),
    Framework(
        "trl-1.16-completions",
        "TRL 1.16.0, its head on completion tokens only, as on a GPU",
        "TRL",
        "trl",
        environment="trl-1.16",
        options=("--completions-only",),
        faster=1.9,
        memory=0.5,
    ),
    # LLaMA-Factory, Axolotl, ms-swift
    # OpenRLHF, torchtune, the original repository, Unsloth
)
