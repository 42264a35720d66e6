"""Gradient checking in one random direction: <dy, J dx> by central difference equals <vjp(dy), dx>."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .tensor import Tensor, backward, data_of


def directional(fn: Callable[..., Any], *args: Any, h: float = 1e-6, seed: int = 0) -> float:
    """Largest relative disagreement, over fn's float64 arguments, of analytic and numeric derivative of <dy, fn(args)>.

    Central differences in float64 with step h err by about h^2 + 1e-16/h, so 1e-7 is a sound limit for smooth
    functions.
    """
    rng = np.random.default_rng(seed)
    y0 = data_of(fn(*args))
    dy = rng.standard_normal(np.shape(y0))
    worst = 0.0
    for i, a in enumerate(args):
        if getattr(a, "dtype", None) != np.float64:
            continue
        dx = rng.standard_normal(a.shape)
        up, down = ([*args[:i], a + s * h * dx, *args[i + 1 :]] for s in (1, -1))
        numeric = float(((data_of(fn(*up)) - data_of(fn(*down))) / (2 * h) * dy).sum())
        leaf = Tensor(a)
        y = fn(*args[:i], leaf, *args[i + 1 :])
        g = backward(y, dy).get(leaf) if isinstance(y, Tensor) else None
        analytic = 0.0 if g is None else float((g * dx).sum())
        scale = max(abs(numeric), abs(analytic), float(np.abs(dy).sum()) * 1e-3, 1e-12)
        worst = max(worst, abs(numeric - analytic) / scale)
    return worst
