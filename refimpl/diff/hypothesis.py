"""A hypothesis re-run: a mistake in its stage's place, on the candidate's own inputs, whether it gives what the candidate has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT64, Plan
from refimpl.layers.router import top_k
from refimpl.layers.stage import Call

from .compare import Finding
from .corpus import Best, Mutant
from .fp8_rules import RULES, alike
from .gauges import ROPE_TAPS, swap_pairs
from .lanes import Lane, Recorded
from .optimizer import MASTER
from .padding import filled
from .program import owner
from .reading import cut
from .supposed import as_ours
from .tolerance import distance, row_errors, strays

REFUSED = (ValueError, TypeError, IndexError, KeyError, AttributeError, ArithmeticError)
"""What a mutant raises that does not take its inputs."""
FLIPPED = 1 / 16
"""Share of tokens whose experts rounding may choose: 2 % of those of bfloat16 recordings of preset tiny."""
SURE = 0.25
"""By how much what a mistake does, times the number that brings it nearest to what was seen, may miss that number's 1."""


def with_mistake(m: Mutant, call: Call) -> Call | None:
    """The call with the mutant in it, which for a gradient is in the readers of its tap; None if it has no place there."""
    readers = call.static.get("readers", ())
    if call.own is None or not any(r.stage == m.stage for r in readers):
        return call if m.at(call.stage) else None
    changed = [replace(r, own=replace(r.of, fn=m.fn)) if r.stage == m.stage else r for r in readers]
    return replace(call, static=call.static | {"readers": tuple(changed)})


def reproduces(m: Mutant, f: Finding, calls: Mapping[str, Call], r: Recorded) -> bool | None:
    """Whether the region, with the mutant in it, gives the candidate's tap within what the tap is allowed; None for a gradient
    that the mutant, written for arrays, does not have.
    """
    choice = m.fn if isinstance(m.fn, Best) and f.stage == m.stage else None
    try:
        ours = rerun([calls[t] for t in f.region], r, replace(m, fn=choice.scores) if choice else m)
    except REFUSED:
        # the mutant does not take these inputs: it is not the mistake
        return None if any(calls[t].own for t in f.region) else False
    if ours.dtype.kind == "O":  # arrays made of what lies on the tape: the same
        return None
    x = theirs(f.tap, r)
    if choice:
        x = filled(calls[f.tap], x, top_k(ours, x.shape[-1]), r.padding)
        return x.ndim == ours.ndim and x.shape[:-1] == ours.shape[:-1] and choice.allows(x, ours)
    if ours.shape != x.shape:
        return False
    x = as_ours(f.tap, x, ours, r)
    x = filled(calls[f.tap], x, ours, r.padding)
    if x.dtype.kind == "f" and (np.isnan(x) & np.isfinite(ours)).any():  # what overflows or is 0 in fewer bits
        with contextlib.suppress(*REFUSED):
            held = rerun([calls[t] for t in f.region], r, m, r.plan)
            ours = np.where(np.isfinite(held), ours, held)
    if calls[f.tap].of.compare == "set":
        return bool((np.sort(x, axis=-1) == np.sort(ours, axis=-1)).all())
    if x.dtype.kind in "iub":
        return bool((x == ours).all())
    if f.stage in RULES:
        return alike(f.stage, x, ours)
    chosen = any(calls[t].stage == "router.ids" for t in f.region)
    near = [other for other in readings(f, x) if _near(f, other, ours, few=chosen)]
    return bool(near) and (f.ok or _moves(near[0], ours, given([calls[t] for t in f.region], r)[1]))


def _near(f: Finding, x: Array, ours: Array, *, few: bool) -> bool:
    """Whether x is ours within what is allowed; but for `few` rows, where rounding may have chosen other experts, which a mistake
    makes a near tie for other tokens than those that are one without it.
    """
    rows = None
    if few and x.ndim > 1:
        off = row_errors(f.stage, x, ours).reshape(x.shape[:-1])
        wrong = ~(off <= f.allowed)
        rows = ~wrong if 0 < wrong.sum() <= max(1, FLIPPED * wrong.size) else None
    same_holes = bool((np.isnan(x) == np.isnan(ours)).all())
    found = distance(f.stage, x, ours, rows)
    return same_holes and found.worst <= f.allowed and found.lean <= f.upright and not strays(x, ours, f.elements)


def _moves(x: Array, ours: Array, e: Array) -> bool:
    """Whether x lies from e where ours does, and as far: in a coarse dtype, or behind many stages, much is near enough that has
    nothing to do with what happened.
    """
    if (np.isfinite(ours) != np.isfinite(e)).any():  # it masks others, or unmasks them: `_near` has seen that
        return True
    with np.errstate(all="ignore"):
        off, move = (np.asarray(a, np.float64) - e for a in (x, ours))
    both = np.isfinite(off) & np.isfinite(move)
    a, b = off[both], move[both]
    size = float(b @ b)
    return not both.any() or (size > 0 and abs(float(a @ b) / size - 1) <= SURE)


def readings(f: Finding, x: Array) -> Iterator[Array]:
    """The candidate's tap, and, as a wrong rotation may leave its channels in either order, the other orders."""
    yield x
    if f.tap.rpartition("/")[2] in ROPE_TAPS:
        yield from (swap_pairs(x, to_interleaved=way) for way in (True, False))


def given(region: Sequence[Call], r: Recorded) -> tuple[list[Any], Array]:
    """What the last call of a region is given, in float64, and what of its output was recorded, as it should be."""
    lane, last = Lane(FLOAT64), region[-1]
    out = _run(region, r, None, lane)
    return [lane.value(a, last, r) for a in last.args], seen(last.tap, out, r)


def rerun(region: Sequence[Call], r: Recorded, m: Mutant, plan: Plan = FLOAT64) -> Array:
    """The last tap of a region in float64 (or another plan), what was recorded of it, with a mutant in its stage's place."""
    return seen(region[-1].tap, _run(region, r, m, Lane(plan)), r)


def _run(calls: Sequence[Call], r: Recorded, m: Mutant | None, lane: Lane) -> Array:
    """The last tap of a region, with a mutant in its stage's place if there is one."""
    out = np.zeros(0)
    for call in calls:
        other = with_mistake(m, call) if m else None
        fn = bound(m, call, lane, r) if m and other is call else None
        lane.values[call.tap] = out = lane.run(other or call, r, fn)
        if call.tap in r.partial and call is not calls[-1]:
            lane.overlay(call, r)
    return out


def theirs(tap: str, r: Recorded) -> Array:
    """What the candidate gave of a tap."""
    if tap in r.partial:
        return r.partial[tap][1]
    return next(a[tap] for a in (r.taps, r.withdrawn, r.odd) if tap in a)


def seen(tap: str, ours: Array, r: Recorded) -> Array:
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
