"""Arrangements that a candidate may legally choose and that no shape betrays: tried by value where a tap does not fit as it is.

A gauge is legal only if it is used on both sides of what it cancels in: the same order of rotated channels in q and k. What is
accepted is said with what to declare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import permutations

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.fp8_parts import SCALE, group_major
from refimpl.layers.stage import Call

from .likelihoods import as_logits
from .lse import LSE, in_other_units
from .wide import MASKED

Alternative = tuple[str, Array]
"""What to declare, and the tap in our arrangement."""
ROPE_TAPS = ("mla.q_rope", "mla.k_rope", "cache.k_rope")


def alternatives(call: Call, x: Array, exact: Array, c: Config) -> Iterator[Alternative]:
    """Other readings of a tap, in our arrangement."""
    tap = call.tap.rpartition("/")[2]
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32)  # what is undone must not round again
    if call.stage == "router.weights":
        yield "routing weights in another order than the ids: matched by value", by_rank(x, exact)
        if c.routed_scaling_factor != 1:
            yield "the routed scaling factor is applied after the experts", x * x.dtype.type(c.routed_scaling_factor)
    if tap in ROPE_TAPS:
        for to_interleaved in (True, False):
            yield "rotated channels in the other order", swap_pairs(x, to_interleaved=to_interleaved)
    if tap in ("mla.q_rope", "mla.q"):
        yield "the softmax scale is multiplied into q", x / x.dtype.type(c.softmax_scale)
    if tap in ("mla.q_rope", "mla.k_rope", "mla.q"):
        yield "the root of the softmax scale is multiplied into q and k", x / x.dtype.type(c.softmax_scale**0.5)
    if call.stage in ("mla.scores", "mla.scores_absorbed"):
        hidden = np.isneginf(exact)
        if hidden.any() and (x[hidden] > MASKED).all():  # of no key, not of one: a wrong mask hides the others
            yield "scores are those before the mask", np.where(hidden, -np.inf, x).astype(x.dtype)
    if call.stage == "logits":
        yield from as_logits(x, exact)
    if call.stage == LSE:
        yield from in_other_units(x, c.softmax_scale)
    if call.stage == SCALE and x.shape[-1] > 1:
        yield "activation scales group-major: token t of tile g at [g, t]", group_major(x)
    for order in permutations(range(x.ndim)):
        turned = x.transpose(order) if order != tuple(range(x.ndim)) else None
        if turned is not None and turned.shape == x.shape:
            yield f"axes in the order {' '.join(map(str, order))}", turned


def swap_pairs(x: Array, *, to_interleaved: bool) -> Array:
    """The two halves of the last axis as interleaved pairs, or the other way."""
    half = x.shape[-1] // 2
    y = np.empty_like(x)
    if to_interleaved:
        y[..., 0::2], y[..., 1::2] = x[..., :half], x[..., half:]
    else:
        y[..., :half], y[..., half:] = x[..., 0::2], x[..., 1::2]
    return y


def by_rank(x: Array, like: Array) -> Array:
    """x along the last axis in the order that `like` has: its largest where `like` has its largest."""
    place = np.argsort(np.argsort(-like, axis=-1, kind="stable"), axis=-1, kind="stable")
    return np.take_along_axis(-np.sort(-x, axis=-1), place, axis=-1)


def partner_of(tap: str) -> str:
    """The rotated keys' tap of a layer's rotated queries, "" for other taps."""
    return tap.removesuffix("mla.q_rope") + "mla.k_rope" if tap.endswith("/mla.q_rope") else ""


def broken(accepted: dict[str, str], taps: Iterable[str]) -> set[str]:
    """Rotated taps whose order is not that of their partner: q in the other order and k not, or the other way. `accepted` is
    tap -> what was accepted of it.
    """
    other = "rotated channels in the other order"
    found = set()
    for tap in taps:
        if (partner := partner_of(tap)) in taps and (accepted.get(tap) == other) != (accepted.get(partner) == other):
            found |= {t for t in (tap, partner) if accepted.get(t) == other}
    return found
