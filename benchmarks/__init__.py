"""Benchmarks. Each module runs as `python -m benchmarks.NAME`; results are JSON in results/<device>/."""
