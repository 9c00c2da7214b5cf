"""Package metadata. Nothing here imports torch, so building needs only setuptools."""

from pathlib import Path

from setuptools import setup

EXTRAS = {
    "trl": ["trl>=1.15; python_version >= '3.11'"],  # TRL's own bound
    "peft": ["peft>=0.18"],
    "examples": ["matplotlib>=3.9"],
    "notebooks": ["nbformat>=5.10", "nbclient>=0.10", "ipykernel>=6.29", "matplotlib>=3.9"],
    "bench": [
        "pytest>=8.0",
        "pytest-benchmark[histogram]>=4.0",
        "matplotlib>=3.9",
        "liger-kernel>=0.8",
        "cut-cross-entropy>=25.1",
    ],
    "dev": ["pytest>=8.0", "pytest-benchmark>=4.0", "pytest-xdist>=3.5", "hypothesis>=6.100"]
    + ["ruff>=0.9", "build>=1.2"]
    + ["setuptools>=77.0.3"],  # tests/test_packaging.py builds with what is installed
}
EXTRAS["all"] = sorted({requirement for group in EXTRAS.values() for requirement in group})

setup(
    name="dpo_fast",
    version="0.1.0",
    description="Direct Preference Optimization, exact and fast: fused log-prob kernels, a Trainer, a TRL drop-in.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # `dpo_fast/kernels` is a relative symlink to the top-level folder `kernels`, which has no __init__.py on purpose:
    # a regular package of that name at the root would shadow Hugging Face's `kernels` (docs/guide.md).
    packages=["dpo_fast", "dpo_fast.kernels", "dpo_fast.ops", "dpo_fast.training", "dpo_fast.report", "dpo_fast.data"]
    + ["dpo_fast.demo"],
    package_data={"dpo_fast": ["py.typed"], "dpo_fast.data": ["*.jsonl"]},
    # The oldest with which the whole suite passes: `make floor`. Before transformers 5.6 Trainer divides gradients by
    # the number of accumulated batches twice
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "transformers>=5.6",
        "accelerate>=1.4",
        "datasets>=4.0",
        "pyyaml>=6.0.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["dpo-fast = dpo_fast.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
