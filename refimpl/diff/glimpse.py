"""Twins on a part of a tap's rows, which is mostly enough.

What a tap may be off is four times the worst row of its twins, and a maximum over some rows is no more than that over all. So a
tap that is within four times what a part of a twin errs is within what all of it would allow: no other verdict could come of
making the rest. Only where no part suffices are twins made whole. The part is moved as the whole is; a product of fewer rows may be
summed in another order, as a candidate's may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from . import rows
from .lanes import Lane, Recorded
from .wide import FORMS, Place, Wide, filled, places

SHARE = 8
"""One of so many tokens, or experts, is looked at."""
LEAST = 1 << 8
"""Tokens from which on a part of them is looked at."""
_GROUPED = ("moe.gate", "moe.up", "moe.down")
_BY_TOKENS = (
    *("mla.q_a", "mla.kv_a", "mla.q", "mla.kv_b", "attn_out", "router.logits", "logits", "mtp.proj"),
    *("mlp.gate", "mlp.up", "mlp.down", "shared.gate", "shared.up", "moe.shared"),
)
"""Products, of which a token's row knows of no other: the first argument is (B, S, ...), as is the output; others are weights."""


@dataclass(frozen=True)
class Glimpse:
    """Rows of a tap: which (an index of its leading axes, or a block of a wide one), and what the twin has there."""

    where: Place | tuple[Any, ...]
    values: Array

    def of(self, e: Array | Wide) -> tuple[Array, Array]:
        """The twin's values and the same rows of another array."""
        if not isinstance(e, Wide):
            return self.values, e[self.index]
        assert isinstance(self.where, Place)
        a, b = self.values, e.block(self.where)
        n = max(a.shape[-1], b.shape[-1])
        return filled(a, n, e.fill), filled(b, n, e.fill)

    @property
    def index(self) -> tuple[Any, ...]:
        """Of the whole array's leading axes."""
        return self.where.index if isinstance(self.where, Place) else self.where


def glimpse(lane: Lane, call: Call, r: Recorded) -> Glimpse | None:
    """A part of the call's output in a twin's lane; None where there is no use in a part."""
    if rows.by_blocks(lane, call, r):
        place = list(places(rows.grid(lane, call, r)))[-1]  # these queries see most
        values = rows.blocks(lane, call, r)(place)
        if FORMS[call.stage].gives is not None:
            return Glimpse(place, values)
        return Glimpse((slice(place.sequence, place.sequence + 1), slice(place.start, place.stop)), values)
    if call.stage in _BY_TOKENS:
        return _of_tokens(lane, call, r)
    return _of_experts(lane, call, r) if call.stage in _GROUPED else None


def _of_tokens(lane: Lane, call: Call, r: Recorded) -> Glimpse | None:
    b, s = lane.held(call.args[0], r).shape[:2]
    if b * s < LEAST or s < SHARE:
        return None
    some = (slice(None), slice(None, None, SHARE))
    return Glimpse(some, lane.run(call, r, lambda x, *w, **static: call.of.fn(x[some], *w, **static)))


def _of_experts(lane: Lane, call: Call, r: Recorded) -> Glimpse | None:
    """Rows lie by expert, then by token."""
    ids = np.sort(np.asarray(lane.held(call.args[1], r)), axis=None)
    chosen = np.unique(ids)[::SHARE]
    if len(ids) < LEAST:
        return None
    some = np.isin(ids, chosen)
    values = lane.run(call, r, lambda x, _, *w, **static: call.of.fn(x[some], ids[some], *w, **static))
    return Glimpse((some,), values)
