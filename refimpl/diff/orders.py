"""Sums in another order than ours, which the last of the twins makes: what a plain loop gives.

A product of matrices cancels, and any order of its sums errs about as much. A sum of squares does not: each partial sum is rounded,
and those of numbers with few bits mostly one way. Summed one after the other in float32, the norms of rows of bfloat16
numbers are too large by 1 unit of roundoff at 48 channels, 10 at 512, and 50 at 7,168 (measured on random rows): a correct
port that does so leans, and only a twin that does so can tell.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.autograd.tensor import Array


def in_turn(x: Array, w: Array, *, eps: float) -> Array:
    """RMSNorm of the first channels of x (..., D') by a weight w (D,), the squares summed one after the other.  -> (..., D)."""
    x = x[..., : len(w)]
    squares = np.add.accumulate(x * x, axis=-1)[..., -1:]
    y: Array = x * (1 / np.sqrt(squares / x.dtype.type(len(w)) + x.dtype.type(eps))) * w
    return y


ORDERS: dict[str, Callable[..., Array]] = dict.fromkeys(
    ("attn_norm", "ffn_norm", "final_norm", "mla.q_a_norm", "mla.c_kv", "mtp.hnorm", "mtp.enorm", "mtp.norm"), in_turn
)
"""Stage -> the same in another order."""
