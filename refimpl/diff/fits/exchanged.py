"""Something else read in an argument's place: another tap of the layer, another stage's weights, another expert's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import STAGES, Call

from ..corpus import Mutant
from ..program import names, owner
from .evidence import Evidence, guess, near, short, weights_of
from .rearranged import EXPERTS, suspects
from .sums import stream_before
from .words import order_in_words

ENDS = {"embed": "logits", "logits": "embed"}
"""Stages whose weights may be tied."""
SAMPLE = 16
"""Channels of an expert's output that are compared."""


def taps(ev: Evidence) -> Iterator[Mutant]:
    """Another recorded tap of the same shape, of this layer or the stream at one of the ends of layers, where a tap is read."""
    call = ev.call
    for i, name in enumerate(call.args):
        if name in ev.calls:
            shape = ev.args[i].shape
            for t in _alike(ev, str(name)):
                z = ev.held(t)
                if z is not None and z.shape == shape:
                    title = f"{call.of.tap} reads {_called(ev, t)} instead of {short(name)}"
                    yield guess(title, call.stage, _with(call.stage, [i], [z]))


def inner(ev: Evidence) -> Iterator[Mutant]:
    """Another recorded tap read where stages that were computed for this one read a recorded tap, all of them."""
    calls = suspects(ev)
    for name in {n: None for c in calls for n in names(c.args) if n in ev.calls and n not in ev.finding.region}:
        mine = ev.held(name)
        readers = [c for c in calls if name in c.args]
        for t in _alike(ev, name) if mine is not None and len(ev.region) > 1 else ():
            z = ev.held(t)
            if (
                mine is not None
                and z is not None
                and z.shape == mine.shape
                and all(t not in names(c.args) for c in readers)
            ):
                also = {c.stage: _with(c.stage, [c.args.index(name)], [z]) for c in readers}
                who = " and ".join([c.of.tap for c in readers])
                title = f"{who} read{'s' if len(readers) == 1 else ''} {_called(ev, t)} instead of {short(name)}"
                yield guess(title, readers[0].stage, also.pop(readers[0].stage), also)


def _alike(ev: Evidence, name: str) -> Iterator[str]:
    """Recorded taps that may stand for another."""
    unit, tap = owner(ev.call.tap), ev.call.tap
    own = [t for t in ev.recorded.taps if owner(t) == unit]
    stream = [t for t in ev.recorded.taps if t.endswith(("/resid", "/embed", name.rpartition("/")[2]))]
    order = [t for t in dict.fromkeys([stream_before(ev, unit), *own, *stream]) if t in ev.calls]
    behind = _made_of(ev, tap)
    yield from (t for t in order if t != name and t not in behind)


def _made_of(ev: Evidence, tap: str) -> set[str]:
    """The tap, and all that is computed of it."""
    found = {tap}
    for call in ev.calls.values():
        if not found.isdisjoint(names(call.args)):
            found.add(call.tap)
    return found


def _called(ev: Evidence, tap: str) -> str:
    unit = owner(ev.call.tap)
    if tap == stream_before(ev, unit):
        return "the stream before attention"
    return short(tap) if owner(tap) == unit else tap.partition("/")[2]


def _with(name: str, at: Sequence[int], values: Sequence[Any]) -> Callable[..., Any]:
    """The stage with other arguments in these places."""
    given = dict(zip(at, values, strict=True))
    return lambda *args, **static: STAGES[name].fn(*[given.get(i, a) for i, a in enumerate(args)], **static)


def weights(ev: Evidence) -> Iterator[Mutant]:
    """The weights of another stage of the layer, of the same stage one layer on or back, of the other end of the model."""
    for call in suspects(ev):
        at = [i for i, n in enumerate(call.args) if isinstance(n, str) and n.startswith("w/")]
        mine = _held(ev, call)
        for other in _sources(ev, call) if at else ():
            values = _held(ev, other)
            if list(map(np.shape, values)) == list(map(np.shape, mine)):
                yield from _guesses(ev, call, other, at, values)


def _held(ev: Evidence, call: Call) -> list[Any]:
    """The weights of a call."""
    return [ev.recorded.weights(n.removeprefix("w/"), FLOAT64) for n in weights_of(call)]


def _guesses(ev: Evidence, call: Call, other: Call, at: list[int], values: list[Any]) -> Iterator[Mutant]:
    same_unit = owner(call.tap) == owner(other.tap)
    if same_unit and other.stage != call.stage:
        mine = _held(ev, call)
        there = [i for i, n in enumerate(other.args) if isinstance(n, str) and n.startswith("w/")]
        first, second = sorted((call.of.tap, other.of.tap))
        also = {other.stage: _with(other.stage, there, mine)}
        if other.tap in ev.blamed:
            yield guess(
                f"the weights of {first} and {second} are exchanged", call.stage, _with(call.stage, at, values), also
            )
    whose = f"{other.of.tap} (tied)" if other.stage in ENDS else other.of.tap
    if other.stage == call.stage:
        whose = (
            f"the layer {'before' if list(ev.calls).index(other.tap) < list(ev.calls).index(call.tap) else 'behind'}"
        )
    yield guess(f"{call.of.tap} has the weight of {whose}", call.stage, _with(call.stage, at, values))


def _sources(ev: Evidence, call: Call) -> Iterator[Call]:
    unit, end = owner(call.tap), ENDS.get(call.stage, "")
    phase, _, layer = unit.partition("/")
    for other in ev.calls.values():
        if other.own is not None or other is call or not weights_of(other):
            continue
        there = owner(other.tap)
        beside = layer[:1] == "L" and there in [f"{phase}/L{int(layer[1:]) + by}" for by in (1, -1)]
        if (
            (there == unit and layer)
            or (other.stage == call.stage and beside)
            or (there == unit and other.stage == end)
        ):
            yield other


def gains(ev: Evidence) -> Iterator[Mutant]:
    """A norm with another norm's weight: by what it multiplies its rows, channel by channel."""
    if ev.call.static.keys() != {"eps"} or not ev.whole:
        return
    w = ev.args[1]
    bare = ev.call.of.fn(ev.args[0], np.ones_like(w), **ev.call.static).reshape(-1, len(w))
    x = ev.x.reshape(bare.shape)
    gain = (x * bare).sum(axis=0) / np.maximum((bare * bare).sum(axis=0), np.finfo(float).tiny)
    for other in [c for c in ev.calls.values() if c.static.keys() == {"eps"} and len(c.args) == 2]:
        (v,) = _held(ev, other)
        if v.shape == w.shape and other is not ev.call and near(gain, v, ev.limit) and not near(w, v, ev.limit):
            whose = other.tap.partition("/")[2]
            yield guess(f"{ev.call.of.tap} has the weight of {whose}", ev.call.stage, _with(ev.call.stage, [1], [v]))


def experts(ev: Evidence) -> Iterator[Mutant]:
    """Experts with each other's matrices: whose an expert's first row was multiplied by."""
    if ev.call.stage not in EXPERTS or not ev.whole:
        return
    rows, ids, ws = ev.args[0], ev.args[1], ev.args[2:]
    used, first = np.unique(np.sort(ids, axis=None), return_index=True)
    few = np.stack([np.asarray(w[:SAMPLE], np.float64) for w in ws])  # (E, few, D)
    given = np.einsum("efd,md->mef", few, rows[first], optimize=True)
    x = ev.x[first, : few.shape[1]]
    far = np.linalg.norm(given - x[:, None], axis=-1)
    order = np.arange(len(ws))
    for at, e in enumerate(used):
        best = int(far[at].argmin())
        order[e] = e if near(x[at], given[at, e], ev.limit) else best if x[at].any() else -1
        if order[e] >= 0 and not near(x[at], given[at, order[e]], ev.limit):
            return
    if (order != np.arange(len(order))).any():
        fns = {name: renumbered(name, order) for name in EXPERTS}
        title = f"experts' matrices: {order_in_words(order, 'experts')}"
        yield guess(title, ev.call.stage, fns.pop(ev.call.stage), fns)


def renumbered(name: str, order: Array) -> Callable[..., Any]:
    """A stage of experts with each other's matrices, 0 where it says -1."""

    def fn(rows: Any, ids: Any, *ws: Any) -> Any:
        return STAGES[name].fn(rows, ids, *[ws[i] if i >= 0 else ws[0] * 0 for i in order])

    return fn
