"""Fits: what no known mistake gives, told by numbers: an order, a shift, a factor, a setting, another array in an argument's place.

Each looks at a blamed tap, says what was done to it, and counts only if the stage with that done to it gives the candidate's
output, as for any known mistake, at every tap that was computed through the same call. Those with the least freedom are told.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from ..compare import Finding
from ..corpus import Mutant
from ..fp8_rules import RULES
from ..hypothesis import REFUSED, rerun
from . import (
    added,
    blocks,
    columns,
    exchanged,
    formulas,
    inside,
    masks,
    mixture,
    moved,
    own,
    rearranged,
    rotary,
    settings,
    sums,
)
from .evidence import Evidence, Fit, evidence, finite
from .few import Trials

TIERS: tuple[tuple[Fit, ...], ...] = (
    (moved.shifted, settings.counts, settings.eps, exchanged.weights, exchanged.gains, exchanged.taps, masks.window),
    (rotary.positions, rotary.frequencies, rotary.single, moved.permuted, exchanged.experts, mixture.experts),
    (added.bias, sums.factor),
    (rearranged.arguments, rearranged.outputs, rearranged.again, formulas.weights, exchanged.inner, masks.halves),
    (
        sums.weighed,
        sums.with_others,
        inside.numbers,
        rearranged.tokens,
        mixture.dropped,
        mixture.matrices,
        moved.scrambled,
    ),
    (rotary.pairs, columns.scales),
    (blocks.factors, columns.products),
    (own.rows, own.dropout),
)
"""Those that leave least open first; what one of a row finds, no later row is asked for."""
CHOICES: tuple[Fit, ...] = (
    settings.counts,
    exchanged.taps,
    exchanged.inner,
    rearranged.arguments,
    rearranged.outputs,
    rearranged.tokens,
)
"""Those whose guesses are different things; of the others', which are one thing to more and more digits, the first is enough."""
CLEAR = 4.0
"""Times what is allowed by which a tap must be off: of less, too many things make it right."""
AS_NEAR = 1.5
"""Times the distance of the nearest at which a number of fewer digits is as good."""
GIVEN_UP = 2
"""Taps of the same stages after which the others of them are left alone."""


@dataclass(frozen=True)
class Seen:
    """All findings on numbers, those that are blamed, what mistakes are tried on, the config."""

    findings: list[Finding]
    blamed: list[Finding]
    trials: Trials
    config: Config

    @property
    def calls(self) -> Mapping[str, Call]:
        """All calls by tap."""
        return self.trials.calls

    def stages(self, f: Finding) -> tuple[str, ...]:
        """Those that were computed for a tap."""
        return tuple([self.calls[t].stage for t in f.region])

    def places(self, m: Mutant, f: Finding) -> set[str]:
        """The taps of a region that a mistake changes."""
        return {t for t in f.region if m.at(self.calls[t].stage)}

    def reproduces(self, m: Mutant, f: Finding) -> bool:
        """Whether a mistake gives what the candidate has."""
        return bool(self.trials.reproduces(m, f))

    def holds(self, m: Mutant, f: Finding) -> bool:
        """Whether what makes a tap right makes all those right, or leaves them so, that were computed through the same calls."""
        places = self.places(m, f)
        beside = [g for g in self.findings if g is not f and not g.open and g.note != _GIVEN and places & set(g.region)]
        return all(self.reproduces(m, g) for g in beside)


_GIVEN = "taken as it is"


def fitted(rest: Iterable[Finding], s: Seen) -> Iterator[tuple[Finding, Mutant]]:
    """Blamed taps, each with what explains it: that of `rest`, for which it is looked for, or of others that it explains too."""
    usable = {f.tap: f for f in s.blamed if f.stage not in RULES and not any(s.calls[t].own for t in f.region)}
    failed, explained = Counter[tuple[str, ...]](), set[str]()
    for f in [f for f in rest if f.tap in usable and _clear(f)]:
        stages = s.stages(f)
        if f.tap in explained or failed[stages] == GIVEN_UP:
            continue
        new = list(_of(evidence(f, s.calls, s.trials.recorded, s.config, frozenset(usable)), s))
        failed[stages] += not new
        for m in new:
            also = [g for g in usable.values() if s.places(m, g) and (g is f or s.reproduces(m, g))]
            explained |= {g.tap for g in also}
            yield from ((g, m) for g in also)


def _clear(f: Finding) -> bool:
    """Whether it is far beyond what is allowed, or all of it leans, computed from what was recorded."""
    return f.error >= CLEAR * f.allowed or (len(f.region) == 1 and f.lean >= CLEAR * f.upright > 0)


def _of(ev: Evidence, s: Seen) -> Iterator[Mutant]:
    """What the first row of fits that finds anything finds."""
    for tier in TIERS:
        found = [m for fit in tier for m in _fitting(fit, ev, s)]
        if found:
            yield from found
            return


def _fitting(fit: Fit, ev: Evidence, s: Seen) -> list[Mutant]:
    """The guesses of a fit that reproduce the tap; of one thing to more and more digits that of the fewest that is about as near as
    any.
    """
    found = list[Mutant]()
    with contextlib.suppress(*REFUSED):
        found += (m for m in fit(ev) if s.reproduces(m, ev.finding) and s.holds(m, ev.finding))
    if fit in CHOICES or len(found) < 2 or not ev.whole:
        return found if fit in CHOICES else found[:1]
    far = [float(np.linalg.norm(finite(rerun(ev.region, ev.recorded, m) - ev.x))) for m in found]
    return [next(m for m, d in zip(found, far, strict=True) if d <= AS_NEAR * min(far))]


__all__ = ["CHOICES", "TIERS", "Seen", "fitted"]
