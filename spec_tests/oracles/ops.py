"""Every primitive's forward again, one number at a time: Python loops and `math`, no array arithmetic.

`NAIVE[name](*args, **static)` gives the value that the primitive of that name must have.
"""

import math

import numpy as np


def filled(shape, value):
    """The array whose element at each index is value(*index)."""
    out = np.empty(shape)
    for index in np.ndindex(*shape):
        out[index] = value(*index)
    return out


def pairwise(f):
    """f on every pair of elements of two arrays that broadcast."""

    def y(a, b):
        shape = np.broadcast_shapes(np.shape(a), np.shape(b))
        return np.array([f(float(p), float(q)) for p, q in np.broadcast(a, b)]).reshape(shape)

    return y


def single(f):
    """f on every element."""

    def y(x, **static):
        return np.array([f(float(v), **static) for v in x.flat]).reshape(x.shape)

    return y


def logistic(v):
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def dot(a, b):
    return math.fsum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def total(x, axis, keepdims):
    axes = range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
    axes = {a % x.ndim for a in axes} if x.ndim else set()
    shape = [1 if i in axes else n for i, n in enumerate(x.shape)]
    out = np.zeros(shape)
    for index in np.ndindex(*x.shape):
        out[tuple(0 if i in axes else j for i, j in enumerate(index))] += x[index]
    return out if keepdims else out.reshape([n for i, n in enumerate(x.shape) if i not in axes])


def matmul(a, b):
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a = np.broadcast_to(a, (*lead, *a.shape[-2:]))
    b = np.broadcast_to(b, (*lead, *b.shape[-2:]))
    return filled(
        (*lead, a.shape[-2], b.shape[-1]),
        lambda *i: dot(a[i[:-1]], [row[i[-1]] for row in b[i[:-2]]]),
    )


def reshape(x, shape):
    values, count = list(x.flat), math.prod(n for n in shape if n != -1)
    shape = [x.size // count if n == -1 else n for n in shape]
    return np.array(values, float).reshape(shape)


def transpose(x, axes):
    axes = list(axes or range(x.ndim - 1, -1, -1))
    out = np.empty([x.shape[a] for a in axes])
    for index in np.ndindex(*x.shape):
        out[tuple(index[a] for a in axes)] = x[index]
    return out


def getitem(x, index):
    places = np.arange(x.size).reshape(x.shape)[index]
    return np.array([list(x.flat)[p] for p in np.ravel(places)], float).reshape(np.shape(places))


def concat(*parts, axis):
    axis %= parts[0].ndim
    owner = [(p, i) for p in parts for i in range(p.shape[axis])]
    shape = list(parts[0].shape)
    shape[axis] = len(owner)

    def value(*index):
        part, i = owner[index[axis]]
        return part[(*index[:axis], i, *index[axis + 1 :])]

    return filled(shape, value)


def linear(x, w, b=None):
    bias = [0.0] * len(w) if b is None else b
    return filled((*x.shape[:-1], len(w)), lambda *i: dot(x[i[:-1]], w[i[-1]]) + bias[i[-1]])


def rms_norm(x, w, eps):
    def value(*i):
        row = x[i[:-1]]
        return w[i[-1]] * x[i] / math.sqrt(dot(row, row) / len(row) + eps)

    return filled(x.shape, value)


def softmax_row(row):
    """Probabilities of one row of scores; all -inf gives zeros."""
    top = max(row)
    if top == -math.inf:
        return [0.0] * len(row)
    e = [math.exp(v - top) for v in row]
    return [v / math.fsum(e) for v in e]


def softmax(x):
    return filled(x.shape, lambda *i: softmax_row(x[i[:-1]])[i[-1]])


def attention(q, k, v, mask, scale):
    (b, s, h, _), t = q.shape, k.shape[1]
    y = np.zeros((b, s, h, v.shape[-1]))
    for n, i, j in np.ndindex(b, s, h):
        scores = [dot(q[n, i, j], k[n, u, j]) * scale + mask[n, 0, i, u] for u in range(t)]
        for u, p in enumerate(softmax_row(scores)):
            y[n, i, j] += p * v[n, u, j]
    return y


def spread(x, shape):
    def at(*i):
        return x[tuple(j if n > 1 else 0 for j, n in zip(i[len(shape) - x.ndim :], x.shape, strict=True))]

    return filled(shape, at)


def rotate(x, table, interleaved):
    """Each pair as a complex number, times cos + i sin."""
    half = x.shape[-1] // 2
    turns = np.broadcast_to(table, (2, *x.shape[:-1], half))
    out = np.empty(x.shape)
    for index in np.ndindex(*x.shape[:-1], half):
        *at, i = index
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = complex(x[(*at, a)], x[(*at, b)]) * complex(*turns[(slice(None), *index)])
        out[(*at, a)], out[(*at, b)] = turned.real, turned.imag
    return out


def nll(logits, labels, denominator):
    losses = []
    for row, label in zip(logits, labels, strict=True):
        if label != -100:
            top = max(row)
            losses.append(top + math.log(math.fsum(math.exp(v - top) for v in row)) - row[label])
    return math.fsum(losses) / (denominator or max(len(losses), 1))


def dispatched(ids):
    """(expert, token, slot) of every row, in the order of rows."""
    flat = ids.reshape(-1, ids.shape[-1])
    rows = [(int(flat[n, k]), n, k) for n in range(len(flat)) for k in range(ids.shape[-1])]
    return sorted(rows)


def dispatch(x, ids, n_experts):
    tokens = x.reshape(-1, x.shape[-1])
    rows = [tokens[n] for _, n, _ in dispatched(ids)]
    return np.array(rows).reshape(len(rows), x.shape[-1])


def grouped_linear(rows, ids, *ws):
    y = np.empty((len(rows), len(ws[0])))
    for m, (expert, _, _) in enumerate(dispatched(ids)):
        y[m] = [dot(rows[m], w) for w in ws[expert]]
    return y


def combine(rows, ids, weights):
    shares = weights.reshape(-1, ids.shape[-1])
    y = np.zeros((len(shares), rows.shape[-1]))
    for m, (_, n, k) in enumerate(dispatched(ids)):
        y[n] += shares[n, k] * rows[m]
    return y.reshape(*ids.shape[:-1], rows.shape[-1])


NAIVE = {
    "add": pairwise(lambda a, b: a + b),
    "sub": pairwise(lambda a, b: a - b),
    "mul": pairwise(lambda a, b: a * b),
    "div": pairwise(lambda a, b: a / b),
    "maximum": pairwise(max),
    "neg": single(lambda v: -v),
    "exp": single(math.exp),
    "log": single(math.log),
    "power": single(lambda v, p: v**p),
    "sigmoid": single(logistic),
    "swiglu": pairwise(lambda g, u: g * logistic(g) * u),
    "cast": single(lambda v, dtype: v),
    "round_through": single(lambda v, to: v),
    "stop": single(lambda v: v),
    "matmul": matmul,
    "sum": total,
    "reshape": reshape,
    "transpose": transpose,
    "getitem": getitem,
    "_concat": concat,
    "take_rows": lambda w, ids: filled((*ids.shape, w.shape[1]), lambda *i: w[ids[i[:-1]], i[-1]]),
    "take_along": lambda x, ids: filled(ids.shape, lambda *i: x[(*i[:-1], ids[i])]),
    "linear": linear,
    "rms_norm": rms_norm,
    "softmax": softmax,
    "attention": attention,
    "broadcast": spread,
    "rotate": rotate,
    "nll": nll,
    "dispatch": dispatch,
    "grouped_linear": grouped_linear,
    "combine": combine,
}
