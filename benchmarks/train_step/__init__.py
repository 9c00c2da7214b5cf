"""Whole optimizer steps of TRL's trainer and of ours: see run.py."""

from .run import main as main
