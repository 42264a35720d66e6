"""How arrays lie whose shape does not tell: as what is nearest to our own stages on the candidate's other taps, all taps together.

What one recorder does to sequences and tokens it does to all taps: so the first few tell of the others, a mistake in one of them
does not decide, and no more than a few stages are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .fused import ANGLE, replayed, sine
from .gauges import ROPE_TAPS, swap_pairs
from .lanes import Recorded
from .program import integers
from .reading import cut
from .ways import Way

Doubt = Mapping[str, tuple[Array, Sequence[Way]]]
"""Tap -> its array, and the ways in which it may lie."""
_ASKED = 4
"""How many taps with the same ways are looked at."""
_GAUGED = (*ROPE_TAPS, "router.weights")
"""Taps that may be right in another arrangement, so that ours are read instead."""
NEAR = 0.05
"""Ways that differ by no more say the same."""
CLEARLY = 0.9
"""Of the distance in the next best way, no more than this is left in the one that is believed."""


def nearest(doubt: Doubt, program: Sequence[Call], r: Recorded) -> dict[str, Way | None]:
    """How each of these taps lies; None where that is not told."""
    alike: dict[object, list[str]] = {}
    for call in [call for call in program if call.tap in doubt]:
        alike.setdefault(frozenset(way.key for way in doubt[call.tap][1]), []).append(call.tap)
    calls = {call.tap: call for call in program}
    asked = {t for taps in alike.values() for t in [t for t in taps if calls[t].own is None][:_ASKED]}
    away = {t for t in (*r.taps, *r.partial) if t in doubt or t.endswith(_GAUGED)}
    others = replace(
        r,
        taps={t: x for t, x in r.taps.items() if t not in away},
        partial={t: x for t, x in r.partial.items() if t not in away},
    )
    seen = {t: _away(calls[t], *doubt[t], ours) for t, ours in replayed(list(program), others, asked)}
    found: dict[str, Way | None] = {}
    for taps in alike.values():
        told = _told(doubt[taps[0]][1], [seen[t] for t in taps if t in seen])
        found |= {t: next((way for way in doubt[t][1] if way.key == told), None) for t in taps}
    return found


def _told(ways: Sequence[Way], away: Sequence[Mapping[object, float]]) -> object:
    """What of the ways leaves least, if that is little or, of one that is no guess, clearly less than others leave; of several that
    leave as much the likeliest, since a part of what is right is right too. Else the likeliest, if it takes fewer steps than
    others and is no guess.
    """
    found = {way.key: float(np.median([one[way.key] for one in away] or [1.0])) for way in ways}
    least = min(found.values())
    near = [key for key, far in found.items() if far <= least + min(least, NEAR) + 2.0**-10]
    clear = min([far for key, far in found.items() if key not in near], default=0.5)
    guessed = next(way.guessed for way in ways if way.key == near[0])
    if least < ANGLE or (not guessed and least < CLEARLY * clear):
        return near[0]
    first, *others = ways
    return None if first.guessed or any(way.steps == first.steps for way in others) else first.key


def _away(call: Call, x: Array, ways: Sequence[Way], ours: Array) -> dict[object, float]:
    """How far the array is from ours in each way: the sine of the angle, or of chosen experts the share of others."""
    found = dict[object, float]()
    for way in ways:
        y, e = way.of(x), cut(np.asarray(ours), way.pick)
        far = _others(y, e) if integers(call.of) else _sine(call, y, e)
        found.setdefault(way.key, far)
    return found


def _sine(call: Call, x: Array, y: Array) -> float:
    """Over the numbers that neither masks; rotated channels may lie in either order."""
    turned = call.tap.rpartition("/")[2] in ROPE_TAPS
    both = [y, *([swap_pairs(y, to_interleaved=to) for to in (True, False)] if turned else [])]
    seen = [np.isfinite(x) & np.isfinite(e) for e in both]
    return min(sine(x[s].astype(np.float64), e[s].astype(np.float64)) for e, s in zip(both, seen, strict=True))


def _others(x: Array, y: Array) -> float:
    """Which share of what was chosen others are."""
    return float(np.mean(np.sort(x, axis=-1) != np.sort(y, axis=-1)))
