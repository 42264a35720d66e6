"""Continual updates with replay (Rolnick et al. 2018, arXiv 1811.11682): part of every batch is old data, so that new data does not
overwrite what was learned. Described in articles, not in V3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from refimpl.autograd.errors import require

T = TypeVar("T")


class Reservoir(Generic[T]):
    """At most `capacity` of the items seen, each with the same probability (Vitter 1985, algorithm R). `rng`: NumPy's."""

    def __init__(self, capacity: int, rng: Any) -> None:
        require(capacity >= 1, f"capacity is {capacity}; at least 1")
        self.capacity, self.items, self.seen = capacity, list[T](), 0
        self._rng = rng

    def add(self, item: T) -> None:
        """See one more item: it is kept with probability capacity / seen, in a random one's place."""
        self.seen += 1
        if len(self.items) < self.capacity:
            self.items.append(item)
        elif (place := int(self._rng.integers(self.seen))) < self.capacity:
            self.items[place] = item

    def draw(self, n: int) -> list[T]:
        """n different items, fewer if fewer are held."""
        chosen = self._rng.permutation(len(self.items))[:n]
        return [self.items[i] for i in chosen]


def mixed(new: Sequence[T], old: Reservoir[T], share: float) -> list[T]:
    """A batch as large as `new` in which round(share x size) items are old ones; the first new ones fill it. While the reservoir
    holds fewer, more are new.
    """
    require(0 <= share <= 1, f"share is {share}; expected 0..1")
    drawn = old.draw(round(share * len(new)))
    return [*new[: len(new) - len(drawn)], *drawn]
