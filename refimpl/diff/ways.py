"""The ways in which a recorded array may hold a tap, by its shape alone: axes in another order, neighbours merged, more or fewer
entries than ours, and several of these at once. The fewer steps, the likelier; of several that are, values tell (`nearest`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import permutations
from math import isqrt, prod

import numpy as np

from refimpl.autograd.tensor import Array

Pick = Mapping[int, slice | list[int]]
"""Axis -> which of its entries; axes that are whole are left out."""
FILLED_UP = "tokens are flattened and padded"
PADDED = "padded along S"
FLAT = "tokens are flattened to (N, ...): declare dims with N for B S"
_GUESSED = 4
_TOKENS = ("B", "S", "T")
_MOST = 8
"""How many ways are looked at."""


@dataclass(frozen=True)
class Way:
    """Our axes (of N flattened tokens for B S if `flat`) and lengths, those axes in their order, the lengths that they have there;
    which of them are merged with neighbours; how many steps that is.
    """

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    order: tuple[int, ...]
    lengths: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    full: tuple[int, ...]
    """Our shape, in which the array is wanted."""
    plain: bool = False
    """Whether the array has these lengths as they are, those of 1 too."""
    moved: bool = False
    """Whether it has as many axes, and one of length 1 in another place."""
    declared: bool = False
    """Whether the order is the candidate's own word."""
    part: Mapping[int, list[int]] = field(default_factory=dict, compare=False)
    """Of which entries `shape` is, where it says that it recorded some."""

    @property
    def flat(self) -> bool:
        """Whether rows of no token lie behind all tokens."""
        return len(self.shape) < len(self.full)

    @property
    def long(self) -> list[int]:
        """Axes longer than 1, in their order."""
        return [i for i in self.order if self.lengths[i] != 1]

    @property
    def turned(self) -> bool:
        """Whether axes lie in another order; where one of length 1 lies is nothing."""
        return self.long != sorted(self.long)

    @property
    def changed(self) -> dict[int, int]:
        """Axes that have another length than ours, and which."""
        return {i: n for i, n in enumerate(self.lengths) if n != self.shape[i]}

    @property
    def flattened(self) -> bool:
        """Whether tokens are merged to N."""
        return any({self.axes[i] for i in g} >= {"B", "S"} for g in self.groups)

    @property
    def steps(self) -> int:
        """How many mistakes of a recorder it takes; a sequence alone that is cut or longer too is less likely than two others."""
        merged = [(g, {self.axes[i] for i in g} & {*_TOKENS}) for g in self.groups if len(g) > 1]
        tokens = any(len(few) == len(g) for g, few in merged)
        mixed = max([self._mixed(g, bool(few)) for g, few in merged if len(few) < len(g)], default=0)
        letters = {self.axes[i] for i in self.changed}
        kinds = len({"S" if a == "T" else a for a in letters}) + 2 * (letters >= {"B", "S"} and not self.plain)
        return self.flat + (self.turned and not self.declared) + kinds + tokens + mixed

    def _mixed(self, group: tuple[int, ...], tokens: bool) -> int:
        """How unlikely it is that features are merged, with `tokens` or out of their order."""
        return (4 if tokens else 1 + (list(group) != sorted(group))) if self.turned else 1

    @property
    def guessed(self) -> bool:
        """Whether values must be near ours for it to be believed: features may be as many as tokens, and lie in their place."""
        return self.steps >= _GUESSED or (bool(self.changed) and (self.moved or (self.turned and not self.declared)))

    @property
    def key(self) -> tuple[object, ...]:
        """What other taps of the same recorder share: what became of sequences and tokens."""
        names = ["S" if a == "T" and "S" not in self.axes else a for a in self.axes]
        there = [names[i] for i in self.order if self.lengths[i] != 1 and names[i] in ("B", "S")]
        return self.flat, tuple(there), tuple([(names[i], n) for i, n in self.changed.items() if names[i] != "V"])

    @property
    def pick(self) -> Pick:
        """Which part of ours it is."""
        return {**self.part, **self._few}

    @property
    def _few(self) -> dict[int, slice]:
        few = {i: n for i, n in self.changed.items() if n < self.shape[i]}
        return {i: slice(-1, None) if (self.axes[i], n) == ("S", 1) else slice(0, n) for i, n in few.items()}

    def of(self, x: Array) -> Array:
        """An array that lies so, in our axes."""
        y = x.reshape([self.lengths[i] for i in self.order]).transpose(np.argsort(self.order))
        y = y[tuple([slice(0, n) for n in self.shape])]
        return y.reshape(self.full) if self.flat else y

    @property
    def note(self) -> str:
        """What is done, and what to declare."""
        return "; ".join(self._told()) or self._merged()

    def _told(self) -> Iterator[str]:
        more = [self.axes[i] for i, n in self.changed.items() if n > self.shape[i]]
        if self.flat:
            n = self.shape[self.axes.index("N")]
            yield f"{FILLED_UP} to {self.lengths[self.axes.index('N')]}: cut to the first {n}"
            more = [a for a in more if a != "N"]
        if more:
            long = {a: self.lengths[i] for i, a in enumerate(self.axes) if a in more}
            left = [str(self.shape[self.axes.index(a)]) for a in sorted(long)]
            yield f"padded along {' and '.join([f'{a} to {long[a]}' for a in sorted(long)])}: cut to {' and '.join(left)}"
        if (few := self._few) and any(s == slice(-1, None) for s in few.values()):
            few = {i: s for i, s in few.items() if s != slice(-1, None)}
            yield "only the last position was recorded: compared there"
        if few:
            yield self._first(list(few))
        if self.declared:
            return
        if self.turned:
            named = " ".join([self.axes[i] for i in self.order])
            yield f'axes are {named}: declare dims "{named}"'
        elif self.changed and self.flattened:
            yield FLAT

    def _first(self, few: list[int]) -> str:
        """Fewer than there are: no one says which, and the first are the likeliest."""
        what = {"B": "sequences"}
        told = [f"{self.lengths[i]} of {self.shape[i]} {what.get(self.axes[i], 'tokens')}" for i in few]
        more = ": declare slices" if all(self.axes[i] != "B" for i in few) else ""  # which know of tokens
        return f"{' and '.join(told)}, taken for the first{more}"

    def _merged(self) -> str:
        if all(len(g) == 1 for g in self.groups):
            return ""
        if self.axes[:2] == ("B", "S") and self.groups[0] == (0, 1):
            return FLAT
        theirs = [prod([self.lengths[i] for i in g]) for g in self.groups]
        return f"axes are merged to {'x'.join(map(str, theirs))}, ours are {'x'.join(map(str, self.shape))}"


def ways(given: tuple[int, ...], shape: tuple[int, ...], axes: Sequence[str]) -> list[Way]:
    """How an array of a given shape may hold a tap, the likeliest first, without those that take more than two steps more."""
    return list(_found(given, shape, tuple(axes)))


@lru_cache(maxsize=1024)
def _found(given: tuple[int, ...], shape: tuple[int, ...], axes: tuple[str, ...]) -> list[Way]:
    long, found = tuple([n for n in given if n != 1]), dict[object, Way]()
    for names, sizes in _systems(axes, shape):
        if 0 in given or 0 in sizes:
            continue
        for order in permutations(range(len(sizes))):
            for lengths, groups in _fitted(long, [(i, names[i], sizes[i]) for i in order]):
                theirs = tuple([lengths[i] for i in range(len(sizes))])
                plain = given == tuple([theirs[i] for i in order])
                moved = len(given) == len(names) and not plain
                way = Way(names, sizes, order, theirs, groups, shape, plain, moved)
                if names == axes or way.lengths[names.index("N")] > way.shape[names.index("N")]:
                    found.setdefault((names, theirs, tuple([i for i in order if theirs[i] != 1])), way)
    likely = sorted(found.values(), key=lambda way: way.steps)
    return [way for way in likely if way.steps <= likely[0].steps + 2][:_MOST]


def _systems(axes: tuple[str, ...], shape: tuple[int, ...]) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Our axes with tokens flattened, of which there may be more rows than tokens; and as they are."""
    at = next((i for i in range(len(axes) - 1) if axes[i] == "B" and axes[i + 1] in ("S", "T")), None)
    if at is not None and "N" not in axes:
        yield (*axes[:at], "N", *axes[at + 2 :]), (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
    yield axes, shape


Fitted = tuple[dict[int, int], tuple[tuple[int, ...], ...]]


def _fitted(
    given: tuple[int, ...],
    axes: Sequence[tuple[int, str, int]],
    left: int = 1,
    mates: tuple[tuple[str, bool], ...] = (),
) -> Iterator[Fitted]:
    """Lengths of these axes, in their order, and which are merged, with which an array has the given lengths (none 1); `left` is
    what of one of them is not split yet, `mates` what it was split into: letters, and whether their length is ours.
    """
    if not axes:
        if not given and left == 1:
            yield {}, ()
        return
    (i, letter, size), open_ = axes[0], left > 1
    whole = left if open_ else given[0] if given else 1
    for n in _lengths(letter, size, whole):
        if n == 1:
            yield from (({i: 1} | lengths, groups) for lengths, groups in _fitted(given, axes[1:], left, mates))
        elif whole % n == 0:
            together = (*(mates if open_ else ()), (letter, n == size))
            if len(together) > 1 and not all(same for _, same in together) and {a for a, _ in together} - {*_TOKENS}:
                continue
            rest = given if open_ else given[1:]
            for lengths, groups in _fitted(rest, axes[1:], whole // n, together):
                yield {i: n} | lengths, _with(i, groups, whole > n)


def _with(i: int, groups: tuple[tuple[int, ...], ...], merged: bool) -> tuple[tuple[int, ...], ...]:
    """The groups behind an axis, with it in the first of them or before."""
    return ((i, *groups[0]), *groups[1:]) if merged and groups else ((i,), *groups)


def _lengths(letter: str, size: int, whole: int) -> list[int]:
    """What an axis may be long, ours first: sequences fewer, tokens fewer or more, of a vocabulary and of flattened tokens more."""
    other: Iterable[int] = {
        "B": range(1, size),
        "S": _divisors(whole),
        "T": _divisors(whole)[1:],
        "V": [whole] if whole > size else [],
        "N": [whole] if whole > size else [],
    }.get(letter, [])
    return [size, *[n for n in other if n != size]]


@lru_cache(maxsize=256)
def _divisors(n: int) -> list[int]:
    """From 1 on."""
    low = [i for i in range(1, isqrt(n) + 1) if n % i == 0]
    return sorted({*low, *[n // i for i in low]})
