"""Padding of a prompt: what a tap holds there is nobody's business, and engines that run tokens one behind the other have none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

PACKED = "tokens are one behind the other, without padding: put in their places"
NOWHERE = "padding is sent to no expert"


def padding_of(valid: Sequence[Sequence[int]] | None) -> Array | None:
    """Which tokens (B, S) are padding, None if there is none."""
    found = None if valid is None else ~np.asarray(valid, bool)
    return found if found is not None and found.any() else None


def rows_of(call: Call, shape: Sequence[int], padding: Array | None) -> Array | None:
    """The padding where a call's output of that shape has rows of it, else None."""
    axes = call.of.shape.split()
    by_token = axes[:2] in (["B", "S"], ["B", "T"]) and tuple(shape[:2]) == getattr(padding, "shape", ())
    by_query = axes[:3] == ["B", "H", "S"] and padding is not None and (shape[0], shape[2]) == padding.shape
    return padding if by_token or by_query else None


def filled(call: Call, x: Array, like: Array, padding: Array | None) -> Array:
    """x with what `like` has in padding."""
    rows = rows_of(call, like.shape, padding)
    if rows is None or x.shape != like.shape:
        return x
    rows = rows[:, None] if call.of.shape.split()[1] == "H" else rows
    return np.where(rows.reshape(*rows.shape, *[1] * (x.ndim - rows.ndim)), like, x)


def placed(
    x: Array, shape: tuple[int, ...], axes: list[str], padding: Array | None, limit: int | None
) -> tuple[Array, tuple[str, ...]]:
    """A tap with rows of padding if it has none, and with ids below `limit` there, None for what is no ids; what was done."""
    whole = _unpacked(x, shape, axes, padding)
    if whole is not None:
        return whole, (PACKED,)
    ids = x if limit is None else _with_ids(x, padding, limit)
    return ids, () if ids is x else (NOWHERE,)


def _unpacked(x: Array, shape: tuple[int, ...], axes: list[str], padding: Array | None) -> Array | None:
    """x (N, ...) of the N tokens that are no padding as (B, S, ...), there 0; None if it is not that."""
    if padding is None or not x.ndim or axes[:2] not in (["B", "S"], ["B", "T"]) or shape[:2] != padding.shape:
        return None
    n, rest = int((~padding).sum()), shape[2:]
    if len(x) != n or x.size != n * int(np.prod(rest)):
        return None
    whole = np.zeros(shape, x.dtype)
    whole[~padding] = x.reshape(n, *rest)
    return whole


def _with_ids(x: Array, padding: Array | None, limit: int) -> Array:
    """Chosen experts or groups (B, S, K), where padding has none of `limit` the first ones: kernels write -1 or anything."""
    if padding is None or x.shape[:2] != padding.shape or x.ndim != 3 or x.dtype.kind not in "iu":
        return x
    nowhere = padding & ((x < 0) | (x >= limit)).any(axis=-1)
    return np.where(nowhere[..., None], np.arange(x.shape[-1], dtype=x.dtype), x) if nowhere.any() else x
