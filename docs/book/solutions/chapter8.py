"""Chapter 8: one way to do it."""

import math

import numpy as np


def clip(grads, max_norm):
    """One norm, one factor."""
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    factor = min(1.0, max_norm / (norm + 1e-6))
    return {n: g * np.asarray(factor, g.dtype) for n, g in grads.items()}, norm


def adamw(w, g, m, v, t, *, lr, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1):
    """Means, corrections, a step; the decay is the weight's own and meets no denominator."""
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
    ratio = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    return w * (1 - lr * decay) - lr * ratio, m, v


def learning_rate(token):
    """Three levels and a half wave between the first two."""
    if token < 10e12:
        return 2.2e-4
    if token < 14.3e12:
        gone = (token - 10e12) / 4.3e12
        return 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + math.cos(math.pi * gone)) / 2
    return 2.2e-5 if token < 14.633e12 else 7.3e-6
