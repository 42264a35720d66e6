"""How far a stage may be from float64: measured, per tap and per input, on twins of the stage at the declared
precision.

A twin is the specification's own stage at the candidate's precision, on the candidate's inputs. The first takes them as
they are; the others take them nudged by about the last place of the arithmetic, which shows how much a stage that
cancels (a score near zero, a norm of a small vector) magnifies any other order of summation.
"""

from __future__ import annotations

import numpy as np

from refimpl.autograd.tensor import Array

TWINS = 4
"""Members of the family; more change the largest error by little and cost a replay each."""
FACTOR = 2.0
"""A candidate is one more draw from the family: sums in another order may exceed the largest of four draws."""
ROUNDINGS = 4.0
"""No stage is asked to be better than this many units of roundoff: twins that happen to round well prove nothing."""
UNIT = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
"""Unit roundoff by the dtype that a tap is stored in."""
EXTRA = {
    "mla.rope_tables": (
        4.0,
        "x 4: frequencies are themselves rounded, pow errs by up to 2 units, and a position multiplies it",
    ),
}
"""stage -> (further factor, its reason)."""


def nudge(x: Array, seed: int) -> Array:
    """x moved by at most one unit in its last place, at random; seed 0 leaves it alone."""
    if not seed:
        return x
    rng = np.random.default_rng([seed, x.size])
    return (x * (1 + np.finfo(x.dtype).eps * rng.uniform(-1, 1, x.shape))).astype(x.dtype)


def row_errors(x: Array, e: Array) -> Array:
    """|x - e| / |e| per row (last axis); a row counts at least a thousandth of the largest; NaN counts as infinite.

    Where e is -inf (a masked score) x must be -inf too. Where e is NaN or infinite because the stage's inputs are, nothing is
    asked of x: that is the fault of an earlier stage.
    """
    x, e = np.atleast_1d(x).astype(np.float64), np.atleast_1d(e).astype(np.float64)
    masked, unknown = np.isneginf(e), ~np.isfinite(e) & ~np.isneginf(e)
    x = np.where(unknown, 0, np.where(masked, np.where(np.isneginf(x), 0, np.inf), x))
    e = np.where(unknown | masked, 0, e)
    with np.errstate(invalid="ignore"):
        distance, size = np.linalg.norm(x - e, axis=-1), np.linalg.norm(e, axis=-1)
    distance = np.where(np.isfinite(distance), distance, np.inf)
    return distance / np.maximum(np.maximum(size, 1e-3 * size.max(initial=0)), np.finfo(np.float64).tiny)


def worst(x: Array, e: Array) -> float:
    """The largest row error."""
    return float(row_errors(x, e).max(initial=0))


def allowed(stage: str, dtype: str, family: float) -> float:
    """The limit for a tap stored in `dtype` whose worst twin errs by `family`."""
    extra, _ = EXTRA.get(stage, (1.0, ""))
    return max(FACTOR * family, ROUNDINGS * UNIT.get(dtype, 0.0)) * extra


def reason(stage: str, family: float) -> str:
    """The same in words, for the report."""
    _, why = EXTRA.get(stage, (1.0, ""))
    return f"max({FACTOR:g} x worst of {TWINS} twins {family:.1e}, {ROUNDINGS:g} roundings) {why}".rstrip()
