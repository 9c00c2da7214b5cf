"""Other frameworks' own DPO trainers, as published, before and after the lines of docs/swap.md: see run.py."""
