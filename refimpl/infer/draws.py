"""Where chance enters: a draw takes a distribution and gives a token. All randomness of generation goes through one of these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from refimpl.autograd.tensor import Array

Draw: TypeAlias = Callable[[Array], int]
"""p (V,) -> an index with probability p_i. Called once per decision, so that a list of indices can replay a run and a tree
of them enumerates all runs."""


def inverse(p: Array, u: float) -> int:
    """The first i whose p_0 + ... + p_i exceeds u.  p (V,), u uniform in [0, 1)."""
    total = np.cumsum(p)
    return int(np.searchsorted(total, u * total[-1], side="right"))  # u < 1, so the product is less than total[-1]


def race(p: Array, e: Array) -> int:
    """argmax p_i / e_i: the first to arrive of exponential clocks of rate p_i.  p (V,), e (V,) standard exponential.

    DeepSeek's inference/generate.py `sample` draws like this, and so does torch.multinomial for one sample.
    """
    return int(np.argmax(p / np.where(e > 0, e, np.finfo(np.float64).tiny)))


def by_inverse(rng: Any) -> Draw:
    """Draws by `inverse`, one uniform number each, from a generator (`rng.random()`)."""
    return lambda p: inverse(p, float(rng.random()))


def by_race(rng: Any) -> Draw:
    """Draws by `race`, V exponential numbers each, from a generator (`rng.standard_exponential(V)`)."""
    return lambda p: race(p, np.asarray(rng.standard_exponential(len(p))))


def seeded(seed: int) -> Draw:
    """Draws by `inverse` from numpy's default generator of this seed."""
    return by_inverse(np.random.default_rng(seed))


def chance(draw: Draw, probability: float) -> bool:
    """True with this probability."""
    return draw(np.array([1 - probability, probability])) == 1
