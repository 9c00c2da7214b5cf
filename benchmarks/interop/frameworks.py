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


TORCHTUNE = (
    *HUGGING_FACE,
    *("omegaconf==2.4.0", "tokenizers==0.23.3", "sentencepiece==0.2.3", "tiktoken==0.14.0", "blobfile==3.3.0"),
    *("kagglehub==1.0.3", "pillow==13.0.0", "safetensors==0.8.0", "tqdm==4.70.1"),
)
TORCHTUNE_BARE = ("torchao==0.10.0", "torchtune==0.6.1")  # a torchao of its time: newer ones have moved what it imports
PADDED = "images, NEFTune: padded rows"
LOGITS = f"Liger's loss, `compute_metrics`: TRL's own logits; {PADDED}"
FRAMEWORKS = (
    _trl("0.24.0", options=("--transformers-5",), faster=3.0, memory=0.4, beside=f"Liger's loss; {PADDED}"),
    _trl("0.29.1", beside=LOGITS),
    _trl("1.0.0", beside=LOGITS),
    _trl("1.9.0", faster=3.0, memory=0.4, beside=LOGITS),
    _trl("1.14.2", beside=LOGITS),
    _trl("1.16.0", beside=PADDED),
    Framework(
        "trl-1.16-completions",
        "TRL 1.16.0, its head on completion tokens only, as on a GPU",
        "TRL",
        "trl",
        environment="trl-1.16",
        options=("--completions-only",),
        faster=1.9,
        memory=0.5,
        beside=PADDED,
    ),
    # LLaMA-Factory, Axolotl, ms-swift
    Framework(
        "openrlhf",
        "OpenRLHF 0.11.2",
        "OpenRLHF",
        "openrlhf",
        (
            *COMMON,
            *("transformers==5.15.0", "peft==0.21.2", "einops==0.8.2", "jsonlines==4.0.0", "loralib==0.1.2"),
            *("torchmetrics==1.9.0", "optree==0.20.0", "pylatexenc==2.11", "hjson==3.1.0", "msgpack==1.2.4"),
            *("ninja==1.13.2", "py-cpuinfo==9.0.0", "pydantic==2.14.4"),
        ),
        bare=("deepspeed==0.19.6", "openrlhf==0.11.2"),  # its flash-attn needs nvcc, and Ray is not used
        beside="ring attention, a temperature: refused. Its strategy is torch's here, as DeepSpeed's wants CUDA",
    ),
    Framework(
        "torchtune",
        "torchtune 0.6.1, LoRA",
        "torchtune",
        "torchtune",
        TORCHTUNE,
        bare=TORCHTUNE_BARE,
        beside="prompts run twice and padding runs: its decoder takes rows as they are",
    ),
    Framework(
        "torchtune-logits",
        "torchtune 0.6.1, LoRA, its logits scored",
        "torchtune",
        "torchtune_logits",
        environment="torchtune",
        faster=1.3,
        memory=0.6,
        beside="the logits are built",
    ),
    Framework(
        "original",
        "the original repository's loop",
        "The original repository",
        "original",
        HUGGING_FACE,
        beside="its sources are not run, but functions of their signatures",
    ),
    Framework(
        "original-logits",
        "the original repository's loop, its logits scored",
        "The original repository",
        "original_logits",
        environment="original",
        faster=1.3,
        memory=0.6,
        beside="the logits are built",
    ),
    Framework(
        "unsloth",
        "Unsloth 2026.10.9, LoRA, on its CPU backend",
        "Unsloth",
        "unsloth",
        (
            *("torch==2.13.0", "triton==3.7.1", "numpy==2.4.6", "accelerate==1.15.0", "datasets==4.8.0"),
            *("psutil==7.2.2", "transformers==5.17.0", "trl==1.15.0", "peft==0.21.2", "requests==2.34.2"),
            *("bitsandbytes==0.50.2", "torchao==0.18.0", "sentencepiece==0.2.3", "protobuf==7.36.2", "json5==0.17.3"),
            *("hf-transfer==0.1.9", "nest-asyncio==1.6.0", "structlog==26.1.0", "tyro==1.0.17"),
            *("einops==0.8.2", "pillow==13.0.0", "msgspec==0.22.0"),
        ),
        bare=("unsloth==2026.10.9", "unsloth-zoo==2026.10.9"),
        beside="its GPU path, whose attention is its own: not run",
    ),
)
