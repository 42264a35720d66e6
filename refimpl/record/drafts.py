"""A case that is being made: what a regime may change before it is written, and what its tokens are chosen for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

CANDIDATES = 32
"""Tokens among which each one is chosen."""


@dataclass(frozen=True)
class Goal:
    """`reach`: a token's gaps (N, decisions), the scores by which its routing decisions are won -> (N,), how well it would do; the
    best is taken, and must reach `least` (None: the margin that was asked for). `name`, for the message; `among` so many tokens.
    """

    name: str
    reach: Callable[[Array], Array]
    least: float | None = None
    among: int = CANDIDATES


def _closest(gaps: Array) -> Array:
    least: Array = gaps.min(axis=-1, initial=np.inf)
    return least


WON = Goal("margin", _closest)
"""Every decision is won clearly."""
NEAR = (1e-5, 1e-3, 5e-3)
"""A near tie: more than float32 can turn (scores of size 1 move by 1e-6); about what rounding a bias to bfloat16 does; at most."""


def _near(gaps: Array) -> Array:
    """Any near tie is as good as another, so that tokens stay various."""
    closest = _closest(gaps)
    return np.where(closest < NEAR[0], -np.inf, -np.maximum(closest, NEAR[1]))


NEARLY_TIED = Goal("near tie", _near, -NEAR[2], among=128)
"""The closest decision is a near tie."""
TIED = 1e-6
"""A gap below this is a tie of equal experts: two columns of one float32 product may differ in the last place."""


def _beside_ties(gaps: Array) -> Array:
    """Beyond 0.1, what is usual, any margin is as good as another."""
    tied = gaps < TIED
    return np.where(tied.any(axis=-1), np.minimum(_closest(np.where(tied, np.inf, gaps)), 0.1), -np.inf)


BESIDE_TIES = Goal("margin beside a tie", _beside_ties, among=128)
"""At least one decision is an exact tie, all others are won clearly."""


@dataclass
class Draft:
    """A case to be written. `weights` by checkpoint name (FP8 codes have their `_scale_inv` beside them), to be changed in place;
    positions and valid (B, S) or None; `goal`, what tokens are chosen for; `kinds` of tokens, which alternate: token id and
    place in the sequence agree modulo `kinds`; `ids`, those to choose from (None: any); `written`, keys of config.json that are
    not as the config itself writes them.
    """

    config: Config
    weights: dict[str, Array]
    rng: np.random.Generator
    batch: int
    length: int
    positions: Array | None = None
    valid: Array | None = None
    goal: Goal = WON
    kinds: int = 1
    ids: Array | None = None
    written: dict[str, Any] = field(default_factory=dict)
