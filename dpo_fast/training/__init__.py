"""Training: the only place that imports accelerate, datasets and peft."""
