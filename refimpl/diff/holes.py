"""What a recorded NaN or infinity spoils: what depends on it by the mathematics, and nothing else.

Floating point says 0 x NaN = NaN, so a NaN at one token would make everything before it NaN as well: a masked key has weight 0,
but its value is multiplied. The mathematics says that those numbers do not depend on it. Nothing is derived stage by stage: the
stage is run with two different numbers in the hole's place, and where both runs agree to the bit, the hole does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

_MASKED = ("mask", "mla.scores", "router.choice")
"""Taps in which -inf is a number like any other."""
UNKNOWN = "what it is computed from was not recorded or is not finite: nothing to compare with"


def torn(names: Any, values: Any) -> bool:
    """Whether a recorded or computed argument holds what is no number; weights are not looked at."""
    if isinstance(names, tuple | list):
        return any(torn(n, v) for n, v in zip(names, values, strict=True))
    return isinstance(names, str) and not names.startswith("w/") and _has_holes(names, values)


def _has_holes(name: str, a: Any) -> bool:
    if not isinstance(a, np.ndarray) or a.dtype.kind != "f" or np.isfinite(total := a.sum()):
        return False
    if np.isneginf(total) and name.rpartition("/")[2] in _MASKED:  # NaN or infinity among them would have made it NaN
        return False
    return bool(_holes(name, a).any())


def _holes(name: str, a: Array) -> Any:
    holes = ~np.isfinite(a)
    return holes & ~np.isneginf(a) if name.rpartition("/")[2] in _MASKED else holes


def mended(run: Callable[[Sequence[Any]], Array], names: Sequence[Any], values: Sequence[Any]) -> Array:
    """The stage's output, NaN where it depends on a hole."""
    first, second = (run(_filled(names, values, seed)) for seed in (1, 2))
    if first.dtype.kind in "iub" or first.shape != second.shape:
        return first
    return np.where(first == second, first, np.nan)


def _filled(names: Any, values: Any, seed: int) -> Any:
    """The arguments with numbers as large as the others in the holes."""
    if isinstance(names, tuple | list):
        return tuple([_filled(n, v, seed) for n, v in zip(names, values, strict=True)])
    if not torn(names, values):
        return values
    holes, rng = _holes(names, values), np.random.default_rng(seed)
    whole = np.where(holes | np.isneginf(values), 0, values)
    size = float(np.sqrt(np.mean(np.square(whole, dtype=np.float64)))) or 1.0
    numbers = size * rng.choice([-1.0, 1.0], values.shape) * rng.uniform(0.5, 1.5, values.shape)
    return np.where(holes, numbers, values).astype(values.dtype)


def excused(x: Array, e: Array, naive: Array | None) -> Array:
    """e, NaN where floating point makes NaN of it as the candidate does, though the mathematics does not: not the stage's fault."""
    if naive is None:
        return e
    return np.where(~np.isfinite(naive) & (naive != e) & ~np.isfinite(x), np.nan, e)
