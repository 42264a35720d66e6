"""Masks, rotary tables and rotated keys as programs hold them, brought to ours: an additive mask (B, 1, S, T), cos and sin
(2, B, S, Dr/2), a key (B, S, Dr) that all heads share.
"""

from __future__ import annotations

import numpy as np

from refimpl.autograd.tensor import Array


def in_our_form(stage: str, x: Array, shape: tuple[int, ...], heads: int = 1) -> tuple[Array, list[str]]:
    """A stage's tap in the form that ours has, and what was done to it."""
    forms = {"mask": _additive, "mla.rope_tables": _once}
    if stage in ("mla.k_rope", "cache.k_rope"):
        return _of_one_head(x, shape, heads)
    return forms[stage](x, shape) if stage in forms else (x, [])


def _additive(x: Array, shape: tuple[int, ...]) -> tuple[Array, list[str]]:
    """Truth values as 0 and -inf; one mask for all sequences, or one for every head, as one for each sequence."""
    notes = []
    if x.ndim >= 2 and (visible := _truth(x)) is not None:
        x = np.where(visible, np.float32(0), np.float32(-np.inf))
        notes.append("the mask holds truth values: read as 0 and -inf")
    if x.ndim == 4 and x.shape[1] > 1 and bool((x == x[:, :1]).all()):
        x = x[:, :1]
        notes.append("the mask is the same for every head: one is compared")
    batch = shape[0]
    if x.ndim >= 2 and batch > 1 and x.size * batch == int(np.prod(shape)) and x.shape[-2:] == shape[-2:]:
        x = np.broadcast_to(x.reshape(1, 1, *shape[-2:]), shape)
        notes.append("the mask is one for all sequences: compared with each of theirs")
    return x, notes


def _truth(x: Array) -> Array | None:
    """Where a query may see a key, if x holds nothing but two truth values. A query sees more of the keys before it than of those
    behind; if there is no difference, it sees itself.
    """
    values = np.unique(x) if x.dtype.kind in "biu" or x.max(initial=0) == 1 else np.zeros(0)
    if values.tolist() != [0, 1]:
        return None
    n, t = x.shape[-2:]
    own = np.arange(t) - np.arange(n)[:, None] - (t - n)  # 0 where a query's own key is
    before, itself, behind = ((x != 0)[..., where] for where in (own < 0, own == 0, own > 0))
    if before.size and behind.size and before.mean() != behind.mean():
        told = bool(before.mean() > behind.mean())
    else:
        told = bool(itself.mean() > 0.5) if itself.size else True
    return np.asarray((x != 0) == told)


def _once(x: Array, shape: tuple[int, ...]) -> tuple[Array, list[str]]:
    """Every frequency once, and for every sequence of the batch."""
    notes, half = [], shape[-1]
    if x.ndim >= 2 and x.shape[-1] == 2 * half:
        for a, b in ((x[..., :half], x[..., half:]), (x[..., 0::2], x[..., 1::2])):
            if np.array_equal(a, b):
                x = a
                notes.append("the rotary tables have every frequency twice: one is compared")
                break
    if x.shape in ((2, *shape[2:]), (2, 1, *shape[2:])) and shape[1] > 1:
        x = np.broadcast_to(x.reshape(2, 1, *shape[2:]), shape)
        notes.append("the rotary tables are those of one sequence: compared with each of theirs")
    return x, notes


def _of_one_head(x: Array, shape: tuple[int, ...], heads: int) -> tuple[Array, list[str]]:
    """What every head shares once, where kernels have it for each: an axis of heads along which all is the same."""
    if heads > 1 and x.shape != shape and x.shape[-1:] == (heads * shape[-1],):
        x = x.reshape(*x.shape[:-1], heads, shape[-1])
    more = x.ndim > len(shape) or (x.ndim == len(shape) and x.size != int(np.prod(shape)))  # tokens may be flattened
    for axis in range(x.ndim - 1) if heads > 1 and more and x.shape[-1:] == shape[-1:] else ():
        first = x[(slice(None),) * axis + (slice(0, 1),)]
        if x.shape[axis] == heads and bool(((x == first) | (x != x)).all()):  # NaN may be where padding is
            return first.squeeze(axis), ["rotated keys are repeated for every head: one is compared"]
    return x, []
