"""The taps of several ranks as one mapping: parts side by side, or summed, and what does not fit together."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.parallel_emulation.collectives.collectives import in_order

from .header import Header
from .marks import NONE, Marks

T = TypeVar("T")
_WHOLE = "on ranks meant to hold the same; if they hold parts of it, its dims must say so"


@dataclass(frozen=True)
class Rank:
    """One file: its rank's number, coordinate by axis, header, taps on disk."""

    path: Path
    number: int
    at: Mapping[str, int]
    header: Header
    taps: Mapping[str, Array]


class Shards(Mapping[str, Array]):
    """Tap -> the array that the ranks hold together, put together when asked for and kept.

    `wrong`: tap -> why its parts do not fit together; `missing`: tap -> which part nobody recorded. Neither is among the taps.
    """

    def __init__(self, ranks: Sequence[Rank], sizes: Mapping[str, int], marks: Mapping[str, Marks]) -> None:
        self.ranks, self.sizes = ranks, sizes
        self.wrong: dict[str, str] = {}
        self.missing = {t: f"meant for {r.path.name}, which lacks it" for r in ranks for t in _lacking(r)}
        self._marks, self._made = marks, dict[str, Array]()
        self._taps = {t: None for t in dict.fromkeys(t for r in ranks for t in r.taps) if self._fits(t)}

    def __getitem__(self, tap: str) -> Array:
        if tap not in self._made:
            if tap not in self._taps:
                raise KeyError(tap)
            self._made[tap] = self._fold(tap, lambda same: np.asarray(same[0].taps[tap]), _put)
        return self._made[tap]

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __contains__(self, tap: object) -> bool:
        return tap in self._taps

    def __len__(self) -> int:
        return len(self._taps)

    def replicas(self, tap: str) -> Iterator[list[Rank]]:
        """The ranks that were meant to hold the same, where there are several, lowest first."""
        names = self.marks(tap).names
        groups: dict[tuple[int, ...], list[Rank]] = {}
        for r in self._holders(tap):
            groups.setdefault(tuple([r.at[a] for a in names]), []).append(r)
        yield from (g for g in groups.values() if len(g) > 1)

    def marks(self, tap: str) -> Marks:
        """How the ranks' arrays of a tap make one."""
        return self._marks.get(tap, NONE)

    def _holders(self, tap: str) -> list[Rank]:
        return [r for r in self.ranks if tap in r.taps]

    def _fold(self, tap: str, leaf: Callable[[list[Rank]], T], join: Callable[[list[T], int | None], T]) -> T:
        """leaf of the ranks that hold the same, joined axis by axis, the innermost first, in the order of coordinates."""

        def fold(along: Sequence[tuple[str, int | None]], ranks: list[Rank]) -> T:
            if not along:
                return leaf(ranks)
            (axis, place), rest = along[0], along[1:]
            return join([fold(rest, [r for r in ranks if r.at[axis] == i]) for i in range(self.sizes[axis])], place)

        return fold(self.marks(tap).along, self._holders(tap))

    def _fits(self, tap: str) -> bool:
        """Whether every part was recorded and they fit together, by their shapes alone."""
        marks, held = self.marks(tap), self._holders(tap)
        if gap := self._gap(marks, held):
            self.missing[tap] = gap
            return False
        try:
            kinds = {str(r.taps[tap].dtype) for r in held}
            require(len(kinds) == 1, f"dtypes {' and '.join(sorted(kinds))}")
            if any(place is not None for _, place in marks.along):
                for r in held:
                    told = f"dims {marks.dims!r} are {marks.axes} axes, merged ones being in brackets"
                    require(r.taps[tap].ndim == marks.axes, f"{r.path.name} holds shape {r.taps[tap].shape}; {told}")
            self._fold(tap, lambda same: _alike([r.taps[tap].shape for r in same], _WHOLE), _joined)
        except SpecError as error:
            self.wrong[tap] = str(error)
            return False
        return True

    def _gap(self, marks: Marks, held: list[Rank]) -> str:
        """The first part of a tap that no rank holds, "" if there is none."""
        there = {tuple([r.at[a] for a in marks.names]) for r in held}
        every = itertools.product(*[range(self.sizes[a]) for a in marks.names])
        lost = next((at for at in every if at not in there), None)
        return (
            f"no rank at {place_of(dict(zip(marks.names, lost, strict=True)))} recorded it" if lost is not None else ""
        )


# ---- Putting together


def _put(parts: list[Array], place: int | None) -> Array:
    """Side by side along an axis, or their sum in rank order."""
    return in_order(parts) if place is None else np.concatenate(parts, axis=place)


def _joined(shapes: list[tuple[int, ...]], place: int | None) -> tuple[int, ...]:
    """The shape of what `_put` makes."""
    if place is None:
        return _alike(shapes, "to be summed")
    rest = {s[:place] + s[place + 1 :] for s in shapes}
    require(len(rest) == 1, f"shapes {_listed(shapes)} do not fit together along axis {place}")
    return (*shapes[0][:place], sum([s[place] for s in shapes]), *shapes[0][place + 1 :])


def _alike(shapes: list[tuple[int, ...]], what: str) -> tuple[int, ...]:
    require(len(set(shapes)) == 1, f"shapes {_listed(shapes)} {what}")
    return shapes[0]


def _listed(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(map(str, dict.fromkeys(shapes)))


def _lacking(r: Rank) -> list[str]:
    return [t for t in r.header.expected if t not in r.taps]


def place_of(coordinates: Mapping[str, int]) -> str:
    """Where a rank is, in words: `tp 0, dp 1`."""
    return ", ".join(f"{axis} {i}" for axis, i in coordinates.items())
