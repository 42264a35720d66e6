"""The Gumbel-softmax gate that article 2 names (section 1.1) and its code does not hold.

With Gumbel noise the largest of z + n is a draw from softmax(z) (Gumbel 1954); the temperature moves the soft form between that
draw and a uniform one. It balances nothing: expected loads are those of softmax(z), whatever the experts' loads were.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import nn_ops, ops
from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

from .marked import variant
from .top2 import among_best


def gumbel_noise(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = np.float64) -> Array:
    """-ln(-ln u), u uniform, from the generator that is passed in."""
    return rng.gumbel(size=shape).astype(dtype)


@variant(
    "gumbel",
    what="affinities drawn by Gumbel-softmax",
    claims="a2-06",
    source="Jang et al. 2017, eq 2 and section 2.2 (arXiv 1611.01144)",
    shape="B S E",
)
def gumbel(z: Any, noise: Array, *, tau: float, straight_through: bool = False) -> Any:
    """softmax((z + n) / tau); `straight_through`: its largest entry as 1 and the others 0, with the soft form's gradient.
    z (B, S, E), noise (B, S, E) -> (B, S, E).
    """
    require(tau > 0, f"variant.gumbel: tau must be positive, not {tau}")
    soft = nn_ops.softmax((z + noise) / tau)
    return ops.round_through(soft, to=_largest) if straight_through else soft


def _largest(y: Array) -> Array:
    return among_best(y, 1).astype(y.dtype)
