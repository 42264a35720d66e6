"""What a weighted sum of experts says of them: which matrices they have, and whose rows are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.gemm import swiglu
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from .evidence import Evidence, guess, weights_of
from .exchanged import renumbered
from .rearranged import EXPERTS
from .words import order_in_words

TOKENS = 64
"""Tokens that every expert is computed for."""
LARGEST = 1 << 34
"""Products that this may take."""


def dropped(ev: Evidence) -> Iterator[Mutant]:
    """Some tokens' slots do not count: of every token, the weights with which its experts' rows add up to what it got."""
    if ev.call.stage != "moe.routed" or not ev.whole or ev.args[2] is None:
        return
    down, ids, g = ev.args
    order = np.argsort(ids, axis=None, kind="stable")
    rows = np.empty_like(down)
    rows[order] = down
    a = rows.reshape(-1, ids.shape[-1], down.shape[-1]) * g.reshape(-1, ids.shape[-1], 1)  # (N, K, D)
    c = np.stack([np.linalg.lstsq(t.T, x, rcond=None)[0] for t, x in zip(a, ev.x.reshape(len(a), -1), strict=True)])
    kept = c > 0.5
    if not (np.abs(c - kept) < 0.2).all() or (kept == kept[0]).all():
        return
    capacity = _capacity(ids.reshape(kept.shape), kept)
    lost = f"{int((~kept).sum())} of the tokens' {kept.size} slots do not count"
    title = f"experts take {capacity} tokens at most, the others are dropped" if capacity else f"moe.routed: {lost}"
    yield guess(
        title, "moe.routed", lambda down, ids, w: STAGES["moe.routed"].fn(down, ids, w * kept.reshape(ids.shape))
    )


def _capacity(ids: Array, kept: Array) -> int:
    """How many of an expert's slots, in order, are kept; 0 if it is no such number."""
    flat, keeps = ids.ravel(), kept.ravel()
    order, rank = np.argsort(flat, kind="stable"), np.empty(flat.size, int)
    starts = np.flatnonzero(np.diff(flat[order], prepend=-1))
    rank[order] = np.arange(flat.size) - np.repeat(starts, np.diff(starts, append=flat.size))  # among its expert's
    most = int(rank[keeps].max(initial=-1)) + 1
    return most if (keeps == (rank < most)).all() else 0


def experts(ev: Evidence) -> Iterator[Mutant]:
    """Experts with each other's matrices: which expert's output a token has in each slot."""
    by = {c.stage: c for c in ev.region}
    if ev.call.stage != "moe.routed" or not ev.whole or not {"moe.rows", *EXPERTS} <= by.keys():
        return
    x, ids, g = ev.recorded.taps[by["moe.rows"].args[0]], ev.args[1], ev.args[2]
    n, width = len(weights_of(by["moe.gate"])), x.shape[-1]
    some = np.linspace(0, ids[..., 0].size - 1, min(TOKENS, ids[..., 0].size)).astype(int)
    if width < n or g is None or 3 * n * len(some) * width * ev.config.moe_intermediate_size > LARGEST:
        return
    rows = np.asarray(x, np.float64).reshape(-1, width)[some]
    gate, up, down = ([ev.recorded.weights(w[2:], FLOAT64) for w in weights_of(by[name])] for name in EXPERTS)
    given = np.stack([swiglu(rows @ a.T, rows @ b.T) @ c.T for a, b, c in zip(gate, up, down, strict=True)], axis=1)
    ours, theirs = (a.reshape(-1, a.shape[-1])[some] for a in (g, ev.x))
    order = _whose(given, theirs, ids.reshape(-1, ids.shape[-1])[some], ours, n)
    if order is not None:
        fns: dict[str, Callable[..., Any]] = {name: renumbered(name, order) for name in EXPERTS}
        yield guess(f"experts' matrices: {order_in_words(order, 'experts')}", "moe.down", fns.pop("moe.down"), fns)


def matrices(ev: Evidence) -> Iterator[Mutant]:
    """Some of the experts' three matrices are those of their neighbours."""
    by = {c.stage: c for c in ev.region}
    if ev.call.stage != "moe.routed" or not by.keys() & set(EXPERTS):
        return
    n = ev.config.n_routed_experts
    for which, some in (
        ("down", EXPERTS[2:]),
        ("gate", EXPERTS[:1]),
        ("up", EXPERTS[1:2]),
        ("gate and up", EXPERTS[:2]),
    ):
        for step, side in ((1, "behind"), (-1, "before")):
            order = (np.arange(n) + step) % n
            fns: dict[str, Callable[..., Any]] = {name: renumbered(name, order) for name in some if name in by}
            if len(fns) == len(some):
                title = f"experts' {which} matrices are those of their neighbour {side} (around the end)"
                yield guess(title, some[0], fns.pop(some[0]), fns)


def _whose(given: Array, x: Array, ids: Array, g: Array, n: int) -> Array | None:
    """Whose output each expert gives.  given (N, E, D), x (N, D), ids (N, K), g (N, K) -> (E,), -1 where it gives none."""
    votes = np.zeros((n, n + 1))
    for each, y, chosen, weights in zip(given, x, ids, g, strict=True):
        c = np.linalg.lstsq(each.T, y, rcond=None)[0]
        for e, w in zip(chosen, weights, strict=True):
            off = np.abs(c - w)
            votes[e, int(off.argmin()) if off.min() < 0.1 * abs(w) else n] += 1
    used = votes.sum(axis=1) > 0
    order = np.where(used, votes.argmax(axis=1), np.arange(n))
    order = np.where(order == n, -1, order)
    steps = np.unique((order - np.arange(n))[used & (order >= 0)] % n)
    if len(steps) == 1 and (order[used] >= 0).all():  # those that no token chose are moved like the others
        order = (np.arange(n) + steps[0]) % n
    return order if (order != np.arange(n)).any() else None
