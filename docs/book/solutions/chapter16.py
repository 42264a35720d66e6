"""Chapter 16: one way to do it."""

import math

import numpy as np


def top_k(scores, k):
    """Python's sort is stable."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def softmax_scale(head_dim, factor, mscale_all_dim, longest, original, applies):
    """Query and key are both scaled, so squared."""
    on = applies == "configured" or longest > original
    m = 0.1 * mscale_all_dim * math.log(factor) + 1 if on and factor > 1 else 1.0
    return head_dim**-0.5 * m * m


def hidden_first(w):
    """Columns follow their inputs."""
    return np.roll(w, w.shape[1] // 2, axis=1)
