"""Chapter 1: one way to do it."""

import numpy as np


def softmax_vjp(y, dy):
    """y (dy - <y, dy>)."""
    return y * (dy - (y * dy).sum(axis=-1, keepdims=True))


def rms_norm(x, w, eps):
    """With n = x r and r = 1 / sqrt(mean(x^2) + eps): dn goes back as r (dn - n mean(n dn))."""
    r = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    n = x * r

    def vjp_x(dy):
        dn = dy * w
        return r * (dn - n * (dn * n).mean(axis=-1, keepdims=True))

    return w * n, (vjp_x, lambda dy: (dy * n).sum(axis=0))


def gradients(y):
    """Count how often each node is used; hand one on when that many gradients have arrived (Kahn's order)."""
    uses, stack, seen = {}, [y], {y}
    while stack:
        for parent, _ in stack.pop().edges:
            uses[parent] = uses.get(parent, 0) + 1
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    grads, ready = {y: np.ones_like(y.value)}, [y]
    while ready:
        node = ready.pop()
        for parent, vjp in node.edges:
            g = vjp(grads[node])
            grads[parent] = grads[parent] + g if parent in grads else g
            uses[parent] -= 1
            if uses[parent] == 0:
                ready.append(parent)
    return grads
