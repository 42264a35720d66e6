"""Our own run with something of the candidate's put into it, from files alone: grafts at some taps, everything after them ours.

Two kinds of graft. A known mistake takes the place of its stage. Of any other tap the *difference* is put in that the candidate's
stage makes on the candidate's own inputs, x - e, added to what our run gives there: so an earlier mistake is not carried along with
a later one, and in a run that is the candidate's up to here the graft gives the candidate's own number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import STAGES, Call

from .corpus import Mutant
from .grounds import Grounds
from .hypothesis import bound
from .lanes import Lane, Recorded
from .program import last_use
from .reading import entries

Graft = Callable[[Call, Lane, Recorded], Array]
"""What a call of our run gives instead: the call, our lane with what it has computed, what was recorded."""


def grafted(g: Grounds, grafts: Mapping[str, Graft], wanted: Callable[[str], bool]) -> dict[str, Array]:
    """Our own float64 run with these grafts (tap -> graft); the taps that are wanted."""
    lane, last, found = Lane(FLOAT64, given=False), last_use(g.forward), {}
    with np.errstate(all="ignore"):
        for i, call in enumerate(g.forward):
            graft = grafts.get(call.tap)
            out = lane.run(call, g.recorded) if graft is None else graft(call, lane, g.recorded)
            lane.values[call.tap] = out
            if wanted(call.tap):
                found[call.tap] = out
            for tap in [t for t in lane.values if last[t] <= i]:
                del lane.values[tap]
    return found


def of_mistake(m: Mutant) -> Graft:
    """The known mistake in its stage's place."""
    return lambda call, lane, r: lane.run(call, r, bound(m, call, lane, r))


def differences(g: Grounds) -> dict[str, Graft]:
    """For every recorded tap, the graft of what the candidate's stage made of the candidate's inputs."""
    lane, last = Lane(FLOAT64), last_use(g.forward)
    found: dict[str, Graft] = {}
    with np.errstate(all="ignore"):
        for i, call in enumerate(g.forward):
            lane.values[call.tap] = e = lane.run(call, g.recorded)
            if call.tap in g.admitted.taps:
                ids = _ids(call, lane, g.recorded)
                found[call.tap] = _Difference(*_against(g, call.tap, e), ids)
            for tap in [t for t in lane.values if last[t] <= i]:
                del lane.values[tap]
    return found


def _against(g: Grounds, tap: str, e: Array) -> tuple[Array, Array]:
    """The candidate's tap and ours on its inputs, in full shape; equal where nothing was recorded."""
    x, pick = g.recorded.taps.get(tap, g.admitted.taps[tap]), g.admitted.picks.get(tap, {})
    if not pick:
        return x, e
    whole = e.copy()
    whole[np.ix_(*entries(e.shape, pick))] = x
    return whole, e


@dataclass(frozen=True)
class _Difference:
    """x and e (of one shape, or ids) and, where slots or dispatched rows depend on them, the ids that they belong to."""

    x: Array
    e: Array
    ids: Array | None

    def __call__(self, call: Call, lane: Lane, r: Recorded) -> Array:
        """Our output, and the difference."""
        ours = lane.run(call, r)
        x, e = self.x, self.e
        if self.ids is not None:
            now = _ids(call, lane, r)
            assert now is not None
            x, e = (rearranged(a, STAGES[call.stage].shape, self.ids, now) for a in (x, e))
        if STAGES[call.stage].compare == "set":
            if x.shape != ours.shape:  # another number of experts a token
                return x
            same = (np.sort(x, axis=-1) == np.sort(e, axis=-1)).all(axis=-1, keepdims=True)
            return np.where(same, ours, x)
        if ours.dtype.kind in "iub":
            return np.where(x == e, ours, x)
        x = x.astype(np.float64)
        plain = np.isfinite(x) & np.isfinite(e)
        return np.where(plain, ours + np.where(plain, x - e, 0), np.where(_alike(x, e), ours, x))


def _alike(x: Array, e: Array) -> Any:
    """Where both are masked, or both are nothing."""
    return (x == e) | (np.isneginf(e) & (x < -9e3)) | (np.isnan(x) & np.isnan(e))


def _ids(call: Call, lane: Lane, r: Recorded) -> Array | None:
    """The experts that a call's slots (last axis K) or rows (first axis M) belong to, None if it has neither."""
    axes = STAGES[call.stage].shape.split()
    if call.stage in ("router.ids", "router.groups") or not axes or (axes[-1] != "K" and axes[0] != "M"):
        return None
    ids: Array = lane.value(f"{call.tap.rpartition('/')[0]}/router.ids", call, r)
    return ids


def rearranged(a: Array, shape: str, before: Array, now: Array) -> Array:
    """An array whose slots or rows belong to the experts `before`, for the experts `now`, of which a token may have another number;
    0 where it had not that expert.
    """
    n, k, m = int(np.prod(before.shape[:-1])), before.shape[-1], now.shape[-1]
    rows = shape.split()[0] == "M"
    flat = a if rows else a.reshape(n * k)[np.argsort(before, axis=None, kind="stable")]
    place = np.full((n, int(max(before.max(), now.max())) + 1), len(flat))
    order = np.argsort(before, axis=None, kind="stable")
    place[order // k, before.reshape(-1)[order]] = np.arange(n * k)
    wanted = np.argsort(now, axis=None, kind="stable") if rows else np.arange(n * m)
    found = np.concatenate([flat, np.zeros_like(flat[:1])])[place[wanted // m, now.reshape(-1)[wanted]]]
    return found if rows else found.reshape(now.shape)
