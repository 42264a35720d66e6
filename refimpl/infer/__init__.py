"""Inference: generation with the latent cache."""

from .generate import greedy

__all__ = [
    "greedy",
]
