"""Arrangements that a candidate may legally choose and that no shape betrays: tried by value where a tap does not fit as it is.

A gauge is legal only if it is used on both sides of what it cancels in: the same order of rotated channels in q and k. What is
accepted is said with what to declare.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import permutations

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.fp8_parts import SCALE, group_major
from refimpl.layers.stage import Call

from .likelihoods import as_logits
from .lse import LSE, in_other_units
from .shares import shares_of, whole
from .wide import MASKED

Alternative = tuple[tuple[str, ...], Array]
"""What to declare, one gauge or two at once, and the tap in our arrangement."""
SLOTS = "routing weights in another order than the ids: matched by value"
TURNED = "rotated channels in the other order"
LATER = "the routed scaling factor is applied after the experts"
MEANS = "group scores are the mean of the two best, whose sum orders groups alike"
UNMASKED = "scores are those before the mask"
FILLED = "what is chosen by is masked: groups that were not kept hold {}"
SCORES = ("mla.scores", "mla.scores_absorbed")
ROPE_TAPS = ("mla.q_rope", "mla.k_rope", "cache.k_rope")


def alternatives(call: Call, x: Array, exact: Array, c: Config) -> Iterator[Alternative]:
    """Other readings of a tap, in our arrangement: first in one way, then in two at once."""
    x = x.astype(np.float64 if x.dtype == np.float64 else np.float32)  # what is undone must not round again
    orders, factors = list(_orders(call, x, exact, c)), list(_factors(call, c))
    for what, y in orders:
        yield (what,), y
    for what, factor in factors:
        yield (what,), x * x.dtype.type(factor)
    for what, y in orders:
        for more, factor in factors:
            yield (what, more), y * x.dtype.type(factor)
    if call.stage == "logits":
        yield from _each(as_logits(x, exact))
    if call.stage == LSE:
        yield from _each(in_other_units(x, c.softmax_scale))
    if call.stage == SCALE and x.shape[-1] > 1:
        yield ("activation scales group-major: token t of tile g at [g, t]",), group_major(x)
    for order in permutations(range(x.ndim)):
        turned = x.transpose(order) if order != tuple(range(x.ndim)) else None
        if turned is not None and turned.shape == x.shape:
            yield (f"axes in the order {' '.join(map(str, order))}",), turned


def _orders(call: Call, x: Array, exact: Array, c: Config) -> Iterator[tuple[str, Array]]:
    """Orders of the last axis, and what hides some of it."""
    if call.stage == "router.weights":
        yield SLOTS, by_rank(x, exact)
    if call.tap.rpartition("/")[2] in ROPE_TAPS:
        for to_interleaved in (True, False):
            yield TURNED, swap_pairs(x, to_interleaved=to_interleaved)
    if call.stage == "router.choice":
        yield from in_kept_groups(x, exact, c)
    if call.stage in SCORES and (masked := unmasked(x, exact)) is not None:
        yield UNMASKED, masked


def _factors(call: Call, c: Config) -> Iterator[tuple[str, float]]:
    """What a tap that was divided by something, or not multiplied by it, is to be multiplied by."""
    if call.stage == "router.weights" and c.routed_scaling_factor != 1:
        yield LATER, c.routed_scaling_factor
    if call.stage == "router.group_scores":
        yield MEANS, 2.0
    yield from ((s.what, 1 / s.factor(c.softmax_scale)) for s in shares_of(call.tap))


def _each(found: Iterable[tuple[str, Array]]) -> Iterator[Alternative]:
    return (((what,), y) for what, y in found)


def unmasked(x: Array, exact: Array) -> Array | None:
    """Scores before the mask as those behind it; None if they are none: of no key, not of one, as a wrong mask hides the others."""
    hidden = np.isneginf(exact)
    return np.where(hidden, -np.inf, x).astype(x.dtype) if hidden.any() and (x[hidden] > MASKED).all() else None


def in_kept_groups(x: Array, exact: Array, c: Config) -> Iterator[tuple[str, Array]]:
    """What is chosen by (B, S, E) where every token's groups but `topk_group` hold one number, with ours in its place."""
    groups = x.reshape(*x.shape[:-1], c.n_group, -1)
    for hole in (-np.inf, 0.0):
        left = (groups == hole).all(axis=-1)
        if (left.sum(axis=-1) == c.n_group - c.topk_group).all() and left.any():
            filled: Array = np.where(np.repeat(left, groups.shape[-1], axis=-1), exact, x)
            yield FILLED.format(hole), filled.astype(x.dtype)


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


def beside(tap: str) -> str:
    """Of a layer's rotated queries and keys the other one's tap, "" for other taps."""
    return partner_of(tap) or (tap.removesuffix("mla.k_rope") + "mla.q_rope" if tap.endswith("/mla.k_rope") else "")


def broken(accepted: Mapping[str, tuple[str, ...]], taps: Collection[str]) -> set[str]:
    """Rotated taps that were not turned, or not scaled, as their partner is: q in the other order and k not, the scale in both of
    them. `accepted` is tap -> what was accepted of it.
    """
    found = set[str]()
    for q, k in [(t, partner_of(t)) for t in taps if partner_of(t) in taps]:
        of_q, of_k = (accepted.get(t, ()) for t in (q, k))
        if (TURNED in of_q) != (TURNED in of_k):
            found |= {t for t, what in ((q, of_q), (k, of_k)) if TURNED in what}
        if not whole(of_q, of_k):
            found |= {q, k} & set(accepted)
    return found
