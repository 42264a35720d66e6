"""Chapter 14: one way to do it."""

import math

import numpy as np

U = 2.0**-24


def worst_row(x, e):
    """Norms of rows; the floor keeps a row of zeros from asking for zeros."""
    far, size = (np.linalg.norm(np.asarray(a, np.float64), axis=-1) for a in (np.subtract(x, e, dtype=np.float64), e))
    worst = np.max(far / np.maximum(size, max(1e-3 * size.max(), np.finfo(np.float64).tiny)))
    return math.inf if np.isnan(worst) else float(worst)


def allowed(stage, inputs, twins, seed):
    """Draw correct programs and see how far they come."""
    rng = np.random.default_rng(seed)
    exact = stage(*[a.astype(np.float64) for a in inputs])

    def moved(a):
        return (a * (1 + U * rng.uniform(-1, 1, a.shape))).astype(np.float32)

    return max(4 * max(worst_row(stage(*map(moved, inputs)), exact) for _ in range(twins)), 4 * U)


def culprits(program, taps):
    """Every stage alone, on what was recorded."""
    found = []
    for tap, stage, names in program:
        inputs = [taps[n] for n in names]
        exact = stage(*[a.astype(np.float64) for a in inputs])
        if worst_row(taps[tap], exact) > allowed(stage, inputs, 4, 0):
            found.append(tap)
    return found
