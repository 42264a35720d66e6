"""Naming the mistake: known bugs, each a changed stage, re-run on the candidate's own inputs until one gives its output.

A mutant is tried at every tap whose region holds its stage, and counts only if it reproduces all of them. What none of them gives
is fitted (`fits`): an order, a factor, a setting. What fits nowhere is said to fit nowhere: the catalogue is closed, the world not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from .compare import Finding
from .corpus import MUTANTS, Mutant
from .fits import Seen, fitted
from .fits.evidence import evidence
from .fits.few import Trials
from .hypothesis import readings, rerun, theirs, with_mistake
from .lanes import Recorded
from .narrow import narrower
from .padding import filled
from .program import regions
from .rivals import nearest
from .supposed import as_ours
from .tolerance import allowed, allowed_lean, distance

Tried = list[tuple[Mutant, "Diagnosis"]]
"""Mistakes that reproduce something, each with what it explains."""


@dataclass(frozen=True)
class Diagnosis:
    """One cause: `id` of the corpus ("" for a dtype, and for what was fitted), what it is in a sentence, threads, the taps it
    explains, the `regime` in which it shows; `rivals`, further mistakes that explain the taps as well, and whether they are the
    `same` numbers on this case.
    """

    id: str
    title: str
    threads: tuple[str, ...]
    taps: tuple[str, ...]
    regime: str = "any"
    rivals: tuple[Diagnosis, ...] = ()
    same: bool = False

    @property
    def ids(self) -> tuple[str, ...]:
        """All that it may be."""
        return tuple([d.id for d in (self, *self.rivals) if d.id])

    @property
    def said(self) -> str:
        """The cause in words, with the others that it may be."""
        if not self.rivals:
            return self.title
        all_ = (self, *self.rivals)
        why = "the same numbers on this case" if self.same else "this recording does not tell which"
        shows = ", ".join([f"{d.id} shows with {'any input' if d.regime == 'any' else d.regime}" for d in all_])
        apart = f"; {shows}" if len({d.regime for d in all_}) > 1 else ""
        return f"{', or '.join([d.title for d in all_])}: {why}{apart}"


def diagnose(program: list[Call], r: Recorded, findings: list[Finding], c: Config) -> list[Diagnosis]:
    """Causes that reproduce blamed taps, those that explain most first; taps that nothing explains are in none."""
    held = {*r.taps, *r.withdrawn, *r.partial}
    blamed = [f for f in findings if not f.ok and f.region and np.isfinite(f.allowed) and f.tap in held]
    calls = {call.tap: call for call in program}
    mutants, trials = [m.under(c) for m in MUTANTS.values() if m.applies(c)], Trials(calls, r)
    tried = [(m, d) for m in mutants if (d := _tried(m, blamed, trials))]
    found = _best(tried, blamed, calls, r)
    if rest := _unnamed(blamed := blamed + _odd(program, r, findings), found):
        usable = [f for f in findings if f.ok and f.region and f.tap in held] + blamed
        fits = fitted(rest, Seen(usable, blamed, trials, c))
        tried += [(m, Diagnosis(m.id, m.title, m.threads, (f.tap,))) for f, m in fits]
        found = _best(tried, blamed, calls, r)
    rest = [f for f in _unnamed(blamed, found) if f.tap in held]
    if title := narrower([evidence(f, calls, r, c) for f in rest]):
        found.append(Diagnosis("", title, (), tuple([f.tap for f in rest])))
    return sorted(found, key=lambda d: -len(d.taps))


def _odd(program: list[Call], r: Recorded, findings: list[Finding]) -> list[Finding]:
    """Findings on what has another shape than it should have, as on any other tap."""
    inside, found = regions(program, r.taps, r.odd), list[Finding]()
    for f in [f for f in findings if f.tap in r.odd]:
        unit = r.noise.unit(f.tap)
        limits = allowed(f.stage, unit, 0.0), allowed_lean([f.stage], unit, 0.0)
        found.append(replace(f, region=inside[f.tap], allowed=limits[0], upright=limits[1]))
    return found


def _unnamed(blamed: list[Finding], found: list[Diagnosis]) -> list[Finding]:
    """What no diagnosis explains."""
    named = {tap for d in found for tap in d.taps}
    return [f for f in blamed if f.tap not in named]


def _best(tried: Tried, blamed: list[Finding], calls: dict[str, Call], r: Recorded) -> list[Diagnosis]:
    """Of what was tried what explains most; of several that explain the same the one that the candidate is nearest to."""
    found = _joined([d for _, d in tried])
    found = [d for d in found if not any(set(d.taps) < set(other.taps) for other in found)]
    return _told_apart(found, tried, {f.tap: f for f in blamed}, calls, r)


def _joined(found: list[Diagnosis]) -> list[Diagnosis]:
    """One diagnosis a title: a cause that is at work in several stages is said once."""
    by_title: dict[str, Diagnosis] = {}
    for d in found:
        before = by_title.get(d.title)
        taps = d.taps if before is None else tuple(dict.fromkeys([*before.taps, *d.taps]))
        by_title[d.title] = replace(before or d, taps=taps)
    return list(by_title.values())


def _told_apart(
    found: list[Diagnosis],
    tried: Tried,
    blamed: dict[str, Finding],
    calls: dict[str, Call],
    r: Recorded,
) -> list[Diagnosis]:
    """Of diagnoses that explain the same taps the one that the candidate is nearest to; or one that names all that it may be."""
    groups: dict[frozenset[str], list[Diagnosis]] = {}
    for d in found:
        groups.setdefault(frozenset(d.taps), []).append(d)
    return [
        d if len(same) == 1 else _nearest(same, tried, blamed, calls, r) for same in groups.values() for d in same[:1]
    ]


def _nearest(
    rivals: list[Diagnosis],
    tried: Tried,
    blamed: dict[str, Finding],
    calls: dict[str, Call],
    r: Recorded,
) -> Diagnosis:
    """The rival whose outputs the candidate is nearest to, with those that are as near."""
    seen, given = list[Array](), list[list[Array]]([[] for _ in rivals])
    for tap in rivals[0].taps:
        makers = [next(m for m, d in tried if d.title == rival.title and tap in d.taps) for rival in rivals]
        if calls[tap].of.compare in ("set", "exact"):
            continue  # these are reproduced to the number, or not at all
        ours = [rerun([calls[t] for t in blamed[tap].region], r, m) for m in makers]
        x = as_ours(tap, theirs(tap, r), ours[0], r)
        x = filled(calls[tap], x, ours[0], r.padding)
        seen.append(min(readings(blamed[tap], x), key=lambda y: distance(blamed[tap].stage, y, ours[0]).worst))
        for outputs, y in zip(given, ours, strict=True):
            outputs.append(y)
    left, same = nearest(seen, given)
    if same and not any(rivals[i].id for i in left):  # what was fitted, in other words
        left = left[:1]
    first, *others = [rivals[i] for i in left]
    threads = tuple(dict.fromkeys([t for i in left for t in rivals[i].threads]))
    return replace(first, threads=threads, rivals=tuple(others), same=bool(others) and same)


def _tried(m: Mutant, blamed: list[Finding], trials: Trials) -> Diagnosis | None:
    """The diagnosis, if the mutant reproduces every blamed tap whose region holds its stage, and there is one."""
    calls, r = trials.calls, trials.recorded
    if m.also and not _stages([*r.taps, *r.partial], calls, m) <= {f.stage for f in blamed}:
        return None  # one of its stages was seen, and is right
    touched, same = [f for f in blamed if any(with_mistake(m, calls[t]) for t in f.region)], set()
    for f in sorted(
        touched, key=lambda f: len(f.region)
    ):  # the cheapest first: one that it does not reproduce is enough
        reproduced = trials.reproduces(m, f)
        if reproduced is False:
            return None
        same |= {f.tap} if reproduced else set()
    taps = tuple([f.tap for f in touched if f.tap in same])
    return Diagnosis(m.id, m.title, m.threads, taps, m.regime) if same else None


def _stages(taps: Iterable[str], calls: Mapping[str, Call], m: Mutant) -> set[str]:
    """Which of the stages that a mutant changes were recorded."""
    return {calls[t].stage for t in taps if t in calls and m.at(calls[t].stage)}
