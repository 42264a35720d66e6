"""Is one tensor another one rounded? Exactly so (bf16, fp16, FP8 blocks, q8_0), or by no more than the stored format's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.checkpoint.held import Array, Part, Stored
from refimpl.layers.numerics.quantisation import dequantize_blocks, quantize_blocks

NEAR = 0.5
"""Relative l2 error from which on nothing is taken for a rounding: 2-bit codes of normal numbers make about 0.35."""
_SPACING = {"F8_E4M3": 2.0**-4, "F8_E5M2": 2.0**-3, "BF16": 2.0**-8, "F16": 2.0**-11}
"""Half the distance of neighbours, relative to the number."""
_TWICE = 1.1  # a number that was rounded to a finer format before
_E4M3_FLOOR = 2.0**-17  # half a subnormal step over the largest code, scale rounded up to a power of two


def _cast(dtype: Any) -> Callable[[Array, Stored], Array]:
    def rounded(x: Array, _: Stored) -> Array:
        with np.errstate(over="ignore"):
            y: Array = x.astype(dtype).astype(np.float32)
        return y

    return rounded


def _blocks(x: Array, s: Stored, scale_fmt: Any = None) -> Array:
    if x.ndim != 2 or not np.isfinite(x).all():
        return x
    codes, scales = quantize_blocks(x, s.block, scale_fmt=scale_fmt)
    return dequantize_blocks(codes, scales, s.block)


def _q8_0(x: Array, _: Stored) -> Array:
    """d = max|x| / 127 of 32 numbers, kept in fp16; codes round(x / d), halves away from zero (ggml)."""
    if x.shape[-1] % 32:
        return x
    blocks = x.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
        d = d.astype(np.float16).astype(np.float32)
    scaled = blocks * inverse
    codes = np.sign(scaled) * np.floor(np.abs(scaled) + np.float32(0.5))
    y: Array = (codes * d).reshape(x.shape)
    return y


ROUNDINGS: dict[str, Callable[[Array, Stored], Array]] = {
    "bf16": _cast(ml_dtypes.bfloat16),
    "fp16": _cast(np.float16),
    "fp8 e4m3 blocks": _blocks,
    "fp8 e4m3 blocks, scales powers of two": lambda x, s: _blocks(x, s, "ue8m0"),
    "q8_0": _q8_0,
}
"""What rounds a tensor -> how; tried in this order."""


def distance(ours: Array, theirs: Array) -> float:
    """|theirs - ours| / |ours|, in l2; 0 for the same numbers, infinity where ours is 0 and theirs is not, or theirs not finite."""
    a, b = ours.reshape(-1), theirs.reshape(-1)
    with np.errstate(all="ignore"):
        off, size = np.float64(0), np.float64(0)
        for i in range(0, a.size, 1 << 22):
            x, y = (v[i : i + (1 << 22)].astype(np.float64) for v in (a, b))
            off, size = off + np.square(y - x).sum(), size + np.square(x).sum()
        if off == 0:
            return 0.0
        return float(np.sqrt(off / size)) if size and np.isfinite(off) else float("inf")


def alike(ours: Array, theirs: Array, part: Part) -> str | None:
    """ "" if the two are the same numbers; what rounds ours to theirs; None if nothing of the kind does."""
    if ours.shape != theirs.shape or distance(ours, theirs) >= NEAR:
        return None
    if np.array_equal(ours, theirs):
        return ""
    pieces = list(zip(part.split(ours), part.split(theirs), part.stored, strict=True))
    for name, rounded in ROUNDINGS.items():
        if all(np.array_equal(rounded(x, s), y) for x, y, s in pieces):
            return name
    if all(_within(x, y, s) for x, y, s in pieces):
        return " and ".join(dict.fromkeys(s.name for s in part.stored)) + ", within its step"
    return None


def _within(x: Array, y: Array, s: Stored) -> bool:
    """Whether no number is off by more than half its format's spacing; for codes, the root mean square of no group by more than a
    step, that is the group's range, 0 with it, over its steps.
    """
    off = np.abs(y - x)
    if s.steps:
        n = -x.shape[-1] % s.group
        pad = [(0, 0)] * (x.ndim - 1) + [(0, n)]
        groups, errors = (np.pad(v, pad).reshape(-1, s.group) for v in (x, off))
        span = np.maximum(groups.max(axis=1), 0) - np.minimum(groups.min(axis=1), 0)
        return bool((np.sqrt(np.square(errors).mean(axis=1)) <= span / s.steps).all())
    floor = _E4M3_FLOOR * np.abs(x).max(initial=0) if s.name.startswith("F8") else 2.0**-25
    return bool((off <= _TWICE * _SPACING.get(s.name, 0.0) * np.abs(x) + floor * (s.name in _SPACING)).all())
