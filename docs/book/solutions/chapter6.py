"""Chapter 6: one way to do it."""

import numpy as np


def targets(tokens, k):
    """The last k + 1 positions have none."""
    n = max(len(tokens) - k - 1, 0)
    return list(tokens[k : k + n]), list(tokens[k + 1 : k + 1 + n])


def step_distribution(p, q):
    """q(x) min(1, p/q) is min(p, q); the rest of p is what p has more."""
    stood = np.minimum(p, q)
    left = np.maximum(p - q, 0)
    again = left / left.sum() if left.any() else left
    return stood + (1 - stood.sum()) * again, float(stood.sum())


def tokens_a_run(chances):
    """One token for sure, and one for each draft that is reached and stands."""
    total, reached = 1.0, 1.0
    for a in chances:
        reached *= a
        total += reached
    return total
