"""The arrangement of a tap that is wrong in every arrangement, so that what reads it is judged on it as its reader has it.

A mistake does not keep a candidate from arranging its numbers otherwise. Then no arrangement fits, and yet one of them is that in
which the candidate's own later stages read the tap. It is told by what most mistakes leave as it is: that no key is masked, how
large queries are, by how much which expert's output was multiplied. What is supposed here counts only if less is blamed with it,
and something still is (`judge`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import Call

from .fused import ANGLE, replayed, sine
from .gauges import LATER, SCORES, SLOTS, TURNED, UNMASKED, Alternative, by_rank, swap_pairs, unmasked
from .lanes import Lane, Recorded
from .program import names, owner
from .shares import ROOTED, SCALED_K, SCALED_Q, Share, base2, shares_of

SUPPOSED = "whatever is only supposed"
"""Stands for all of it where gauges are told that are not to be tried."""
RANGE = 2.5
"""A wrong softmax scale is not further from the right one, either way; what else a tap may be multiplied by is."""
EXACTLY = 2.0**-5
"""A share with log2 e in it is not further off."""
CLEARLY = 0.5
"""Of the angle between the weights recorded and those that experts were given, no more than this is left in the right order."""
NEAR = 0.05
"""Sine of the angle by which weights may be turned where near ones change places."""
_LINEAR = ("moe.act", "moe.down", "moe.routed", "moe.out")
"""Stages that are linear in the routing weights, but for what they add."""


def supposed(call: Call, x: Array, exact: Array, c: Config, partner: Collection[str]) -> Iterator[Alternative]:
    """What to declare, and a tap that no arrangement explains in the one that it is likely to have; `partner` is what was found of
    the rotated keys, if it is the queries, of both, if it is the scores.
    """
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    if call.stage in SCORES:
        masked, two = unmasked(x, exact), base2(partner)
        what, y = ((), x) if masked is None else ((UNMASKED,), masked)
        if two:  # queries or keys hold the log2 e already
            yield (*what, two.what), y / x.dtype.type(two.factor(c.softmax_scale))
        elif what:
            yield what, y
    tap = call.tap.rpartition("/")[2]
    if tap in ("mla.q", "mla.q_rope", "mla.k_rope") and SCALED_K not in partner:  # else the keys have it
        factor = _ratio(x, exact)
        share, away = _nearest(tap, factor, c.softmax_scale, partner)
        if away < np.log(RANGE) and abs(factor - 1) > 2.0**-7:  # a wrong rotation changes no row's size
            orders = [((), x), *[((TURNED,), swap_pairs(x, to_interleaved=w)) for w in (True, False) if "rope" in tap]]
            order, y = min(orders, key=lambda one: (sine(one[1], exact) >= ANGLE, len(one[0])))
            yield (*order, share.what), y / x.dtype.type(factor)


def _nearest(tap: str, factor: float, scale: float, partner: Collection[str]) -> tuple[Share, float]:
    """The share of the softmax scale that q or k may have which is nearest to that factor, and how far off it is (its logarithm).
    Log2 e is in it only if it is to a few per cent: a wrong scale is not.
    """
    wanted = {ROOTED, SCALED_K} if tap == "mla.k_rope" else {ROOTED if ROOTED in partner else SCALED_Q}
    away = {s: abs(float(np.log(factor / s.factor(scale)))) for s in shares_of(tap)}
    return min([(s, d) for s, d in away.items() if s.what in wanted or d < EXACTLY], key=lambda one: one[1])


def by_use(program: list[Call], r: Recorded, tap: str, x: Array, scale: float) -> Alternative | None:
    """Routing weights x (B, S, K) as the candidate's own experts were weighted: in another order, or scaled only then; None where
    that is not told, or they are as they were recorded.

    The first recorded tap behind them is linear in them, so that least squares give the weight of every slot of the ids.
    """
    region, reader = _readers(program, r, tap)
    ids = r.taps.get(f"{owner(tap)}/router.ids")
    if reader is None or ids is None or ids.shape != x.shape:
        return None
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32)
    used = fitted(_responses(program, r, region, tap, x), r.taps[reader.tap], reader, ids).reshape(x.shape)
    placed, what = by_rank(x, used), list[str]()
    if sine(placed, used) < CLEARLY * sine(x, used):
        what, x = [SLOTS], placed
    if scale != 1 and abs(_ratio(used, x) / scale - 1) < 2.0**-5 and sine(used, x) < ANGLE:
        what, x = [*what, LATER], x * x.dtype.type(scale)
    return (tuple(what), x) if what else None


def as_ours(tap: str, x: Array, ours: Array, r: Recorded) -> Array:
    """Weights in the order of ours where nobody knows theirs, or roundings alone may have changed it; else x as it is."""
    if tap not in r.withdrawn and tap not in r.placed:
        return x
    other = by_rank(x, ours)
    return other if tap in r.withdrawn or sine(other, x) < NEAR else x


def _ratio(x: Array, y: Array) -> float:
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(x.astype(np.float64)) / np.linalg.norm(y.astype(np.float64)))


def _readers(program: list[Call], r: Recorded, tap: str) -> tuple[list[Call], Call | None]:
    """The calls that follow from a tap, up to the first that was recorded, and that one, if all are linear in it."""
    region, follow = list[Call](), {tap}
    for call in program:
        if follow & set(names(call.args)):
            if call.stage not in _LINEAR or call.own is not None:
                break
            region.append(call)
            follow.add(call.tap)
            if call.tap in r.taps:
                return region, call
    return region, None


def _responses(program: list[Call], r: Recorded, region: list[Call], tap: str, x: Array) -> list[Array]:
    """What the region gives if the weights are 0, then for every slot if its weight alone is 1."""
    inside = {tap, *[call.tap for call in region]}
    read = {n for call in region for n in names(call.args)} - inside
    missing = {n for n in read if n not in r.taps and n not in r.inputs and not n.startswith("w/")}
    known = dict(replayed(program, r, missing)) if missing else {}
    given = replace(r, taps={t: a for t, a in r.taps.items() if t not in inside})
    found = []
    for slot in range(-1, x.shape[-1]):
        only = np.broadcast_to(np.arange(x.shape[-1]) == slot, x.shape).astype(np.float32)
        lane = Lane(FLOAT32, values={**known, tap: only})
        for call in region:
            lane.values[call.tap] = lane.run(call, given)
        found.append(np.asarray(lane.values[region[-1].tap]))
    return found


def fitted(responses: list[Array], y: Array, reader: Call, ids: Array) -> Array:
    """The weights (N, K) with which the responses add up to y best, token by token."""
    nothing, *slots = (_by_token(a, reader, ids).astype(np.float64) for a in (*responses, y))
    *slots, y = (a - nothing for a in slots)
    basis = np.stack(slots, axis=-1)  # (N, D, K)
    gram, right = np.einsum("ndk,ndl->nkl", basis, basis), np.einsum("ndk,nd->nk", basis, y)
    least = 1e-12 * np.trace(gram, axis1=1, axis2=2)[:, None, None] + np.finfo(np.float64).tiny
    found: Array = np.linalg.solve(gram + least * np.eye(len(slots)), right[..., None])[..., 0]
    return np.nan_to_num(found)


def _by_token(a: Array, call: Call, ids: Array) -> Array:
    """A row for every token: dispatched rows lie by expert, then by token."""
    tokens = ids.size // ids.shape[-1]
    if call.of.shape.startswith("M "):
        rows = np.empty_like(a)
        rows[np.argsort(ids, axis=None, kind="stable")] = a
        a = rows
    return np.nan_to_num(a.reshape(tokens, -1))
