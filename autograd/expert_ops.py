"""Primitives of a mixture of experts: sort tokens by expert, multiply each group by its own matrix, add up the
results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np

from .nn_ops import once, product, swiglu
from .ops import Result
from .tensor import Array, Vjp, primitive


def by_expert(ids: Array, n_experts: int) -> tuple[Array, Array, Array]:
    """Dispatch order of ids (N, K): rows sorted by expert, then by token and slot.

    -> order (N K,): row -> flat slot; inverse (N, K): slot -> row; ends (E,): where each expert's rows end.
    """
    flat = ids.reshape(-1)
    order = np.argsort(flat, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), like=order)
    ends = np.cumsum(np.bincount(flat, minlength=n_experts))
    return order, inverse.reshape(-1, ids.shape[-1]), ends


def expert_spans(ids: Array, n_experts: int) -> list[slice]:
    """Where each expert's rows lie in dispatch order.  ids (..., K) -> E slices."""
    ends = np.cumsum(np.bincount(ids.reshape(-1), minlength=n_experts))
    return [slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@primitive
def dispatch(x: Array, ids: Array, *, n_experts: int) -> Result:
    """rows[m] = x[token of m], sorted by expert.  x (..., D), ids (..., K) -> rows (M, D), M = N K."""
    k = ids.shape[-1]
    order, inverse, _ = by_expert(ids, n_experts)
    before = x.shape

    def vjp_x(drows: Array) -> Array:
        dx = drows[inverse[:, 0]]
        for slot in range(1, k):
            dx += drows[inverse[:, slot]]
        return dx.reshape(before)

    return x.reshape(-1, x.shape[-1])[order // k], (vjp_x, None)


@primitive
def grouped_linear(rows: Array, ids: Array, *ws: Array, again: Callable[[], Array] | None = None) -> Result:
    """y[m] = rows[m] w_e(m)T, one matrix per expert.  rows (M, D), ids (..., K), E times w (F, D) -> y (M, F).

    Experts without rows are not touched, so a lazily read matrix of theirs is never read. `again`: as in `linear`.
    """
    spans = expert_spans(ids, len(ws))
    busy = [e for e, s in enumerate(spans) if s.start < s.stop]
    y = np.empty_like(rows, shape=(len(rows), ws[0].shape[0]))
    for e in busy:
        y[spans[e]] = product(rows[spans[e]], ws[e])  # Fprop
    before = rows.shape

    def dgrad(dy: Array) -> Array:
        drows = np.empty_like(dy, shape=before)
        for e in busy:
            np.matmul(dy[spans[e]], ws[e], out=drows[spans[e]])
        return drows

    def wgrad_of(e: int, kept: Callable[[], Array]) -> Vjp:
        return lambda dy: dy[spans[e]].T @ kept()[spans[e]]

    kept = again or partial(_same, rows)
    return y, (dgrad, None, *[wgrad_of(e, kept) for e in range(len(ws))])


def _same(x: Array) -> Array:
    return x


@primitive
def combine(rows: Array, ids: Array, weights: Array) -> Result:
    """y[t] = sum_k weights[t, k] rows[row of (t, k)], ascending expert id.  rows (M, D), ids (..., K), weights (...,
    K) -> y (..., D).
    """
    n_slots = ids.shape[-1]
    order, inverse, _ = by_expert(ids, int(ids.max(initial=-1)) + 1)
    slot = np.argsort(ids.reshape(-1, n_slots), axis=-1, kind="stable")  # the stated order of the sum
    where, w = np.take_along_axis(inverse, slot, -1), np.take_along_axis(weights.reshape(-1, n_slots), slot, -1)
    y = rows[where[:, 0]] * w[:, :1]
    for k in range(1, n_slots):
        y += rows[where[:, k]] * w[:, k : k + 1]
    dispatched = once(lambda dy: dy.reshape(-1, rows.shape[-1])[order // n_slots])

    def vjp_rows(dy: Array) -> Array:
        return dispatched(dy) * weights.reshape(-1)[order][:, None]

    def vjp_weights(dy: Array) -> Array:
        dw = np.empty_like(weights).reshape(-1)
        dw[order] = np.einsum("md,md->m", dispatched(dy), rows)
        return dw.reshape(weights.shape)

    return y.reshape(*ids.shape[:-1], rows.shape[-1]), (vjp_rows, None, vjp_weights)


def feed_forward(
    x: Array, ids: Array, weights: Array, experts: Sequence[tuple[Array, Array, Array]], *, early: bool = False
) -> Array:
    """y[t] = sum_k weights[t, k] down_k(silu(gate_k x_t) up_k x_t), ascending expert id.  x (..., D), ids (..., K) all different,
    weights (..., K), E triples gate (F, D), up (F, D), down (D, F) -> y (..., D).

    The fused, faster form of `dispatch`, three `grouped_linear`, `swiglu` and `combine`, for arrays that nobody differentiates:
    one expert at a time, whose rows stay in the processor's cache. The same bits. `early`: weights before `down`.
    """
    flat, k, rows = ids.reshape(-1), ids.shape[-1], x.reshape(-1, x.shape[-1])
    order = np.argsort(flat, kind="stable")
    sent, tokens, g = flat[order], order // k, weights.reshape(-1)[order][:, None]
    y = np.zeros_like(rows)
    cuts = [0, *(np.flatnonzero(sent[1:] != sent[:-1]) + 1).tolist(), len(sent)]
    for a, b in pairwise(cuts):
        gate, up, down = experts[sent[a]]
        mine = tokens[a:b]
        some = rows[mine]
        act = swiglu(product(some, gate), product(some, up))
        out = product(act * g[a:b], down) if early else product(act, down) * g[a:b]
        y[mine] += out
    return y.reshape(x.shape)
