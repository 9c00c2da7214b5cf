"""Differentiable ops: the only place that knows more than one implementation of the same mathematics."""
