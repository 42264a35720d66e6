"""Factors that are constant in blocks along an axis: a scale of 128 channels that was not applied, a factor of every head.

Of an entry c of an axis the tap tells one number, f_c = <x_c, e_c> / <e_c, e_c>, over all other axes. The longest period is said in
whose blocks x = f e holds with one f a block; factors of single channels are said nowhere, since anything fits them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from ..dims import TOKEN_AXES
from .evidence import Evidence, guess

STEP = 6.0
"""Times what entries of a block are from its factor by which two blocks' factors must differ: a slope is no staircase."""
SHOWN = 8
"""Factors that are said."""
EVERY = 512
"""Entries of an axis up to which every period is tried; of more those that divide it, and multiples of 32."""
COUNTS = 1e-3
"""Share of the largest entry's size below which an entry says nothing of its factor."""


@dataclass(frozen=True)
class Axis:
    """What its entries are called, `size` of them, the least period that is said; which axes of the tap they are, and of every
    place there which entry it is.
    """

    what: str
    size: int
    least: int
    places: tuple[int, ...]
    at: Array

    def factors(self, f: Array, ndim: int) -> Array:
        """A factor of every entry as it stands beside the tap.  f (size,)."""
        shape = [1] * ndim
        for axis, n in zip(self.places, self.at.shape, strict=True):
            shape[axis] = n
        return f[self.at].reshape(shape)

    def wholly(self, period: int) -> bool:
        """Whether of every block all entries were recorded, or none."""
        there = np.bincount(self.at.ravel(), minlength=self.size) > 0
        starts = np.arange(0, self.size, period)
        counts, sizes = (np.add.reduceat(a, starts) for a in (there.astype(int), np.ones(self.size, int)))
        return bool(((counts == 0) | (counts == sizes)).all())


@dataclass(frozen=True)
class Sums:
    """Of every entry of an axis <x, x>, <x, e>, <e, e>."""

    xx: Array
    xe: Array
    ee: Array

    def joined(self, period: int) -> Sums:
        """Those of blocks."""
        starts = np.arange(0, len(self.xx), period)
        return Sums(*[np.add.reduceat(a, starts) for a in (self.xx, self.xe, self.ee)])

    @property
    def factors(self) -> Array:
        """One a block; 1 where nothing was recorded."""
        return np.where(self.ee > 0, self.xe / np.where(self.ee > 0, self.ee, 1), 1.0)

    def fit(self, limit: float) -> bool:
        """Whether x is f e in every block, within the limit."""
        f = self.factors
        return bool((self.xx - f * self.xe <= limit**2 * np.maximum(f * f * self.ee, COUNTS * self.xx)).all())


def factors(ev: Evidence) -> Iterator[Mutant]:
    """The output times factors that are constant in blocks along an axis, or another factor of some neighbouring entries."""
    if ev.x.shape != ev.e.shape or ev.e.dtype.kind != "f" or ev.call.of.compare in ("exact", "set"):
        return
    for axis in axes_of(ev):
        sums = sums_of(axis, ev)
        if sums.fit(ev.limit):
            yield from _few(ev, axis, sums)
            period = next((p for p in periods(axis) if axis.wholly(p) and _steps(sums, p, ev)), 0)
            if period:
                yield from _of_blocks(ev, axis, period, sums.joined(period))


def axes_of(ev: Evidence) -> Iterator[Axis]:
    """Heads; channels; all heads' channels; tokens; experts of dispatched rows."""
    letters, shape = ev.letters, ev.e.shape
    at = [_recorded(ev, i) for i in range(len(letters))]
    last = len(letters) - 1
    full = [int(a.max(initial=-1)) + 1 for a in at]
    if "H" in letters and "T" not in letters[-1:]:
        i = letters.index("H")
        yield Axis("heads", ev.config.num_attention_heads, 1, (i,), at[i])
    if last >= 0 and letters[-1] not in ("T", "K", "S"):
        yield Axis("experts" if letters[-1] == "E" else "channels", full[-1], 2, (last,), at[-1])
        if letters[-2:-1] == ["H"]:
            flat = at[-2][:, None] * full[-1] + at[-1]
            yield Axis("channels of all heads", int(flat.max()) + 1, 2, (last - 1, last), flat)
    if letters[:1] == ["M"]:
        ids = [i for i, n in enumerate(ev.call.args) if str(n).endswith("/router.ids")]
        if ids and np.size(ev.args[ids[0]]) == shape[0]:
            yield Axis("experts", ev.config.n_routed_experts, 1, (0,), np.sort(ev.args[ids[0]], axis=None))
    for i in [i for i, letter in enumerate(letters) if letter in TOKEN_AXES][:1]:
        yield Axis("tokens", full[i], 2, (i,), at[i])


def _recorded(ev: Evidence, axis: int) -> Array:
    """Which entries of an axis were recorded."""
    pick = ev.recorded.partial[ev.finding.tap][0] if ev.finding.tap in ev.recorded.partial else {}
    n = ev.e.shape[axis]
    if axis not in pick:
        return np.arange(n)
    some = pick[axis]
    return np.arange(some.stop or n)[some] if isinstance(some, slice) else np.asarray(some)


def sums_of(axis: Axis, ev: Evidence) -> Sums:
    """The sums of every entry, over where both are numbers."""
    both = np.isfinite(ev.x) & np.isfinite(ev.e)
    x, e = (np.where(both, a, 0) for a in (ev.x, ev.e))
    others = tuple([i for i in range(x.ndim) if i not in axis.places])
    each = [(a * b).sum(axis=others).ravel() for a, b in ((x, x), (x, e), (e, e))]
    return Sums(*[np.bincount(axis.at.ravel(), weights=s, minlength=axis.size) for s in each])


def periods(axis: Axis) -> Iterator[int]:
    """Those that are tried, the longest first."""
    n = axis.size
    for p in range(n - 1, axis.least - 1, -1):
        if n <= EVERY or n % p == 0 or p % 32 == 0:
            yield p


def _few(ev: Evidence, axis: Axis, sums: Sums) -> Iterator[Mutant]:
    """Some neighbouring entries, and no others, have a factor, all the same."""
    f, tolerance = sums.factors, ev.limit
    odd = np.flatnonzero((np.abs(f - 1) > tolerance) & (sums.ee > COUNTS * sums.ee.max(initial=0)))
    if not len(odd) or len(odd) == axis.size or len(odd) != odd[-1] - odd[0] + 1:
        return
    k = float(sums.xe[odd].sum() / sums.ee[odd].sum())
    if np.abs(f[odd] - k).max() > tolerance * abs(k):
        return
    they = "they" if len(odd) > 1 else "it"
    said = f"{axis.what} {odd[0]}-{odd[-1]} are" if len(odd) > 1 else f"{axis.what[:-1]} {odd[0]} is"
    for digits in (1, 2, 3, 5, 9):
        v, each = float(f"{k:.{digits - 1}e}"), np.ones(axis.size)
        each[odd] = v
        yield guess(
            f"{ev.call.of.tap}: {said} {v:g} times what {they} should be", ev.call.stage, _times(ev, axis, each)
        )


def _steps(entries: Sums, period: int, ev: Evidence) -> bool:
    """Whether blocks of a period have factors of their own, and these are no slope."""
    blocks = entries.joined(period)
    if not blocks.fit(ev.limit):
        return False
    f, heavy = blocks.factors, entries.ee > COUNTS * entries.ee.max(initial=0)
    each = np.repeat(np.where(f, f, 1), period)[: len(entries.ee)]
    spread = np.abs(entries.factors / each - 1)[heavy]
    return is_staircase(f[blocks.ee > 0], max(STEP * float(spread.max(initial=0)), ev.finding.allowed))


def _of_blocks(ev: Evidence, axis: Axis, period: int, blocks: Sums) -> Iterator[Mutant]:
    f, seen = blocks.factors, blocks.ee > 0
    for digits in (2, 3, 5, 9):
        short = np.array([float(f"{v:.{digits - 1}e}") for v in f])
        each = np.repeat(short, period)[: axis.size]
        title = f"{ev.call.of.tap}: {in_words(axis.what, period, np.where(seen, short, np.nan))}"
        yield guess(title, ev.call.stage, _times(ev, axis, each))


def is_staircase(f: Array, tolerance: float) -> bool:
    """Whether factors of blocks jump, and not to one other value in one place."""
    apart = np.abs(np.diff(f)) > tolerance * np.maximum(np.abs(f[1:]), np.abs(f[:-1]))
    first = np.flatnonzero(np.concatenate([[True], apart]))
    odd = np.abs(f[first] - 1) > tolerance
    return bool(apart.any() and odd.sum() > 1)


def in_words(what: str, period: int, f: Array) -> str:
    """`channels in blocks of 128 are multiplied by factors of their own: 1.7, 0.6, ...`; ? of what was not recorded."""
    more = f" and {len(f) - SHOWN} more" if len(f) > SHOWN else ""
    blocks = f" in blocks of {period}" if period > 1 else ""
    numbers = ", ".join(["?" if np.isnan(v) else f"{v:g}" for v in f[:SHOWN]])
    return f"{what}{blocks} are multiplied by factors of their own: {numbers}{more}"


def _times(ev: Evidence, axis: Axis, f: Array) -> Callable[..., Any]:
    """The stage's output times a factor of every entry; of the whole tap, of which a part may have been recorded."""
    name = ev.call.stage
    if axis.what == "experts" and ev.letters[:1] == ["M"]:
        return lambda *args, **static: STAGES[name].fn(*args, **static) * axis.factors(f, 2)

    def fn(*args: Any, **static: Any) -> Array:
        y = STAGES[name].fn(*args, **static)
        sizes = [y.shape[i] for i in axis.places]
        each = np.ones(int(np.prod(sizes)))
        each[: min(len(f), len(each))] = f[: len(each)]
        shape = [1] * y.ndim
        for i, n in zip(axis.places, sizes, strict=True):
            shape[i] = n
        out: Array = y * each.reshape(shape)
        return out

    return fn
