"""Ourselves at other precisions, as implementations to test: correct ones, whose roundings are no faults."""

from refimpl.model import Impl


def bf16() -> Impl:
    """Every stage's output in bfloat16, the router and norms as the plan says."""
    return Impl(precision="bf16")


def absorbed() -> Impl:
    """Attention on the latents."""
    return Impl(attend="absorbed")


def float64() -> Impl:
    """Nothing rounded."""
    return Impl(precision="float64")
