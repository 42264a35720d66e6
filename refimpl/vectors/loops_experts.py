"""Router and experts, as loops over tokens and experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from refimpl.autograd.tensor import Array

from .loops import Numbers, dot, rows_of, sigmoid, softmax


def router_scores(z: Array, *, func: str) -> Array:
    """Sigmoid of each, or a softmax over all experts."""
    rows = [[sigmoid(v) for v in row] if func == "sigmoid" else softmax(row) for row in rows_of(z)]
    return np.array(rows).reshape(z.shape)


def choice(s: Array, b: Array) -> Array:
    """s_e + b_e."""
    return np.array([[v + float(u) for v, u in zip(row, b, strict=True)] for row in rows_of(s)]).reshape(s.shape)


def group_scores(a: Array, *, n_group: int, best: int) -> Array:
    """The best few of each group's experts, added."""
    size = a.shape[-1] // n_group
    parts = [[sorted(row[g * size : (g + 1) * size])[-best:] for g in range(n_group)] for row in rows_of(a)]
    return np.array([[math.fsum(p) for p in row] for row in parts]).reshape(*a.shape[:-1], n_group)


def best_of(row: Numbers, k: int) -> list[int]:
    """Places of the k largest, the lower one first where two are equal."""
    return sorted(range(len(row)), key=lambda e: (-row[e], e))[:k]


def groups(a: Array, *, topk_group: int) -> Array:
    """The best groups of every token."""
    return np.array([best_of(row, topk_group) for row in rows_of(a)]).reshape(*a.shape[:-1], topk_group)


def ids(a: Array, kept: Array | None, *, k: int, n_group: int, fill: float) -> Array:
    """The best experts of every token among those of its groups."""
    size, found = a.shape[-1] // n_group, []
    inside = [range(n_group)] * math.prod(a.shape[:-1]) if kept is None else kept.reshape(-1, kept.shape[-1]).tolist()
    for row, its in zip(rows_of(a), inside, strict=True):
        found.append(best_of([v if e // size in its else fill for e, v in enumerate(row)], k))
    return np.array(found).reshape(*a.shape[:-1], k)


def router_weights(s: Array, ids: Array, *, normalise: bool, eps: float, scale: float) -> Array:
    """The chosen scores over their sum."""
    found = []
    for row, its in zip(rows_of(s), ids.reshape(-1, ids.shape[-1]).tolist(), strict=True):
        g = [row[e] for e in its]
        total = math.fsum(g) + eps if normalise else 1.0
        found.append([v / total * scale for v in g])
    return np.array(found).reshape(ids.shape)


def _sent(ids: Array) -> list[tuple[int, int, int]]:
    """(expert, token, slot) of every dispatched row, in its order."""
    flat = ids.reshape(-1, ids.shape[-1]).tolist()
    return sorted((e, n, k) for n, row in enumerate(flat) for k, e in enumerate(row))


def dispatched(x: Array, ids: Array, *, n_experts: int) -> Array:
    """A copy of a token for every expert that it goes to."""
    rows = rows_of(x)
    return np.array([rows[n] for _, n, _ in _sent(ids)]).reshape(-1, x.shape[-1])


def grouped(rows: Array, ids: Array, ws: Sequence[Array]) -> Array:
    """Every row times the matrix of its expert."""
    weights = [rows_of(w) for w in ws]
    pairs = zip(rows_of(rows), _sent(ids), strict=True)
    return np.array([[dot(row, r) for r in weights[e]] for row, (e, _, _) in pairs]).reshape(len(rows), -1)


def combined(down: Array, ids: Array, weights: Array | None) -> Array:
    """What a token's experts gave, weighted and added."""
    n, width = math.prod(ids.shape[:-1]), down.shape[-1]
    parts: list[list[list[float]]] = [[[] for _ in range(width)] for _ in range(n)]
    for row, (_, token, slot) in zip(rows_of(down), _sent(ids), strict=True):
        g = 1.0 if weights is None else float(weights.reshape(n, -1)[token, slot])
        for d, v in enumerate(row):
            parts[token][d].append(g * v)
    return np.array([[math.fsum(p) for p in token] for token in parts]).reshape(*ids.shape[:-1], width)


def counts(ids: Array, *, n_experts: int) -> Array:
    """How many tokens went to each expert."""
    flat = ids.reshape(-1).tolist()
    return np.array([flat.count(e) for e in range(n_experts)])


def bias_update(b: Array, load: Array, *, gamma: float, zero_sum: bool) -> Array:
    """gamma up where fewer tokens than the mean came, down where more."""
    total, n = int(load.sum()), len(load)
    step = [gamma * ((total > n * v) - (total < n * v)) for v in load.tolist()]
    mean = math.fsum(step) / n if zero_sum else 0.0
    return np.array([float(v) + s - mean for v, s in zip(b, step, strict=True)])


def seq_aux(s: Array, routed: Array | None, *, k: int, alpha: float) -> Array:
    """alpha / B sum over sequences and experts of f P (R eqs 17-20)."""
    total = []
    for b, sequence in enumerate(s.tolist()):
        chosen = [best_of(row, k) for row in sequence] if routed is None else routed[b].tolist()
        for e in range(s.shape[-1]):
            f = s.shape[-1] / (k * len(sequence)) * sum(e in its for its in chosen)
            total.append(f * math.fsum(row[e] / math.fsum(row) for row in sequence) / len(sequence))
    return np.array(alpha * math.fsum(total) / len(s))
