"""Sums in another order than ours, which the last of the twins makes: what a plain loop gives.

A product of matrices cancels, and any order of its sums errs about as much. A sum of squares does not: each partial sum is rounded,
and those of numbers with few bits mostly one way. Summed one after the other in float32, the norms of rows of bfloat16
numbers are too large by 1 unit of roundoff at 48 channels, 10 at 512, and 50 at 7,168 (measured on random rows): a correct
port that does so leans, and only a twin that does so can tell.

The norm of all gradients is one such sum, of millions: what is below half a unit in the last place of the partial sum is lost. Of
log-normal gradients it is 500 u short at 1e5 numbers, 12,600 u at 1e6 and 160,000 u (1 %) at 1e7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from refimpl.autograd.tensor import Array

from .tolerance import FACTOR


def in_turn(x: Array, w: Array, *, eps: float) -> Array:
    """RMSNorm of the first channels of x (..., D') by a weight w (D,), the squares summed one after the other.  -> (..., D)."""
    x = x[..., : len(w)]
    squares = np.add.accumulate(x * x, axis=-1)[..., -1:]
    y: Array = x * (1 / np.sqrt(squares / x.dtype.type(len(w)) + x.dtype.type(eps))) * w
    return y


LOSSES = 2.0
"""How often the loss of a loop is allowed: in another order of the tensors it is another, but no draw of chance."""
TOO_SHORT = 2.0**-8
"""Of a norm: a loop that loses more than bfloat16 can show is a mistake, which the corpus has (O06d)."""


def norm_in_turn(*grads: Array) -> Array:
    """The norm of all gradients, as far off as half a limit of a loop over them.  N times grad (*) -> ().

    A limit is FACTOR times a twin's distance. It should be LOSSES times the larger loss of two loops, tensors first to last and
    last to first, and FACTOR standard errors. Each of n additions rounds a partial sum, at most S, with a standard error of
    at most u S / 2, so their sum's is u sqrt(n) S / 2, and its root's half of that. No loop is allowed more than TOO_SHORT.
    """
    u = float(np.finfo(grads[0].dtype).eps) / 2
    exact = np.sqrt(sum(float(np.vdot(g := grad.astype(np.float64), g)) for grad in grads))
    loops = [_loop(order) - exact for order in (grads, grads[::-1])]
    loss = max(loops, key=abs)
    walk = u * sum(g.size for g in grads) ** 0.5 / 4 * exact
    away = min(abs(loss) * LOSSES / FACTOR + walk, TOO_SHORT / FACTOR * exact)
    return np.asarray(exact - away if loss < 0 else exact + away)


def _loop(grads: Iterable[Array]) -> float:
    """The norm of one loop through all numbers, with one sum in their dtype."""
    total = np.zeros(1)
    for g in grads:
        squares = np.square(g, dtype=g.dtype).ravel()
        total = np.add.accumulate(np.concatenate([total.astype(g.dtype), squares]))[-1:]
    return float(np.sqrt(total[0]))


_NORMS = ("attn_norm", "ffn_norm", "final_norm", "mla.q_a_norm", "mla.c_kv", "mtp.hnorm", "mtp.enorm", "mtp.norm")
ORDERS: dict[str, Callable[..., Array]] = dict.fromkeys(_NORMS, in_turn) | {"optim.grad_norm": norm_in_turn}
"""Stage -> the same in another order."""
