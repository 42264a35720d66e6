"""Ourselves at other precisions, as implementations to test: correct ones, whose roundings are no faults."""

from refimpl.model import Impl


def bf16() -> Impl:
    """Every stage's output in bfloat16, the router and norms as the plan says."""
    return Impl(precision="bf16")


def fp8() -> Impl:
    """The report's recipe: products of 1 x 128 tiles and 128 x 128 blocks in FP8, the rest in bfloat16 and float32."""
    return Impl(precision="fp8")


def absorbed() -> Impl:
    """Attention on the latents."""
    return Impl(attend="absorbed")


def float64() -> Impl:
    """Nothing rounded."""
    return Impl(precision="float64")
