"""Hypothesis strategies: random models, and the arguments of every primitive."""
