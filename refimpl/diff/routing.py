"""Routing as other programs hold it: a map of the chosen experts or groups, a weight for every expert, dispatched rows by token.

Ours are lists, (B, S, K), and rows sorted by expert. A map says the same; of rows in the order of tokens, the ids tell theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

from .formats import Notes
from .program import owner
from .trace import Trace

ROWS = ("moe.rows", "moe.gate", "moe.up", "moe.act", "moe.down")
IDS, WEIGHTS, GROUPS = "router.ids", "router.weights", "router.groups"
OTHER_ROWS = 0.5
"""Error from which on a row may be another one."""
_FOR_EVERY = "router.weights has a number for every expert, 0 if it is not chosen: record those of the chosen ones"
_BY_TOKEN = "dispatched rows are in the order of tokens: record them sorted by expert"
_ALONE = "dispatched rows are in the order of tokens, and no ids tell their experts: record router.ids"


def as_lists(trace: Trace) -> tuple[Trace, Notes]:
    """The trace with lists of ids for maps, weights of the chosen experts alone, and rows sorted by expert; what was done."""
    c, new, notes = trace.config, dict[str, Array](), Notes()
    for last, of in ((IDS, (c.n_routed_experts, c.num_experts_per_tok)), (GROUPS, (c.n_group, c.topk_group))):
        for tap in _ending(trace, last):
            if (ids := _listed(trace.taps[tap], *of)) is not None:
                new[tap] = ids
                notes.setdefault(f"{last} is a map of what is chosen: record a list of {of[1]}", []).append(tap)
    for tap in _ending(trace, WEIGHTS):
        if found := dict(_of_chosen(tap, trace.taps[tap], _ids_beside(tap, trace, new), c)):
            new |= found
            notes.setdefault(_FOR_EVERY, []).extend(found)
    for tap in [
        t for last in ROWS for t in _ending(trace, last) if _is_by_token(t, trace.taps[t], c.num_experts_per_tok)
    ]:
        rows = by_expert(trace.taps[tap], _ids_beside(tap, trace, new))
        notes.setdefault(_ALONE if rows is None else _BY_TOKEN, []).append(tap)
        new |= {} if rows is None else {tap: rows}
    lost = notes.get(_ALONE, [])
    return (
        (Trace(trace.header, {t: a for t, a in {**trace.taps, **new}.items() if t not in lost}), notes)
        if notes
        else (trace, notes)
    )


def rows_by_expert(trace: Trace, done: Notes, odd: Collection[str]) -> Iterator[tuple[Trace, Notes]]:
    """The trace with the rows that are `odd`, or all of those beside them, taken for rows in the order of tokens, if there are ids;
    rows of which that was known (`done`) stay as they are. With what was done.
    """
    known, rows = done.get(_BY_TOKEN, []), [t for last in ROWS for t in _ending(trace, last)]
    units = {owner(t) for t in odd if t in rows}
    for some in ([t for t in rows if owner(t) in units], [t for t in rows if t in odd]):
        found = {t: by_expert(trace.taps[t], _ids_beside(t, trace, {})) for t in some if t not in known}
        changed = {t: x for t, x in found.items() if x is not None}
        if changed:
            yield Trace(trace.header, {**trace.taps, **changed}), {**done, _BY_TOKEN: [*known, *changed]}


def of_rows(taps: Collection[str]) -> set[str]:
    """Those of the taps that are dispatched rows, or the sum of them."""
    return {t for t in taps if t.rpartition("/")[2] in (*ROWS, "moe.routed")}


def _ending(trace: Trace, last: str) -> list[str]:
    return [t for t in trace.taps if t.rpartition("/")[2] == last]


def _ids_beside(tap: str, trace: Trace, new: Mapping[str, Array]) -> Array | None:
    """The ids of the same layer, as a list."""
    ids = _beside(tap, IDS)
    return new[ids] if ids in new else trace.taps.get(ids)


def by_expert(x: Array, ids: Array | None) -> Array | None:
    """Rows (N, K, ...) or (N K, ...) sorted by expert, token, slot; None if there are not as many as ids."""
    if ids is None or np.asarray(ids).dtype.kind not in "iu" or not ids.size or x.size % ids.size:
        return None
    rows = np.asarray(x).reshape(ids.size, -1)
    return rows[np.argsort(np.asarray(ids), axis=None, kind="stable")] if rows.shape[1] == x.shape[-1] else None


def _beside(tap: str, last: str) -> str:
    return f"{tap.rpartition('/')[0]}/{last}"


def _listed(x: Array, n: int, k: int) -> Array | None:
    """The numbers of those that a map (..., n) of 0 and 1 marks, (..., most), -1 where fewer are; None if it is none.

    Different ids cannot all be 0 or 1, if more than two are asked for.
    """
    if not x.ndim or x.shape[-1] != n or n <= max(k, 2) or not x.size or not _is_map(x):
        return None
    marked = np.asarray(x) != 0
    few = marked.sum(axis=-1, keepdims=True)
    ids = np.argsort(~marked, axis=-1, kind="stable")[..., : int(few.max())]
    return np.where(np.arange(ids.shape[-1]) < few, ids, -1)


def _is_map(x: Array) -> bool:
    """Whether there is nothing but 0 and 1; the first row tells of most lists that they are none."""
    return all(bool(((a == 0) | (a == 1)).all()) for a in (x.reshape(-1, x.shape[-1])[:1], x))


def _of_chosen(tap: str, x: Array, ids: Array | None, c: Config) -> Iterator[tuple[str, Array]]:
    """The weights of the chosen experts, if x (..., E) has 0 for all others; and their ids, if nobody recorded these and every
    token has as many.
    """
    n, k = c.n_routed_experts, c.num_experts_per_tok
    if not x.ndim or x.shape[-1] != n or n <= k or x.dtype.kind in "iub" or not x.size:
        return
    if ids is None:
        marked = np.nan_to_num(x) != 0
        few = marked.sum(axis=-1)
        if int(few.max()) <= k:
            if (few == k).all():
                yield _beside(tap, IDS), (chosen := np.argsort(~marked, axis=-1, kind="stable")[..., :k])
            else:
                chosen = np.argsort(-np.nan_to_num(x), axis=-1, kind="stable")[..., :k]
            yield tap, np.take_along_axis(x, chosen, axis=-1)
    elif ids.ndim and ids.size // ids.shape[-1] == x.size // n and int(ids.max()) < n:
        flat, chosen = x.reshape(-1, n), np.asarray(ids).reshape(-1, ids.shape[-1])
        rest = np.nan_to_num(flat.astype(np.float32))
        np.put_along_axis(rest, np.maximum(chosen, 0), 0, axis=-1)
        if not rest[(chosen >= 0).all(axis=-1)].any():
            yield tap, np.take_along_axis(flat, np.maximum(chosen, 0), axis=-1).reshape(ids.shape)


def _is_by_token(tap: str, x: Array, k: int) -> bool:
    """Whether rows are in the order of tokens: by their shape, (N, K, ...), or as the inputs of one token's experts are one."""
    if k < 2 or x.ndim < 2 or x.size <= k * x.shape[-1]:  # one token's rows are the same in any order
        return False
    if x.ndim > 2:
        return bool(x.shape[-2] == k)
    if not tap.endswith(ROWS[0]) or len(x) % k or not len(x):
        return False
    return all(bool((a == a[:, :1]).all()) for a in (x[:k].reshape(1, k, -1), x.reshape(-1, k, x.shape[-1])))
