"""Running a stage of attention a block of queries at a time (`wide`), in any lane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial

import numpy as np

from refimpl.autograd import nn_ops
from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT64, Plan
from refimpl.layers.stage import Call

from .holes import torn
from .lanes import Lane, Recorded
from .program import names
from .wide import FORMS, Form, Place, Wide, filled, is_large, places, seen

LEAST = 1e-200
"""Sums of e^s from which on no share that counts has lost a bit: float64 holds 1e-308 in full."""
Block = Callable[[Place], Array]


def run(lane: Lane, call: Call, r: Recorded) -> Array | Wide:
    """The call's stage in this lane. What is wide and large comes as a `Wide`."""
    if not by_blocks(lane, call, r):
        return lane.run(call, r)
    form, shape, block = FORMS[call.stage], grid(lane, call, r), blocks(lane, call, r)
    if form.gives is not None:
        return Wide(shape, np.dtype(lane.plan.dtype), form.gives, block)
    made = [(p, block(p)) for p in places(shape)]
    whole: Array = np.empty((shape[0], shape[2], *made[0][1].shape[2:]), made[0][1].dtype)
    for p, rows in made:
        whole[p.sequence, p.start : p.stop] = rows[0]
    return whole


def by_blocks(lane: Lane, call: Call, r: Recorded) -> bool:
    """Whether the call's stage is taken apart: it is large, and holds nothing but numbers."""
    if call.stage not in FORMS or lane.naive or not is_large(grid(lane, call, r)):
        return False
    return not (lane.given and _torn(lane, call, r))


def _torn(lane: Lane, call: Call, r: Recorded) -> bool:
    """Whether an argument holds what is no number; what is wide is made of arguments that do not."""
    return any(torn(n, lane.held(n, r)) for n in names(call.args) if not n.startswith("w/") and not r.is_sound(n))


def grid(lane: Lane, call: Call, r: Recorded) -> tuple[int, ...]:
    """The shape (B, H, S, T) that is gone through in blocks."""
    form = FORMS[call.stage]
    b, h, s, t = lane.held(call.args[form.wide], r).shape
    return (b, lane.held(call.args[form.queries[0]], r).shape[2] if form.queries else h, s, t)


def blocks(lane: Lane, call: Call, r: Recorded) -> Block:
    """What the stage gives at a place."""
    form = FORMS[call.stage]
    whole = {i: lane.value(call.args[i], call, r) for i in (*form.queries, *form.keys)}
    sound = all(np.isfinite(a.sum()) for a in whole.values())  # only then is what nobody sees worth nothing
    operand = _operand(lane, call, r, form, short=sound)
    if lane.twin is None and call.stage in ("mla.scores", "mla.probs"):
        fast = _probs(operand, lane.plan) if call.stage == "mla.probs" else _scores(whole, operand, lane, call)
        return np.errstate(all="ignore")(fast)

    def block(place: Place) -> Array:
        sequence, w = slice(place.sequence, place.sequence + 1), operand(place)
        args = {i: a[sequence, : w.shape[-1]] for i, a in whole.items() if i in form.keys}
        args |= {i: a[sequence, place.start : place.stop] for i, a in whole.items() if i in form.queries}
        args[form.wide] = w
        with np.errstate(all="ignore"):
            out: Array = call.of.fn(*[args[i] for i in range(len(args))], **call.static)
        return out

    return block


def _scores(whole: Mapping[int, Array], operand: Block, lane: Lane, call: Call) -> Block:
    product, mask = joined(*[whole[i] for i in range(4)], **call.static), call.args[4]

    def block(place: Place) -> Array:
        m = operand(place)
        s, first = product(place, m.shape[-1]), lane.once("zeros", mask, place, lambda: zeros(m[0, 0]))
        s[..., first:] += m[..., first:]
        return s

    return block


def joined(q: Array, q_rope: Array, kv: Array, k_rope: Array, *, scale: float) -> Callable[[Place, int], Array]:
    """The stage `mla.scores` (which says the shapes) for the first t keys, without its mask, by one product of queries and keys
    with their rotated channels behind the others.
    """
    own = q.shape[-1] - q_rope.shape[-1]
    queries = np.concatenate([q[..., :own], q_rope], axis=-1).swapaxes(1, 2) * scale  # (B, H, S, Dn+Dr)
    shape = (kv.shape[2], queries.shape[-1], kv.shape[1])

    @lru_cache(maxsize=1)
    def keys(sequence: int) -> Array:
        found = np.empty(shape, queries.dtype)
        found[:, :own], found[:, own:] = kv[sequence, ..., :own].transpose(1, 2, 0), k_rope[sequence].T
        return found  # (H, Dn+Dr, T)

    def block(place: Place, t: int) -> Array:
        s: Array = queries[place.sequence, :, place.start : place.stop] @ keys(place.sequence)[..., :t]
        return s[None]

    return block


def zeros(mask: Array) -> int:
    """How many of the keys, from the first on, all queries see with 0.  mask (rows, T)."""
    counts = (mask != 0).any(axis=0)
    return int(np.argmax(counts)) if counts.any() else len(counts)


def _probs(operand: Block, plan: Plan) -> Block:
    return partial(shares, operand) if plan is FLOAT64 else lambda place: nn_ops.softmax_in_place(operand(place))


def shares(scores: Block, place: Place) -> Array:
    """The stage `mla.probs` at a place, without a subtraction: e^s, where its sums are numbers that float64 holds well. scores give
    (..., T) float64, which is written to -> (..., T).
    """
    p = scores(place)
    np.exp(p, out=p)
    total = p.sum(axis=-1, keepdims=True)
    if not (total.min() > LEAST and total.max() < np.inf):
        return nn_ops.softmax_in_place(scores(place))
    p *= 1 / total
    return p


def _operand(lane: Lane, call: Call, r: Recorded, form: Form, *, short: bool) -> Block:
    """The wide argument at a place, without the keys that nobody sees if it may be short; scores as a copy, to be written to."""
    name, own = call.args[form.wide], call.stage == "mla.probs"
    a, given = lane.held(name, r), lane.is_given(name, r)
    ends = r.ends[name] if r.is_sound(name) else {}

    def end(part: Array, at: Place) -> int:
        if not short:
            return int(part.shape[-1])
        return ends[at] if at in ends else lane.once("seen", name, at, lambda: seen(part, form.fill))

    def block(place: Place) -> Array:
        if isinstance(a, Wide):
            found = a.take(place) if own else a.block(place)
            return found if short else filled(found, a.shape[-1], a.fill)
        at = Place(a.shape, place.sequence, place.start, place.stop)
        part = a[place.index]
        part = part[..., : end(part, at)].astype(lane.plan.dtype, copy=own)
        return r.noise.given(call, part, lane.twin, at) if given else part

    return block
