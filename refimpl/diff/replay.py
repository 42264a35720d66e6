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
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT32, FLOAT64
from refimpl.layers.stage import Call

from .lanes import Lane, Recorded
from .program import last_use, needed
from .settled import Unsettled
from .tolerance import TWINS


@dataclass(frozen=True)
class Step:
    """A call on the candidate's inputs: our exact output, our own run's, its twins when asked for, the tokens (B, S) that
    rounding alone may send to other experts, or None, and the arguments of the exact call, then of every twin's; `naive`, our
    output with NaN spread as floating point spreads it, if there is any.
    """

    call: Call
    exact: Array
    chained: Array
    twins: Callable[[], Iterator[Array]]
    unsettled: Array | None
    inputs: Callable[[], Iterator[list[Any]]]
    naive: Array | None = None


Watch = Callable[[str, Array], None]
"""Is shown every tap of our own run."""


def replay(program: list[Call], r: Recorded, watch: Watch | None = None) -> Iterator[Step]:
    """A step for every recorded call, in model order. What the caller puts into `r.taps` meanwhile is used from there on; what it
    takes out is computed.
    """
    recorded = {c.tap for c in program} & (set(r.taps) | r.outputs)
    wanted, last = needed(program, set(r.taps), r.outputs), last_use(program)
    exact, chained = Lane(FLOAT64), Lane(FLOAT32, given=False)
    twins = [Lane(r.plan, k) for k in range(TWINS)]
    naive = Lane(FLOAT64, naive=True)
    lanes, unsettled = (exact, chained, naive, *twins), Unsettled()
    end = len(program) if watch else max((i for i, c in enumerate(program) if c.tap in recorded), default=-1)
    for i, call in enumerate(program[: end + 1]):
        chained.values[call.tap] = chained.run(call, r)
        if watch:
            watch(call.tap, chained.values[call.tap])
        if call.tap in wanted:
            before = {} if exact.torn else dict(exact.values)
            exact.values[call.tap] = exact.run(call, r)
            if exact.torn:
                naive.values |= before
                naive.values[call.tap] = naive.run(call, r)
            if call.tap not in r.taps:
                _compute(call, twins, r)
            unsettled.see(call, exact.values, [lane.values for lane in twins], r.taps)
        if call.tap in recorded:
            inputs = _inputs(call, (exact, *twins), r)
            ours, doubt = chained.values[call.tap], unsettled.of(call)
            spread = naive.values.get(call.tap)
            yield Step(call, exact.values[call.tap], ours, _lazy(call, twins, r), doubt, inputs, spread)
            if call.tap in r.withdrawn:
                _compute(call, twins, r)
            if call.tap in r.partial:  # what reads it reads the candidate's entries
                for lane in (exact, *twins):
                    lane.overlay(call, r)
        for lane in lanes:
            for tap in [t for t in lane.values if last[t] <= i]:
                del lane.values[tap]


def _compute(call: Call, twins: list[Lane], r: Recorded) -> None:
    """A value that was not recorded, in every twin."""
    for lane in twins:
        lane.values[call.tap] = r.noise.inner(call, lane.run(call, r), lane.twin)


def _lazy(call: Call, twins: list[Lane], r: Recorded) -> Callable[[], Iterator[Array]]:
    return lambda: (r.noise.outer(call, lane.run(call, r)) for lane in twins)


def _inputs(call: Call, lanes: tuple[Lane, ...], r: Recorded) -> Callable[[], Iterator[list[Any]]]:
    return lambda: ([lane.value(a, call, r) for a in call.args] for lane in lanes)
