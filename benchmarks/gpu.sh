#!/usr/bin/env bash
# What a GPU can tell, within the minutes given: see gpu.py, GPU.md, or --help.
cd "$(dirname "$0")/.." && exec "${PYTHON:-python3}" -m benchmarks.gpu "$@"
