"""Chapter 8, a training step: three exercises. `pytest docs/book -k chapter8` says how far you are."""


def clip(grads, max_norm):
    """(clipped, norm): all gradients times min(1, max_norm / (norm + 1e-6)). grads {name: array} -> {name: array}, float.

    norm is that of all gradients as one vector, before clipping; sum it in float64.
    """
    raise NotImplementedError("exercise 8.1")


def adamw(w, g, m, v, t, *, lr, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1):
    """(w, m, v) after step t, which counts from 1. Arrays of one shape; m and v are the means before the step, 0 at first."""
    raise NotImplementedError("exercise 8.2")


def learning_rate(token):
    """V3's learning rate behind the warm-up, when `token` tokens are consumed (28.1e9 <= token < 14.8e12).

    Constant 2.2e-4 until 10 T tokens; to 2.2e-5 in 4.3 T tokens, on a cosine curve; of the last 500 B, 2.2e-5 for the first
    333 B and 7.3e-6 for the rest.
    """
    raise NotImplementedError("exercise 8.3")
