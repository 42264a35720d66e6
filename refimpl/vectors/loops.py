"""Layers of a line, losses and the optimiser, written as loops over single numbers with exact sums (`math.fsum`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

import numpy as np

from refimpl.autograd.tensor import Array

Numbers = Sequence[float]


def rows_of(a: Array) -> list[list[float]]:
    """An array as a list of its last axes."""
    return [[float(v) for v in row] for row in np.asarray(a, np.float64).reshape(-1, np.shape(a)[-1])]


def dot(a: Numbers, b: Numbers) -> float:
    """sum_i a_i b_i, rounded once."""
    return math.fsum(map(mul, a, b))


def sigmoid(z: float) -> float:
    """1 / (1 + e^-z), which overflows nowhere."""
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def softmax(row: Numbers) -> list[float]:
    """e^v / sum e^v of a row; zeros where all of it is -inf."""
    top = max(row)
    if top == -math.inf:
        return [0.0] * len(row)
    parts = [math.exp(v - top) for v in row]
    return [p / math.fsum(parts) for p in parts]


def linear(x: Array, w: Array, b: Array | None = None, *, lead: int = 2) -> Array:
    """y_nf = sum_d x_nd w_fd (+ b_f), the axes behind the first `lead` being one."""
    x = np.asarray(x).reshape(*x.shape[:lead], -1)
    weights, shift = rows_of(w), [0.0] * len(w) if b is None else [float(v) for v in b]
    y = [[dot(row, r) + s for r, s in zip(weights, shift, strict=True)] for row in rows_of(x)]
    return np.array(y).reshape(*x.shape[:-1], len(w))


def by_head(x: Array, w: Array, *, n_heads: int) -> Array:
    """A linear layer whose outputs are those of all heads."""
    return linear(x, w).reshape(*x.shape[:-1], n_heads, -1)


def norm(x: Array, w: Array, *, eps: float) -> Array:
    """y_d = w_d x_d / sqrt(mean x^2 + eps), of as many channels as there are weights."""
    n, y = len(w), []
    for row in rows_of(x):
        size = math.sqrt(dot(row[:n], row[:n]) / n + eps)
        y.append([float(g) * v / size for g, v in zip(w, row, strict=False)])
    return np.array(y).reshape(*x.shape[:-1], n)


def swiglu(gate: Array, up: Array, ids: None = None, weights: None = None) -> Array:
    """g u / (1 + e^-g)."""
    pairs = zip(np.ravel(gate), np.ravel(up), strict=True)
    return np.array([float(g) * float(u) * sigmoid(float(g)) for g, u in pairs]).reshape(np.shape(gate))


def add(x: Array, y: Array | None) -> Array:
    """Number by number."""
    if y is None:
        return np.asarray(x, np.float64)
    return np.array([float(a) + float(b) for a, b in zip(np.ravel(x), np.ravel(y), strict=True)]).reshape(x.shape)


def looked_up(tokens: Array, w: Array, *, depth: int = 0) -> Array:
    """Row t of w for token t, `depth` tokens on."""
    return np.array([[w[t] for t in row[depth:]] for row in tokens.tolist()], np.float64)


def behind(past: Array, new: Array) -> Array:
    """The entries of the cache, then the new ones."""
    return np.array([[*a, *b] for a, b in zip(past.tolist(), new.tolist(), strict=True)])


def valid_behind(before: Array | None, new: Array, *, past: int) -> Array:
    """The same of what is no padding; what was cached without a word is none."""
    return behind(np.ones((len(new), past), np.int64) if before is None else before, new)


def but_last(x: Array) -> Array:
    """All positions but the last."""
    return np.array([row[:-1] for row in x.tolist()])


def beside(embedding: Array, hidden: Array, *, hidden_first: bool) -> Array:
    """Two vectors of every token as one."""
    a, b = (hidden, embedding) if hidden_first else (embedding, hidden)
    return np.array([[*u, *v] for u, v in zip(rows_of(a), rows_of(b), strict=True)]).reshape(*a.shape[:-1], -1)


def _surprises(logits: Array, labels: Array, ahead: int) -> list[float]:
    """-log p of every label that counts.  logits (B, S, V), labels (B, S)"""
    found = []
    for rows, its in zip(logits, labels.tolist(), strict=True):
        for row, label in zip(rows.tolist()[:-1], its[ahead:], strict=True):
            if label != -100:
                top = max(row)
                found.append(math.log(math.fsum(math.exp(v - top) for v in row)) + top - row[label])
    return found


def loss_main(logits: Array, labels: Array) -> Array:
    """Their mean."""
    found = _surprises(logits, labels, 1)
    return np.array(math.fsum(found) / max(len(found), 1))


def loss_mtp(logits: Array, labels: Array, *, depth: int, mean: str) -> Array:
    """Of a module: over as many as the main model has, or over its own."""
    found = _surprises(logits, labels, depth + 1)
    n = len(found) if mean == "valid" else int((labels[:, 1:] != -100).sum())
    return np.array(math.fsum(found) / max(n, 1))


def loss_total(main: Array, mtp: Sequence[Array], aux: Sequence[Array], *, mtp_weight: float) -> Array:
    """main + lambda mean of the modules' + all balance losses."""
    parts = [float(main), *[float(v) * mtp_weight / len(mtp) for v in mtp], *[float(v) for v in aux]]
    return np.array(math.fsum(parts))


def grad_norm(grads: Sequence[Array]) -> Array:
    """Of all numbers of all gradients."""
    return np.array(math.sqrt(math.fsum(float(v) ** 2 for g in grads for v in np.ravel(g))))


def clip(g: Array, norm: Array, *, max_norm: float | None) -> Array:
    """Scaled down if the norm is above."""
    by = 1.0 if max_norm is None else min(1.0, max_norm / (float(norm) + 1e-6))
    return np.array([float(v) * by for v in np.ravel(g)]).reshape(g.shape)


def exp_avg(g: Array, before: Array | None, *, beta: float) -> Array:
    """A mean that forgets."""
    old = [0.0] * g.size if before is None else np.ravel(before).tolist()
    return np.array([beta * m + (1 - beta) * float(v) for m, v in zip(old, np.ravel(g), strict=True)]).reshape(g.shape)


def exp_avg_sq(g: Array, before: Array | None, *, beta: float) -> Array:
    """The same of squares."""
    return exp_avg(np.asarray(g, np.float64) ** 2, before, beta=beta)


def adamw(
    w: Array, m: Array, v: Array, *, lr: float, beta1: float, beta2: float, eps: float, decay: float, steps: int
) -> Array:
    """Loshchilov and Hutter, algorithm 2 (arXiv 1711.05101)."""
    found = []
    for a, b, c in zip(*[np.ravel(x).tolist() for x in (w, m, v)], strict=True):
        first, second = b / (1 - beta1**steps), c / (1 - beta2**steps)
        found.append(a - lr * (first / (math.sqrt(second) + eps) + decay * a))
    return np.array(found).reshape(w.shape)
