"""A permutation of 0..n-1 computed without a table: position -> sample, in constant memory, the same for the same seed.

A Feistel network permutes the numbers of ceil(log2 n) bits (Luby and Rackoff 1988); what leaves 0..n-1 is permuted again until it
is back inside (cycle walking, Black and Rogaway 2002): the orbit of a number inside must come back inside, so that is a permutation
of 0..n-1. Fewer than half of the numbers lie outside, so fewer than two rounds are needed on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

ROUNDS = 8
"""Even, so that halves of unequal size are back in their places."""


@dataclass(frozen=True)
class Permutation:
    """A permutation of 0..n-1 for each seed: a number, or several, such as (seed, epoch)."""

    n: int
    seed: tuple[int, ...]

    def __post_init__(self) -> None:
        require(1 <= self.n < 2**62, f"{self.n} samples; a permutation is of 1 to 2^62")
        require(all(s >= 0 for s in self.seed), f"seed {self.seed}: expected numbers of at least 0")

    def __call__(self, positions: Any) -> Array:
        """positions (N,) in 0..n-1 -> samples (N,) int64, all different if the positions are."""
        keys = np.random.SeedSequence(self.seed).generate_state(ROUNDS, np.uint64)
        x = self._network(np.array(positions, dtype=np.uint64).reshape(-1), keys)
        outside = np.flatnonzero(x >= self.n)
        while len(outside):
            again = self._network(x[outside], keys)
            x[outside] = again
            outside = outside[again >= self.n]
        return x.astype(np.int64).reshape(np.shape(positions))

    def _network(self, x: Array, keys: Array) -> Array:
        """One pass: (left, right) -> (right, left xor f(right)) for every round; invertible whatever f is."""
        bits = max((self.n - 1).bit_length(), 2)
        sizes = [np.uint64(bits // 2), np.uint64(bits - bits // 2)]  # of left and right; they change places every round
        left, right = x >> sizes[1], x & _mask(sizes[1])
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & _mask(sizes[0]))
            sizes.reverse()
        return (left << sizes[1]) | right


def _mask(bits: Any) -> Any:
    return (np.uint64(1) << bits) - np.uint64(1)


def _mixed(x: Array) -> Array:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014): every bit of x reaches every bit of the result."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
