"""Around TRL's DPOTrainer: its other preference trainers, and `trl dpo` from the command line."""
