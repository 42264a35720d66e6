"""Fits: what no known mistake gives, told by numbers: an order, a shift, a factor, a setting, another array in an argument's place.

Each looks at a blamed tap, says what was done to it, and counts only if the stage with that done to it gives the candidate's output,
as for any known mistake. Of fits that do, those with the least freedom are told.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping

from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from ..compare import Finding
from ..corpus import Mutant
from ..fp8_rules import RULES
from ..hypothesis import REFUSED, reproduces
from ..lanes import Recorded
from . import added, exchanged, masks, moved, rearranged, rotary, settings, sums
from .evidence import Evidence, Fit

TIERS: tuple[tuple[Fit, ...], ...] = (
    (moved.shifted, settings.counts, settings.eps, exchanged.weights, exchanged.taps, masks.window),
    (moved.permuted, exchanged.experts, added.bias, rotary.positions, rotary.frequencies, sums.factor),
    (rearranged.arguments, rearranged.outputs, rearranged.again),
    (sums.weighed, sums.with_others, sums.capped, rearranged.tokens),
)
"""Those that leave least open first; what one of a row finds, no later row is asked for."""
CLEAR = 4.0
"""Times what is allowed by which a tap must be off: of less, too many things make it right."""
GIVEN_UP = 2
"""Taps of the same stages after which the others of them are left alone."""


def fitted(blamed: list[Finding], calls: Mapping[str, Call], r: Recorded, c: Config) -> Iterator[tuple[Finding, Mutant]]:
    """Blamed taps, each with what explains it."""
    usable = [f for f in blamed if _clear(f) and f.stage not in RULES and not any(calls[t].own for t in f.region)]
    failed, known, tried = Counter[tuple[str, ...]](), list[Mutant](), set[tuple[str, int]]()
    both = frozenset([f.tap for f in blamed])
    for f in usable:
        stages = tuple([calls[t].stage for t in f.region])
        tried |= {(f.tap, id(m)) for m in known}
        found = [m for m in known if any(map(m.at, stages)) and reproduces(m, f, calls, r)]
        if not found and failed[stages] < GIVEN_UP:
            found = list(_of(Evidence(f, calls, r, c, both)))
            failed[stages] += not found
            tried |= {(f.tap, id(m)) for m in found}
            known += found
        yield from ((f, m) for m in found)
    for f in usable:  # what was found at a later tap
        left = [m for m in known if (f.tap, id(m)) not in tried and any(m.at(calls[t].stage) for t in f.region)]
        yield from ((f, m) for m in left if reproduces(m, f, calls, r))


def _clear(f: Finding) -> bool:
    """Whether it is far beyond what is allowed."""
    return f.error >= CLEAR * f.allowed or f.lean >= CLEAR * f.upright > 0


def _of(ev: Evidence) -> Iterator[Mutant]:
    """What the first row of fits that finds anything finds, of each fit its first."""
    for tier in TIERS:
        found = [m for fit in tier if (m := _first(fit, ev))]
        if found:
            yield from found
            return


def _first(fit: Fit, ev: Evidence) -> Mutant | None:
    with contextlib.suppress(*REFUSED):
        return next((m for m in fit(ev) if reproduces(m, ev.finding, ev.calls, ev.recorded)), None)
    return None


__all__ = ["TIERS", "fitted"]
