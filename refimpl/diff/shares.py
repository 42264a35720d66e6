"""softmax(s q k) = 2^(s log2(e) q k) / sum: shares of the factor s, or s log2(e), that a candidate multiplied into q, k or scores.

Each share is a power of the scale times a power of log2 e. What lies in q and in k together has to be a whole factor that is
wanted: never the scale twice, nor a root of it alone. What is left for the scores, and whether softmax is to base 2, the stages
behind them show, which are run on taps without the shares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import log2

import numpy as np

SIDES = {
    **{"mla.q": "q", "mla.q_rope": "q", "mla.k_rope": "k", "cache.k_rope": "k"},
    **{"mla.scores": "scores", "mla.scores_absorbed": "scores"},
}
"""Tap of a layer -> which factor of the product it is, or the product."""


@dataclass(frozen=True)
class Share:
    """What to declare, of which sides, the power of the softmax scale and that of log2 e."""

    what: str
    sides: tuple[str, ...]
    scale: float
    base2: float = 0.0

    def factor(self, scale: float) -> float:
        """What the taps of these sides were multiplied by, the softmax scale being `scale`."""
        return float(scale**self.scale * log2(np.e) ** self.base2)


SCALED_Q = "the softmax scale is multiplied into q"
SCALED_K = "the softmax scale is multiplied into k"
ROOTED = "the root of the softmax scale is multiplied into q and k"
_BASE2 = "the softmax scale times log2 e{} is multiplied into {}, softmax is to base 2"
SHARES = (
    Share(SCALED_Q, ("q",), 1),
    Share(SCALED_K, ("k",), 1),
    Share(ROOTED, ("q", "k"), 0.5),
    Share(_BASE2.format("", "q"), ("q",), 1, 1),
    Share(_BASE2.format("", "k"), ("k",), 1, 1),
    Share(_BASE2.format(" (its root)", "q and k"), ("q", "k"), 0.5, 0.5),
    SCORES_2 := Share("scores are multiplied by log2 e, softmax is to base 2", ("scores",), 0, 1),
    Share("scores are those before the softmax scale, by which softmax multiplies them", ("scores",), -1),
)


def shares_of(tap: str) -> Iterator[Share]:
    """The shares that a tap may have."""
    side = SIDES.get(tap.rpartition("/")[2])
    return (s for s in SHARES if side in s.sides)


def common(accepted: Collection[str]) -> Iterator[Share]:
    """Of what was accepted, the shares that q and k have alike."""
    return (s for s in SHARES if s.what in accepted and s.sides == ("q", "k"))


def base2(accepted: Collection[str]) -> Share | None:
    """The share that scores have if what was accepted of q or k holds log2 e."""
    return SCORES_2 if any(s.base2 and s.what in accepted for s in SHARES) else None


def whole(q: Collection[str], k: Collection[str]) -> bool:
    """Whether what was accepted of q and of k, multiplied, is the scale or nothing, times log2 e or nothing."""
    both = [s for side in (q, k) for s in SHARES if s.what in side]
    return sum(s.scale for s in both) in (0, 1) and sum(s.base2 for s in both) in (0, 1)
