"""Chapter 1, the tape: three exercises. `pytest docs/book -k chapter1` says how far you are."""


def softmax_vjp(y, dy):
    """dx for y = softmax(x) over the last axis. y, dy (*, n) -> (*, n).

    dy_i / dx_j = y_i (1 if i = j else 0) - y_i y_j; do not build that matrix.
    """
    raise NotImplementedError("exercise 1.1")


def rms_norm(x, w, eps):
    """(y, (vjp_x, vjp_w)) with y = w x / sqrt(mean(x^2) + eps) over the last axis. x (N, D), w (D,); vjps take dy (N, D)."""
    raise NotImplementedError("exercise 1.2")


def gradients(y):
    """{node: gradient} of all nodes below y, y included. A node has `value` and `edges`: a list of (parent, vjp).

    The gradient of y itself is 1. A node may be reached by many paths; it is handed on only when all of them are summed.
    """
    raise NotImplementedError("exercise 1.3")
