"""For tools that want it; all metadata are in pyproject.toml."""

from setuptools import setup

setup()
