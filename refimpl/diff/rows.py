"""Running a stage of attention a block of queries at a time (`wide`), in any lane."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .holes import torn
from .lanes import Lane, Recorded
from .program import names
from .wide import FORMS, Form, Place, Wide, filled, is_large, places, seen

Block = Callable[[Place], Array]


def run(lane: Lane, call: Call, r: Recorded, *, keep: bool = False) -> Array | Wide:
    """The call's stage in this lane. What is wide and large comes as a `Wide`, which keeps its blocks if wanted."""
    form = FORMS.get(call.stage)
    shape = _grid(lane, call, r, form) if form else ()
    if form is None or not is_large(shape) or lane.naive or (lane.given and _torn(lane, call, r)):
        return lane.run(call, r)
    block = _stage(lane, call, r, form)
    if form.gives is not None:
        return Wide(shape, np.dtype(lane.plan.dtype), form.gives, block, keep)
    made = [(p, block(p)) for p in places(shape)]
    whole: Array = np.empty((shape[0], shape[2], *made[0][1].shape[2:]), made[0][1].dtype)
    for p, rows in made:
        whole[p.sequence, p.start : p.stop] = rows[0]
    return whole


def _torn(lane: Lane, call: Call, r: Recorded) -> bool:
    """Whether an argument holds what is no number; what is wide is made of arguments that do not."""
    return any(torn(n, lane.held(n, r)) for n in names(call.args) if not n.startswith("w/"))


def _grid(lane: Lane, call: Call, r: Recorded, form: Form) -> tuple[int, ...]:
    """The shape (B, H, S, T) that is gone through in blocks."""
    b, h, s, t = lane.held(call.args[form.wide], r).shape
    return (b, lane.held(call.args[form.queries[0]], r).shape[2] if form.queries else h, s, t)


def _stage(lane: Lane, call: Call, r: Recorded, form: Form) -> Block:
    """What the stage gives at a place."""
    whole = {i: lane.value(call.args[i], call, r) for i in (*form.queries, *form.keys)}
    sound = all(np.isfinite(a.sum()) for a in whole.values())  # only then is what nobody sees worth nothing
    operand = _operand(lane, call, r, form, short=sound)

    def block(place: Place) -> Array:
        sequence, w = slice(place.sequence, place.sequence + 1), operand(place)
        args = {i: a[sequence, : w.shape[-1]] for i, a in whole.items() if i in form.keys}
        args |= {i: a[sequence, place.start : place.stop] for i, a in whole.items() if i in form.queries}
        args[form.wide] = w
        with np.errstate(all="ignore"):
            out: Array = call.of.fn(*[args[i] for i in range(len(args))], **call.static)
        return out

    return block


def _operand(lane: Lane, call: Call, r: Recorded, form: Form, *, short: bool) -> Block:
    """The wide argument at a place, without the keys that nobody sees if it may be short."""
    name = call.args[form.wide]
    a, given = lane.held(name, r), lane.is_given(name, r)

    def block(place: Place) -> Array:
        if isinstance(a, Wide):
            found = a.block(place)
            return found if short else filled(found, a.shape[-1], a.fill)
        part = a[place.index]
        if part.dtype.itemsize < 4:
            part = part.astype(np.float32)  # exact, and quicker to look through
        part = part[..., : seen(part, form.fill)] if short else part
        own = Place(a.shape, place.sequence, place.start, place.stop)
        return r.noise.given(call, part.astype(lane.plan.dtype, copy=False), lane.twin, own) if given else part

    return block
