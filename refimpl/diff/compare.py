"""One recorded tap against its replay: the finding, and in words where and how it is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from refimpl.autograd.tensor import Array

from . import fp8_rules, tolerance
from .drift import drift
from .holes import UNKNOWN, excused
from .optimizer import doubtful
from .padding import along, rows_at
from .picture import Picture
from .reading import Pick, cut
from .replay import Step
from .wide import Wide, looked_at, paired

DOUBTFUL = "all of it is padding, or of tokens that rounding alone may have sent to other experts: record router.ids"


@dataclass(frozen=True)
class Finding:
    """One tap: its error against float64, the worst twin's, what was allowed, where it is worst; `chained` is the distance to
    our own run, drift and all; `region` the stages that were computed for it, its own last; `open` says that rounding alone
    could have changed the experts of every token, so that nothing was compared; `lean` is how far all of it leans one way, and
    `upright` how far it may; `elements` what single numbers are held to; `picture` shows where, if that was asked for.
    """

    tap: str
    stage: str
    ok: bool
    error: float
    twin: float = 0.0
    allowed: float = 0.0
    note: str = ""
    chained: float = float("nan")
    region: tuple[str, ...] = ()
    open: bool = False
    lean: float = 0.0
    upright: float = 0.0
    elements: tolerance.Elements | None = None
    picture: Picture | None = field(default=None, repr=False, compare=False)

    @property
    def places(self) -> tuple[str, ...]:
        """Where its fault may lie: the region; of what nothing was computed for (ids of another number of experts) itself."""
        return self.region or (self.tap,)


@dataclass(frozen=True)
class Units:
    """Roundoff of what a tap is kept in, the stages that were computed for it, and the coarsest roundoff among them."""

    own: float
    region: float
    stages: tuple[str, ...]


def unusable(x: Array, integers: bool, limit: int | None) -> str:
    """What keeps a recorded tap from being an input of a replay, or "": another kind of numbers, ids that name nothing
    (`limit` of them exist).
    """
    if integers != (x.dtype.kind in "iu") or x.dtype.kind == "b":
        return f"dtype {x.dtype}, expected {'integers' if integers else 'floating-point numbers'}"
    if limit is not None and x.size and (int(x.min()) < 0 or int(x.max()) >= limit):
        return f"ids from {int(x.min())} to {int(x.max())}, expected 0 to {limit - 1}"
    return ""


def compare(step: Step, x: Array, units: Units, pick: Pick) -> Finding:
    """x is the candidate's tap, or the part of it that `pick` says."""
    call, kind = step.call, step.call.of.compare
    settled, doubt = settled_rows(step, pick), doubtful(step)
    if settled is not None and not settled.any():
        return Finding(call.tap, call.stage, True, 0.0, note=DOUBTFUL, open=True)
    if kind == "given":
        return Finding(call.tap, call.stage, True, 0.0, note="taken as it is")
    numbers = kind not in ("set", "exact") and call.stage not in fp8_rules.RULES
    if numbers and doubt is None and step.naive is None:
        return _values(step, x, _picked(step.e, pick), _picked(step.ours, pick), settled, units, pick)
    exact, chained = (cut(np.asarray(a), pick) for a in (step.e, step.ours))
    if numbers and step.naive is not None:
        exact = excused(x, exact, cut(step.naive, pick))
    if doubt is not None:  # as if the candidate, and every twin, held ours there
        x, step = np.where(cut(doubt, pick), exact, x), _without(step, doubt)
    if numbers:
        return _values(step, x, exact, chained, settled, units, pick)
    if call.stage in fp8_rules.RULES:
        return _codes(step, x, chained, settled, units, pick)
    if kind == "set":
        return _sets(step, x, exact, chained, settled)
    wrong = int((x != exact).sum())
    note = f"{wrong} of {x.size} elements differ" if wrong else ""
    return Finding(call.tap, call.stage, not wrong, float(wrong), note=note, chained=float((x != chained).sum()))


def _picked(a: Array | Wide, pick: Pick) -> Array | Wide:
    return cut(np.asarray(a), pick) if pick else a


def _without(step: Step, doubt: Array) -> Step:
    """The step, of which no twin says anything where there is doubt."""

    def twins() -> Iterator[Array]:
        return (np.where(doubt, step.exact, np.asarray(twin)) for twin in step.twins())

    return replace(step, twins=twins, glimpses=lambda: iter(()))


def _codes(step: Step, x: Array, chained: Array, settled: Array | None, units: Units, pick: Pick) -> Finding:
    """Scales or codes of a quantised product's input."""
    call, found = step.call, fp8_rules.fit(step, x, pick, units.stages, settled)
    if found is None:
        return Finding(call.tap, call.stage, True, 0.0, note="parts of tiles were recorded: not compared", open=True)
    away = drift(x, chained)
    return Finding(call.tap, call.stage, not found.note, found.error, note=found.note, chained=away)


def settled_rows(step: Step, pick: Pick) -> Array | None:
    """Which rows (all axes but the last) are beyond doubt, None if all are."""
    if step.unsettled is None:
        return None
    doubt, lead = step.unsettled, step.e.shape[:-1] or (1,)
    axes = step.call.of.shape.split()
    if place := rows_at(axes):
        doubt = along(axes, _of_length(doubt, lead[place[1]]), len(lead))
    elif doubt.shape != lead:  # dispatched rows belong to tokens that the choice itself decides
        doubt = np.array(doubt.any())
    rows = {axis: entries for axis, entries in pick.items() if axis < len(lead)}
    return cut(~np.broadcast_to(doubt, lead), rows)


def _of_length(doubt: Array, n: int) -> Array:
    """Doubts of tokens (B, S) as those of an MTP module, which has fewer, or of the main model, of whose last ones nothing is
    known then: a gradient comes from both.
    """
    more = np.ones((len(doubt), max(n - doubt.shape[1], 0)), bool)
    return np.concatenate([doubt[:, :n], more], axis=1)


def _values(
    step: Step,
    x: Array,
    e: Array | Wide,
    chained: Array | Wide,
    settled: Array | None,
    units: Units,
    pick: Pick,
) -> Finding:
    """Two questions: is a row further off than roundings may put it, and do all rows lean one way, which roundings do not."""
    call, leans = step.call, 0.0
    if not isinstance(e, Wide) and e.size and np.isnan(e.flat[0]) and np.isnan(e).all():
        return Finding(call.tap, call.stage, True, 0.0, note=UNKNOWN, open=True)
    seen = looked_at(x, e, step.ends)
    found = tolerance.distance(call.stage, seen, e, settled)
    family = 0.0 if pick else _of_parts(step, e, found, settled, units)
    limit = tolerance.allowed(call.stage, units.own, family)
    upright = tolerance.allowed_lean(units.stages, units.region, 0.0, found.rows)
    found = tolerance.cancelling(found, e, upright)
    twins = step.twins()
    while not (ok := found.worst <= limit and found.lean <= upright):  # only now is a twin worth its cost
        twin = next(twins, None)
        if twin is None:
            break
        its = tolerance.distance(call.stage, _picked(twin, pick), e, settled)
        family, leans = max(family, its.worst), max(leans, its.lean)
        limit = tolerance.allowed(call.stage, units.own, family)
        upright = tolerance.allowed_lean(units.stages, units.region, leans, found.rows)
    note = "" if ok else _describe(call.stage, seen, e, limit)
    if found.worst <= limit and not ok:
        note = (
            f"every row is within what it is allowed, but all lean one way by {found.lean:.1e}, allowed {upright:.1e}"
        )
    elements = tolerance.elements_of(call.stage, units.own, step.inputs)
    if ok and elements and (n := tolerance.strays(x, np.asarray(e), elements, settled)):
        ok, note = False, f"{n} of {x.size} numbers are further off than two roundings put them, though no row is"
    free = call.stage == "router.weights"  # the order of its slots
    away = drift(np.sort(x), np.sort(np.asarray(chained))) if free else drift(seen, chained)
    made = Finding(call.tap, call.stage, ok, found.worst, family, limit, note, away)
    return replace(made, lean=found.lean, upright=upright, elements=elements)


def _of_parts(step: Step, e: Array | Wide, found: tolerance.Distance, settled: Array | None, units: Units) -> float:
    """The worst row of parts of twins, of as many as it takes to allow what was found: no more than the worst of all of them."""
    stage, family, parts = step.call.stage, 0.0, step.glimpses()
    while found.worst > tolerance.allowed(stage, units.own, family) and (part := next(parts, None)):
        rows = None if settled is None else settled[part.index]
        family = max(family, tolerance.distance(stage, *part.of(e), rows, found.largest).worst)
    return family


def _sets(step: Step, x: Array, exact: Array, chained: Array, settled: Array | None) -> Finding:
    """Unordered along the last axis; the error is the share of tokens that chose others where rounding leaves no choice."""
    call = step.call
    x, exact, chained = (np.sort(a, axis=-1) for a in (x, exact, chained))
    wrong = (x != exact).any(axis=-1)
    if settled is not None:
        wrong &= settled
    n, note = int(wrong.sum()), ""
    if n:
        first = tuple(np.argwhere(wrong)[0].tolist())
        note = f"{n} of {wrong.size} tokens choose others, the first at {list(first)}: {x[first].tolist()}"
        note += f", expected {exact[first].tolist()}"
    flips = float((x != chained).any(axis=-1).mean())
    return Finding(call.tap, call.stage, not n, n / max(wrong.size, 1), note=note, chained=flips)


def _describe(stage: str, x: Array | Wide, e: Array | Wide, limit: float) -> str:
    """Where it is worst, how much of it is off, and whether a plain factor explains it."""
    holes = sum(int((~np.isfinite(a) & np.isfinite(b)).sum()) for _, a, b in paired(x, e))
    if holes:
        return f"{holes} elements are NaN or infinite"
    error, (far, size, along) = tolerance.row_errors(stage, x, e), (float(s.sum()) for s in tolerance.sums(x, e))
    at = [int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape)]
    lean = along / max(size, 1e-300)  # x = (1 + lean) e + rest
    rest = max(far - lean * along, 0.0) / max(size, 1e-300)
    fit = f"; the candidate is {1 + lean:.4f} x ours" if abs(lean) > 1e-3 and rest < 1e-6 else ""
    return f"worst row {at}, {int((error > limit).sum())} of {error.size} rows affected{fit}"
