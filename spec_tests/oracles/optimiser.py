"""The oracle's optimiser: AdamW and gradient clipping, one scalar at a time (torch.optim.AdamW's
order of operations).
"""

import math

import numpy as np


def clip(gradients, limit):
    """(gradients times min(1, limit / (norm + 1e-6)), norm), the norm over all, as in torch."""
    norm = math.sqrt(math.fsum(float(g) ** 2 for grad in gradients.values() for g in np.ravel(grad)))
    factor = min(1.0, limit / (norm + 1e-6))
    return {name: np.asarray(grad, np.float64) * factor for name, grad in gradients.items()}, norm


def adamw(weight, gradient, first, second, step, *, lr, betas=(0.9, 0.95), eps=1e-8, decay=0.1):
    """(weight, first, second) after step `step` (from 1): decay, moments, corrected update."""
    results = ([], [], [])
    for w, g, m, v in zip(*(np.ravel(a).tolist() for a in (weight, gradient, first, second)), strict=True):
        w -= lr * decay * w
        m = betas[0] * m + (1.0 - betas[0]) * g
        v = betas[1] * v + (1.0 - betas[1]) * g * g
        m_hat, v_hat = m / (1.0 - betas[0] ** step), v / (1.0 - betas[1] ** step)
        w -= lr * m_hat / (math.sqrt(v_hat) + eps)
        for result, value in zip(results, (w, m, v), strict=True):
            result.append(value)
    return tuple(np.array(result).reshape(np.shape(weight)) for result in results)
