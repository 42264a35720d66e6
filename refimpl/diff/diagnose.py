"""Naming the mistake: known bugs, each a changed stage, re-run on the candidate's own inputs until one gives its output.

A mutant is tried at every tap whose region holds its stage, and counts only if it reproduces all of them. What fits nowhere is
said to fit nowhere: the catalogue is closed, the world is not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.precision import FLOAT64, Plan
from refimpl.layers.router import top_k
from refimpl.layers.stage import Call

from .compare import Finding
from .corpus import MUTANTS, Best, Mutant
from .fp8_rules import RULES, alike
from .gauges import ROPE_TAPS, swap_pairs
from .lanes import Lane, Recorded
from .optimizer import MASTER
from .padding import filled
from .program import owner
from .reading import cut
from .rivals import nearest
from .supposed import as_ours
from .tolerance import TWINS, UNIT, Noise, allowed, distance, row_errors, strays

_REFUSED = (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError)
"""What a mutant raises that does not take its inputs."""
NARROW = ("float16", "bfloat16")
"""Dtypes in which a part of a float32 run may have been computed, if nothing else explains it."""


@dataclass(frozen=True)
class Diagnosis:
    """One cause: `id` of the corpus ("" for a dtype), what it is in a sentence, threads, the taps it explains, the `regime` in
    which it shows; `rivals`, further mistakes that explain the taps as well, and whether they are the `same` numbers on this case.
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
    mutants = [m.under(c) for m in MUTANTS.values() if m.applies(c)]
    tried = [(m, d) for m in mutants if (d := _tried(m, blamed, calls, r))]
    found = _joined([d for _, d in tried])
    found = [d for d in found if not any(set(d.taps) < set(other.taps) for other in found)]
    found = _told_apart(found, tried, {f.tap: f for f in blamed}, calls, r)
    named = {tap for d in found for tap in d.taps}
    rest = [f for f in blamed if f.tap not in named]
    found += _narrow(rest, calls, r)
    return sorted(found, key=lambda d: -len(d.taps))


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
    tried: list[tuple[Mutant, Diagnosis]],
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
    tried: list[tuple[Mutant, Diagnosis]],
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
        x = as_ours(tap, _theirs(tap, r), ours[0], r)
        x = filled(calls[tap], x, ours[0], r.padding)
        seen.append(min(_readings(blamed[tap], x), key=lambda y: distance(blamed[tap].stage, y, ours[0]).worst))
        for outputs, y in zip(given, ours, strict=True):
            outputs.append(y)
    left, same = nearest(seen, given)
    first, *others = [rivals[i] for i in left]
    threads = tuple(dict.fromkeys([t for i in left for t in rivals[i].threads]))
    return replace(first, threads=threads, rivals=tuple(others), same=bool(others) and same)


def _tried(m: Mutant, blamed: list[Finding], calls: dict[str, Call], r: Recorded) -> Diagnosis | None:
    """The diagnosis, if the mutant reproduces every blamed tap whose region holds its stage, and there is one."""
    if m.also and not _stages([*r.taps, *r.partial], calls, m) <= {f.stage for f in blamed}:
        return None  # one of its stages was seen, and is right
    touched, same = [f for f in blamed if any(_with(m, calls[t]) for t in f.region)], set()
    for f in sorted(
        touched, key=lambda f: len(f.region)
    ):  # the cheapest first: one that it does not reproduce is enough
        reproduced = _reproduces(m, f, calls, r)
        if reproduced is False:
            return None
        same |= {f.tap} if reproduced else set()
    taps = tuple([f.tap for f in touched if f.tap in same])
    return Diagnosis(m.id, m.title, m.threads, taps, m.regime) if same else None


def _stages(taps: Iterable[str], calls: dict[str, Call], m: Mutant) -> set[str]:
    """Which of the stages that a mutant changes were recorded."""
    return {calls[t].stage for t in taps if t in calls and m.at(calls[t].stage)}


def _with(m: Mutant, call: Call) -> Call | None:
    """The call with the mutant in it, which for a gradient is in the readers of its tap; None if it has no place there."""
    readers = call.static.get("readers", ())
    if call.own is None or not any(r.stage == m.stage for r in readers):
        return call if m.at(call.stage) else None
    changed = [replace(r, own=replace(r.of, fn=m.fn)) if r.stage == m.stage else r for r in readers]
    return replace(call, static=call.static | {"readers": tuple(changed)})


def _reproduces(m: Mutant, f: Finding, calls: dict[str, Call], r: Recorded) -> bool | None:
    """Whether the region, with the mutant in it, gives the candidate's tap within what the tap is allowed; None for a gradient
    that the mutant, written for arrays, does not have.
    """
    choice = m.fn if isinstance(m.fn, Best) and f.stage == m.stage else None
    try:
        ours = rerun([calls[t] for t in f.region], r, replace(m, fn=choice.scores) if choice else m)
    except _REFUSED:
        # the mutant does not take these inputs: it is not the mistake
        return None if any(calls[t].own for t in f.region) else False
    if ours.dtype.kind == "O":  # arrays made of what lies on the tape: the same
        return None
    x = _theirs(f.tap, r)
    if choice:
        x = filled(calls[f.tap], x, top_k(ours, x.shape[-1]), r.padding)
        return x.ndim == ours.ndim and x.shape[:-1] == ours.shape[:-1] and choice.allows(x, ours)
    if ours.shape != x.shape:
        return False
    x = as_ours(f.tap, x, ours, r)
    x = filled(calls[f.tap], x, ours, r.padding)
    if x.dtype.kind == "f" and (np.isnan(x) & np.isfinite(ours)).any():  # what overflows or is 0 in fewer bits
        with contextlib.suppress(*_REFUSED):
            held = rerun([calls[t] for t in f.region], r, m, r.plan)
            ours = np.where(np.isfinite(held), ours, held)
    if calls[f.tap].of.compare == "set":
        return bool((np.sort(x, axis=-1) == np.sort(ours, axis=-1)).all())
    if x.dtype.kind in "iub":
        return bool((x == ours).all())
    return any(_near(f, other, ours) for other in _readings(f, x))


def _near(f: Finding, x: Array, ours: Array) -> bool:
    if f.stage in RULES:
        return alike(f.stage, x, ours)
    same_holes = bool((np.isnan(x) == np.isnan(ours)).all())
    found = distance(f.stage, x, ours)
    return same_holes and found.worst <= f.allowed and found.lean <= f.upright and not strays(x, ours, f.elements)


def _readings(f: Finding, x: Array) -> Iterator[Array]:
    """The candidate's tap, and, as a wrong rotation may leave its channels in either order, the other orders."""
    yield x
    if f.tap.rpartition("/")[2] in ROPE_TAPS:
        yield from (swap_pairs(x, to_interleaved=way) for way in (True, False))


def rerun(region: Iterable[Call], r: Recorded, m: Mutant, plan: Plan = FLOAT64) -> Array:
    """The last tap of a region in float64 (or another plan), what was recorded of it, with a mutant in its stage's place."""
    lane, out, calls = Lane(plan), np.zeros(0), list(region)
    for call in calls:
        other = _with(m, call)
        plain = other is None or other is not call
        lane.values[call.tap] = out = lane.run(other or call, r, None if plain else bound(m, call, lane, r))
        if call.tap in r.partial and call is not calls[-1]:
            lane.overlay(call, r)
    return _seen(calls[-1].tap, out, r)


def _theirs(tap: str, r: Recorded) -> Array:
    """What the candidate gave of a tap."""
    return r.partial[tap][1] if tap in r.partial else r.taps[tap] if tap in r.taps else r.withdrawn[tap]


def _seen(tap: str, ours: Array, r: Recorded) -> Array:
    """What was recorded of a tap that is ours."""
    return cut(ours, r.partial[tap][0]) if tap in r.partial else ours


def bound(m: Mutant, call: Call, lane: Lane, r: Recorded) -> Callable[..., Any]:
    """The mutant's function, given what it reads beside the stage's arguments."""
    fn = m.at(call.stage)
    assert fn is not None
    if not m.reads or call.stage != m.stage:
        return fn
    return partial(fn, reads=tuple([lane.value(_read(n, call, r), call, r) for n in m.reads]))


def _read(name: str, call: Call, r: Recorded) -> str:
    """The full name of what a mutant reads at a call."""
    unit = owner(call.tap)
    if name == "master":
        return MASTER + str(call.args[0]).removeprefix("grad/")
    return r.weight(unit, name.removeprefix("w:")) if name.startswith("w:") else f"{unit}/{name}"


def _narrow(blamed: list[Finding], calls: dict[str, Call], r: Recorded) -> list[Diagnosis]:
    """The blamed taps that nothing else explains, if all would be right were they and their regions kept in a narrower dtype: in
    that whose twins err most nearly as the candidate does, since a coarse one allows what a finer one does.
    """
    shares = {d: [_share(d, f, [calls[t] for t in f.region], r) for f in blamed] for d in NARROW if blamed}
    fits = {d: abs(float(np.mean(np.log(all_)))) for d, all_ in shares.items() if all(all_)}
    if not fits:
        return []
    title = f"these taps conform if they are computed in {min(fits, key=fits.__getitem__)}: declare it if that is meant"
    return [Diagnosis("", title, (), tuple([f.tap for f in blamed]))]


def _share(dtype: str, f: Finding, region: list[Call], r: Recorded) -> float:
    """The candidate's error over that of twins of the region in that dtype; 0 if it is no rounding of theirs: more than is allowed,
    or none in most rows, as a dtype spares none.
    """
    if region[-1].of.compare in ("exact", "set") or f.stage in RULES:
        return 0.0
    narrow = replace(r, noise=Noise(lambda tap: UNIT[dtype], lambda call: "fp32"))
    exact, family = Lane(FLOAT64), 0.0
    for call in region:
        exact.values[call.tap] = exact.run(call, r)
        if call.tap in r.partial and call is not region[-1]:
            exact.overlay(call, r)
    e = _seen(f.tap, np.asarray(exact.values[f.tap]), r)
    x = _theirs(f.tap, r)
    x = filled(region[-1], x, e, r.padding)
    if np.median(row_errors(f.stage, x, e)) <= f.allowed:
        return 0.0
    for k in range(1, TWINS):
        lane = Lane(r.plan, k)
        for call in region:
            lane.values[call.tap] = narrow.noise.inner(call, lane.run(call, narrow), k)
            if call.tap in r.partial and call is not region[-1]:
                lane.overlay(call, narrow)
        family = max(family, distance(f.stage, _seen(f.tap, np.asarray(lane.values[f.tap]), r), e).worst)
    return f.error / family if family and f.error <= allowed(f.stage, UNIT[dtype], family) else 0.0
