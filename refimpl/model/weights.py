"""Weights as they come (float arrays, bfloat16, block-scaled FP8) turned into what a precision plan computes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.layers.numerics.quantisation import dequantize_blocks
from refimpl.layers.precision import Plan

from .by_rows import Streamed

SCALE = "_scale_inv"


def effective(weights: Mapping[str, Any], plan: Plan, block: tuple[int, int] = (128, 128)) -> dict[str, Any]:
    """Checkpoint name -> the array the plan computes with; arrays that fit already are passed on without a copy.

    A weight is a float array, a pair (FP8 codes, scale_inv), or FP8 codes with a companion entry `<name>_scale_inv`.
    One that is read by rows passes.
    SpecError for dtypes that hold no weights and for NaN or infinity, naming the tensor and the first bad element.
    """
    out: dict[str, Any] = {}
    for name in weights:
        require(isinstance(name, str), f"weights have names, not {name!r}")
        if name.endswith("weight" + SCALE) and name.removesuffix(SCALE) in weights:
            continue
        with where(f"while loading {name}"):
            w = weights[name]
            if isinstance(w, Streamed):
                require(
                    w.plan is plan, f"it is read under the plan {w.plan.name}, the model computes under {plan.name}"
                )
                out[name] = w
                continue
            pair = w if isinstance(w, tuple) else (w, weights[name + SCALE]) if name + SCALE in weights else None
            if pair is not None:
                good = len(pair) == 2 and all(hasattr(a, "dtype") for a in pair)
                require(good, "block-scaled weights are a pair of arrays, codes and scales")
                codes, scales = pair
                w = dequantize_blocks(codes, scales, block)
            with np.errstate(over="ignore"):  # what overflows the plan's dtype is found below
                held = _floating(w).astype(plan.dtype, copy=False)
            out[name] = plan.weight(name, _finite(held))
    return out


def _floating(w: Any) -> Array:
    if not hasattr(w, "dtype"):
        w = np.asarray(w)
    if w.dtype.kind == "f":
        return w
    if w.dtype.name == "bfloat16":
        return w.astype(np.float32)
    if w.dtype.name.startswith("float8"):
        raise SpecError(f"dtype {w.dtype.name} without its weight{SCALE}")
    raise SpecError(f"dtype {w.dtype}; a weight is a floating-point array")


def _finite(w: Array) -> Array:
    """w itself if all of it is finite. One sum tells: NaN and infinity survive it (an overflowing sum is looked at
    again).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = w.size and not np.isfinite(w.sum())
    if suspicious and not (good := np.isfinite(w)).all():
        first = np.argwhere(~good)[0].tolist()
        raise SpecError(f"{int((~good).sum())} elements are NaN or infinite, the first at {first}: {w[tuple(first)]}")
    return w
