"""Running a stage of attention a block of queries at a time (`wide`), in any lane."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers import mla
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import Call

from .holes import torn
from .lanes import Lane, Recorded
from .program import names
from .wide import FORMS, Form, Place, Wide, filled, is_large, places, seen

LARGE = 500.0
"""float64 holds e^709, and e^-709 beside it."""
Block = Callable[[Place], Array]


def run(lane: Lane, call: Call, r: Recorded, *, keep: int = 0) -> Array | Wide:
    """The call's stage in this lane. What is wide and large comes as a `Wide` that keeps its blocks so."""
    if not by_blocks(lane, call, r):
        return lane.run(call, r)
    form, shape, block = FORMS[call.stage], grid(lane, call, r), blocks(lane, call, r)
    if form.gives is not None:
        return Wide(shape, np.dtype(lane.plan.dtype), form.gives, block, keep)
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
    if lane.twin is None and call.stage == "mla.scores":
        made = joined(*[whole[i] for i in range(4)], **call.static)
        return np.errstate(all="ignore")(lambda place: made(place, operand(place)))
    if lane.plan is FLOAT64 and call.stage == "mla.probs":
        return np.errstate(all="ignore")(lambda place: shares(operand(place)))

    def block(place: Place) -> Array:
        sequence, w = slice(place.sequence, place.sequence + 1), operand(place)
        args = {i: a[sequence, : w.shape[-1]] for i, a in whole.items() if i in form.keys}
        args |= {i: a[sequence, place.start : place.stop] for i, a in whole.items() if i in form.queries}
        args[form.wide] = w
        with np.errstate(all="ignore"):
            out: Array = call.of.fn(*[args[i] for i in range(len(args))], **call.static)
        return out

    return block


def joined(q: Array, q_rope: Array, kv: Array, k_rope: Array, *, scale: float) -> Callable[[Place, Array], Array]:
    """The stage `mla.scores` (which says the shapes) by one product of queries and keys with their rotated channels behind the
    others, a mask (1, 1, rows, t) added where it is not 0.
    """
    own = q.shape[-1] - q_rope.shape[-1]
    queries = np.concatenate([q[..., :own], q_rope], axis=-1).swapaxes(1, 2) * scale  # (B, H, S, Dn+Dr)
    shape = (kv.shape[2], queries.shape[-1], kv.shape[1])

    @lru_cache(maxsize=1)
    def keys(sequence: int) -> Array:
        found = np.empty(shape, queries.dtype)
        found[:, :own], found[:, own:] = kv[sequence, ..., :own].transpose(1, 2, 0), k_rope[sequence].T
        return found  # (H, Dn+Dr, T)

    def block(place: Place, mask: Array) -> Array:
        s: Array = queries[place.sequence, :, place.start : place.stop] @ keys(place.sequence)[..., : mask.shape[-1]]
        counts = (mask != 0).any(axis=(0, 1, 2))
        first = int(np.argmax(counts)) if counts.any() else len(counts)
        s[..., first:] += mask[0, ..., first:]
        return s[None]

    return block


def shares(s: Array) -> Array:
    """The stage `mla.probs` without a subtraction: where no score is large, e^s overflows as little as e^(s - max s).  s (..., T)
    float64 -> (..., T).
    """
    if not np.abs(s.max(axis=-1)).max() < LARGE:
        return np.asarray(mla.probs.fn(s))
    p: Array = np.exp(s)
    p *= 1 / p.sum(axis=-1, keepdims=True)
    return p


def _operand(lane: Lane, call: Call, r: Recorded, form: Form, *, short: bool) -> Block:
    """The wide argument at a place, without the keys that nobody sees if it may be short."""
    name = call.args[form.wide]
    a, given = lane.held(name, r), lane.is_given(name, r)
    ends = r.ends[name] if r.is_sound(name) else {}

    def block(place: Place) -> Array:
        if isinstance(a, Wide):
            found = a.block(place)
            return found if short else filled(found, a.shape[-1], a.fill)
        own = Place(a.shape, place.sequence, place.start, place.stop)
        part = a[place.index]
        if short and own in ends:
            part = part[..., : ends[own]]
        elif short:
            if part.dtype.itemsize < 4:
                part = part.astype(np.float32)  # exact, and quicker to look through
            part = part[..., : seen(part, form.fill)]
        return r.noise.given(call, part.astype(lane.plan.dtype, copy=False), lane.twin, own) if given else part

    return block
