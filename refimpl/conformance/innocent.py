"""Rewrites that real ports make and that change nothing but roundings: what the suite must not call wrong.

Each is a stage computed another way. Under the tape (gradients) the specification's own form stands in: the rewrites are NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array, Tensor
from refimpl.layers.stage import STAGES

Form = Callable[..., Any]


@dataclass(frozen=True)
class Innocent:
    """id, what is done instead, the stage, the other form."""

    id: str
    what: str
    stage: str
    fn: Form


def _finite(*args: Any, **static: Any) -> Array:
    mask = STAGES["mask"].fn(*args, **static)
    return np.where(np.isneginf(mask), np.asarray(-1e9, mask.dtype), mask)


def _scale_on_q(q: Array, q_rope: Array, kv: Array, k_rope: Array, mask: Array, *, scale: float) -> Array:
    small = np.asarray(scale, q.dtype)
    return np.asarray(STAGES["mla.scores"].fn(q * small, q_rope * small, kv, k_rope, mask, scale=1.0))


def _one_product(q: Array, q_rope: Array, kv: Array, k_rope: Array, mask: Array, *, scale: float) -> Array:
    nope = q.shape[-1] - q_rope.shape[-1]
    keys = np.concatenate([kv[..., :nope], np.broadcast_to(k_rope[:, :, None], (*kv.shape[:3], k_rope.shape[-1]))], -1)
    queries = np.concatenate([q[..., :nope], q_rope], -1)
    return np.asarray(np.einsum("bshd,bthd->bhst", queries, keys) * scale + mask)


def _online(s: Array) -> Array:
    """Blocks of five keys: running maximum and sum, as fused attention keeps them."""
    top, total = np.full(s.shape[:-1], -np.inf, s.dtype), np.zeros(s.shape[:-1], s.dtype)
    for at in range(0, s.shape[-1], 5):
        block = s[..., at : at + 5]
        new = np.maximum(top, block.max(-1))
        safe = np.where(np.isneginf(new), 0, new)
        total = total * np.exp(np.where(np.isneginf(top), -np.inf, top - safe)) + np.exp(block - safe[..., None]).sum(
            -1
        )
        top = new
    unseen = np.isneginf(top)  # a query of padding sees no key
    return np.asarray(np.exp(s - np.where(unseen, 0, top)[..., None]) / np.where(unseen, 1, total)[..., None], s.dtype)


def _exp2(s: Array) -> Array:
    bits = s * np.asarray(np.log2(np.e), s.dtype)
    top = bits.max(-1, keepdims=True)
    p = np.exp2(bits - np.where(np.isneginf(top), 0, top))  # a query of padding sees no key
    return np.asarray(p / np.maximum(p.sum(-1, keepdims=True), np.finfo(s.dtype).tiny))


def _split_keys(p: Array, kv: Array, *, v_dim: int) -> Array:
    half = p.shape[-1] // 2
    parts = [np.einsum("bhst,bthd->bshd", p[..., k], kv[:, k, :, -v_dim:]) for k in (slice(half), slice(half, None))]
    return np.asarray(parts[0] + parts[1])


def _rsqrt(x: Array, w: Array, *, eps: float) -> Array:
    return np.asarray(x * (1 / np.sqrt((x * x).mean(-1, keepdims=True) + np.asarray(eps, x.dtype))) * w)


def _scaled_norm(x: Array, w: Array, *, eps: float) -> Array:
    """Divided by the largest first, so that squares cannot overflow."""
    top = np.maximum(np.abs(x).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    y = x / top
    return np.asarray(y / np.sqrt((y * y).mean(-1, keepdims=True) + eps / top / top) * w, x.dtype)


def _split_k(x: Array, w: Array, b: Array | None = None) -> Array:
    k = x.shape[-1] // 3
    y = x[..., :k] @ w[:, :k].T + x[..., k:] @ w[:, k:].T
    return np.asarray(y if b is None else y + b)


def _heads_first(o: Array, w: Array, b: Array | None = None) -> Array:
    y = np.einsum("bshd,ohd->bso", o, w.reshape(len(w), *o.shape[2:]))
    return np.asarray(y if b is None else y + b)


def _tanh(z: Array, *, func: str) -> Array:
    if func != "sigmoid":
        return np.asarray(STAGES["router.scores"].fn(z, func=func))
    return np.where(z < -10, 1 / (1 + np.exp(-z)), 0.5 + 0.5 * np.tanh(z / 2)).astype(z.dtype)


def _wide_router(x: Array, w: Array) -> Array:
    return np.asarray(x.astype(np.float64) @ w.T.astype(np.float64), x.dtype)


def _silu(gate: Array, up: Array) -> Array:
    return np.asarray(up * (gate / (1 + np.exp(-gate))))


def _complex(q: Array, table: Array, *, interleaved: bool) -> Array:
    x = q[..., -2 * table.shape[-1] :]
    half = x.shape[-1] // 2
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a + 1j * b) * (table[0] + 1j * table[1])[:, :, None]
    pair = np.stack([turned.real, turned.imag], -1 if interleaved else -2)
    return np.asarray(pair.reshape(x.shape), x.dtype)


def _one_hot(tokens: Array, w: Array) -> Array:
    return np.asarray((tokens[..., None] == np.arange(len(w))).astype(w.dtype) @ w)


def _ascending(*args: Any, **static: Any) -> Array:
    return np.sort(STAGES["router.ids"].fn(*args, **static), axis=-1)


def _last_first(down: Array, ids: Array, weights: Array | None) -> Array:
    """Token by token, the highest expert first."""
    flat, place = ids.reshape(-1), np.empty(ids.size, np.int64)
    place[np.argsort(flat, kind="stable")] = np.arange(ids.size)
    rows = down[place].reshape(*ids.shape, -1)
    g = np.ones(ids.shape, down.dtype) if weights is None else weights
    order = np.argsort(-ids, axis=-1)
    y = np.zeros((*ids.shape[:-1], down.shape[-1]), down.dtype)
    for k in range(ids.shape[-1]):
        at = order[..., k : k + 1]
        y += np.take_along_axis(g, at, -1) * np.take_along_axis(rows, at[..., None], -2)[..., 0, :]
    return y


def _scaled_first(s: Array, ids: Array, *, normalise: bool, eps: float, scale: float) -> Array:
    """Renormalised by a sum in another order, scaled before."""
    g = np.take_along_axis(s, ids, -1) * np.asarray(scale, s.dtype)
    total = g[..., ::-1].sum(-1, keepdims=True) / np.asarray(scale, s.dtype) + np.asarray(eps, s.dtype)
    return np.asarray(g / total if normalise else g)


def _sum_other_way(routed: Array, shared: Array) -> Array:
    return np.asarray(shared + routed)


def _blocks_of_vocabulary(x: Array, w: Array) -> Array:
    return np.concatenate([x @ w[at : at + 37].T for at in range(0, len(w), 37)], -1)


INNOCENTS: dict[str, Innocent] = {
    i.id: i
    for i in (
        Innocent("mask-1e9", "masked with -1e9 instead of -inf", "mask", _finite),
        Innocent("scale-on-q", "the softmax scale on the queries", "mla.scores", _scale_on_q),
        Innocent("one-product", "nope and rotated parts in one product", "mla.scores", _one_product),
        Innocent("online-softmax", "the softmax in blocks of keys", "mla.probs", _online),
        Innocent("exp2", "the softmax to base 2", "mla.probs", _exp2),
        Innocent("split-keys", "values summed in two halves", "mla.ctx", _split_keys),
        Innocent("rsqrt", "the norm by a reciprocal root", "attn_norm", _rsqrt),
        Innocent("scaled-norm", "the norm of what was divided by its largest", "ffn_norm", _scaled_norm),
        Innocent("split-k", "the down projection summed in two parts", "mlp.down", _split_k),
        Innocent("heads-first", "the output projection head by head", "attn_out", _heads_first),
        Innocent("tanh", "the sigmoid by tanh", "router.scores", _tanh),
        Innocent("wide-router", "router logits added up in float64", "router.logits", _wide_router),
        Innocent("silu", "silu as a quotient", "shared.act", _silu),
        Innocent("complex", "rotation as a product of complex numbers", "mla.q_rope", _complex),
        Innocent("one-hot", "the embedding as a product", "embed", _one_hot),
        Innocent("ascending-ids", "experts listed in ascending order", "router.ids", _ascending),
        Innocent("last-first", "experts added from the last to the first", "moe.routed", _last_first),
        Innocent(
            "scaled-first", "routing weights scaled before they are renormalised", "router.weights", _scaled_first
        ),
        Innocent("shared-first", "the shared expert added first", "moe.out", _sum_other_way),
        Innocent("vocabulary", "logits in blocks of the vocabulary", "logits", _blocks_of_vocabulary),
    )
}
"""id -> rewrite."""


def without_tape(stage: str, fn: Form) -> Form:
    """The form where plain arrays come in, the specification's where Tensors do."""

    def either(*args: Any, **static: Any) -> Any:
        flat = [a for x in args for a in (x if isinstance(x, tuple | list) else (x,))]
        return (STAGES[stage].fn if any(isinstance(a, Tensor) for a in flat) else fn)(*args, **static)

    return either
