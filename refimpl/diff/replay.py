"""Replay: every stage of a program re-run on the candidate's own recorded inputs, so that no wrong stage hides another.

An input that was not recorded is computed from those that were: then the replayed region spans several stages. Three kinds of
lanes run side by side, one stage at a time, and forget what no later stage reads:

* exact: float64, nothing rounded;
* twins: the specification at the candidate's precision, each with other admissible roundings (`tolerance.Noise`); run inside
  regions, and for a recorded tap only when its error asks for them;
* chained: our own run from the tokens on, which sees nothing of the candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT32, FLOAT64, Plan
from refimpl.layers.stage import Call

from . import rows
from .glimpse import Glimpse, glimpse
from .lanes import Lane, Recorded
from .program import last_use, names, needed
from .settled import Unsettled
from .tolerance import TWINS
from .wide import Place, Wide


@dataclass(frozen=True)
class Step:
    """A call on the candidate's inputs: our exact output e, our own run's, its twins when asked for, the tokens (B, S), or
    dispatched rows (M,), that rounding alone may send to other experts, or None, and the arguments of the exact call, then of
    every twin's; `naive`, our output with NaN spread as floating point spreads it, if there is any; `glimpses`, a part of every
    twin, if there is use in one; `ends`, to note where the tap's blocks end (`wide.looked_at`).
    """

    call: Call
    e: Array | Wide
    ours: Array | Wide
    twins: Callable[[], Iterator[Array | Wide]]
    unsettled: Array | None
    inputs: Callable[[], Iterator[list[Any]]]
    naive: Array | None = None
    glimpses: Callable[[], Iterator[Glimpse]] = lambda: iter(())
    ends: dict[Place, int] = field(default_factory=dict)

    @cached_property
    def exact(self) -> Array:
        """Our exact output, whole."""
        return np.asarray(self.e)


Watch = Callable[[str, Array], None]
"""Is shown every tap of our own run."""


def replay(
    program: list[Call], r: Recorded, watch: Watch | None = None, start: int = 0, stop: int | None = None
) -> Iterator[Step]:
    """A step for every recorded call, in model order. What the caller puts into `r.taps` meanwhile is used from there on; what it
    takes out is computed. Of a span of the program, at whose start all that is still read was recorded, only our own run goes
    through what lies before.
    """
    stop = len(program) if stop is None else stop
    recorded = {c.tap for c in program[start:stop]} & (set(r.taps) | r.outputs)
    wanted, last = needed(program, set(r.taps), r.outputs), last_use(program)
    lanes, unsettled = _Lanes(r.plan), Unsettled(program, {*r.taps, *r.partial}, r.padding)
    exact, chained, twins = lanes.exact, lanes.chained, lanes.twins
    end = stop if watch else 1 + max((i for i, c in enumerate(program) if c.tap in recorded), default=-1)
    for i, call in enumerate(program[:end]):
        chained.values[call.tap] = rows.run(chained, call, r)
        if watch and i >= start:
            watch(call.tap, np.asarray(chained.values[call.tap]))
        alone = all(n in r.inputs for n in names(call.args))
        if call.tap in wanted and (alone or i >= start):
            lanes.compute(call, r, ours=alone and call.of.compare == "exact")
            if call.tap not in r.taps:
                _compute(call, twins, r)
            unsettled.see(call, exact.values, [lane.values for lane in twins], r.taps)
        if call.tap in recorded:
            yield lanes.step(call, r, unsettled.of(call, chained.values[call.tap].shape))
            if call.tap in r.withdrawn:
                _compute(call, twins, r)
            if call.tap in r.partial:  # what reads it reads the candidate's entries
                for lane in (exact, *twins):
                    lane.overlay(call, r)
            if call.tap in r.taps:  # which is what is read from here on
                exact.values.pop(call.tap)
        lanes.forget([t for t, at in last.items() if at == i])


class _Lanes:
    """All lanes of a replay at a plan; the naive one runs from where NaN would first spread."""

    def __init__(self, plan: Plan) -> None:
        self.exact, self.chained = Lane(FLOAT64), Lane(FLOAT32, given=False)
        self.naive, self.twins = Lane(FLOAT64, naive=True), [Lane(plan, k) for k in range(TWINS)]

    def compute(self, call: Call, r: Recorded, *, ours: bool) -> None:
        """The call in float64, or by our own run where that is the same."""
        exact, naive = self.exact, self.naive
        before = {} if exact.torn else dict(exact.values)
        exact.values[call.tap] = self.chained.values[call.tap] if ours else rows.run(exact, call, r)
        if exact.torn:
            naive.values |= before
            naive.values[call.tap] = naive.run(call, r)

    def step(self, call: Call, r: Recorded, doubt: Array | None) -> Step:
        """The call's step, when all lanes have been through it that have to be."""
        e, ours = self.exact.values[call.tap], self.chained.values[call.tap]
        inputs = _inputs(call, (self.exact, *self.twins), r)
        twins, some = _lazy(call, self.twins, r), _parts(call, self.twins, r)
        return Step(call, e, ours, twins, doubt, inputs, self.spread(call.tap), some, r.ends.setdefault(call.tap, {}))

    def spread(self, tap: str) -> Array | None:
        """The tap with NaN spread as floating point spreads it, if there is any."""
        return np.asarray(self.naive.values[tap]) if tap in self.naive.values else None

    def forget(self, taps: list[str]) -> None:
        """Drop what no later stage reads."""
        for lane in (self.exact, self.chained, self.naive, *self.twins):
            for tap in taps:
                lane.values.pop(tap, None)


def _compute(call: Call, twins: list[Lane], r: Recorded) -> None:
    """A value that was not recorded, in every twin."""
    for lane in twins:
        lane.values[call.tap] = _each(rows.run(lane, call, r), partial(r.noise.inner, call, twin=lane.twin))


def _lazy(call: Call, twins: list[Lane], r: Recorded) -> Callable[[], Iterator[Array | Wide]]:
    outer = partial(r.noise.outer, call)
    return lambda: (_each(rows.run(lane, call, r), lambda a, place: outer(a)) for lane in twins)


def _parts(call: Call, twins: list[Lane], r: Recorded) -> Callable[[], Iterator[Glimpse]]:
    def make() -> Iterator[Glimpse]:
        for lane in twins:
            if found := glimpse(lane, call, r):
                yield replace(found, values=r.noise.outer(call, found.values))

    return make


def _each(a: Array | Wide, fn: Callable[..., Array]) -> Array | Wide:
    """fn(a, place=None), or of every block."""
    return a.each(lambda block, place: fn(block, place=place)) if isinstance(a, Wide) else fn(a, place=None)


def _inputs(call: Call, lanes: tuple[Lane, ...], r: Recorded) -> Callable[[], Iterator[list[Any]]]:
    return lambda: ([lane.value(a, call, r) for a in call.args] for lane in lanes)
