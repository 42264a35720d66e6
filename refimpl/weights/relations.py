"""What a wrong conversion makes of a tensor, as data: tried in order, each a name, the tensors it can happen to, and the mistake.

In brackets threads where it happened; layouts after R eqs 1-11 and transformers' conversion of interleaved to half rotation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from refimpl.checkpoint.held import Array
from refimpl.layers.config import Config

Make = Callable[[Array, Config], Array]


@dataclass(frozen=True)
class Relation:
    """`make`: the right tensor -> what a file with this mistake holds; `of`: the modules it can happen to, () for any matrix."""

    name: str
    of: tuple[str, ...]
    make: Make


def _to_half(n: int) -> Array:
    """Where rows 0, 2, 4, ..., 1, 3, 5, ... come from: interleaved pairs become halves."""
    return np.concatenate([np.arange(0, n, 2), np.arange(1, n, 2)])


def _heads(x: Array, c: Config) -> Array:
    """(H N, ...) -> (H, N, ...)."""
    return x.reshape(c.num_attention_heads, -1, *x.shape[1:])


def _rotated(order: Callable[[int], Array], c: Config, x: Array) -> Array:
    """The last Dr rows of (..., N, columns) in another order."""
    rest, rope = np.split(x, [x.shape[-2] - c.qk_rope_head_dim], axis=-2)
    return np.concatenate([rest, rope[..., order(rope.shape[-2]), :]], axis=-2)


def _rope_first(x: Array, c: Config) -> Array:
    return np.roll(x, c.qk_rope_head_dim, axis=-2)


def _q(change: Make) -> Make:
    return lambda x, c: change(_heads(x, c), c).reshape(x.shape)


def _back(n: int) -> Array:
    return np.argsort(_to_half(n))


def _values_first(x: Array, c: Config) -> Array:
    """[k; v] of each head -> [v; k]."""
    return np.roll(_heads(x, c), -c.qk_nope_head_dim, axis=1).reshape(x.shape)


def _apart(x: Array, c: Config) -> tuple[Array, Array]:
    k, v = np.split(_heads(x, c), [c.qk_nope_head_dim], axis=1)
    return k, v


def _keys_before_values(x: Array, c: Config) -> Array:
    return np.concatenate([p.reshape(-1, x.shape[1]) for p in _apart(x, c)])


def _values_before_keys(x: Array, c: Config) -> Array:
    return np.concatenate([p.reshape(-1, x.shape[1]) for p in _apart(x, c)[::-1]])


def _keys_transposed(x: Array, c: Config) -> Array:
    """k_b (H, C, Dn) read as (H, Dn, C)."""
    k, v = _apart(x, c)
    return np.concatenate([k.transpose(0, 2, 1).reshape(k.shape), v], axis=1).reshape(x.shape)


def _features_first(x: Array, c: Config) -> Array:
    """Rows (H, N) -> (N, H)."""
    return _heads(x, c).swapaxes(0, 1).reshape(x.shape)


_Q, _KV_A, _KV_B = ("q_b_proj", "q_proj"), ("kv_a_proj_with_mqa",), ("kv_b_proj",)
PERMUTED: tuple[Relation, ...] = (
    Relation("RoPE rows half, not interleaved", _Q, _q(lambda x, c: _rotated(_to_half, c, x))),
    Relation("RoPE rows half, not interleaved", _KV_A, lambda x, c: _rotated(_to_half, c, x)),
    Relation("RoPE rows taken for half and interleaved again", _Q, _q(lambda x, c: _rotated(_back, c, x))),
    Relation("RoPE rows taken for half and interleaved again", _KV_A, lambda x, c: _rotated(_back, c, x)),
    Relation("whole heads reordered as for RoPE halves", _Q, _q(lambda x, c: x[:, _to_half(x.shape[1])])),
    Relation("RoPE rows before the others", _Q, _q(_rope_first)),
    Relation("RoPE rows before the others", _KV_A, _rope_first),
    Relation("values before keys in each head", _KV_B, _values_first),
    Relation("all keys before all values", _KV_B, _keys_before_values),
    Relation("all values before all keys", _KV_B, _values_before_keys),
    Relation("keys of each head transposed", _KV_B, _keys_transposed),
    Relation("heads and their features exchanged", (*_Q, *_KV_B), _features_first),
    Relation("heads and their features exchanged", ("o_proj",), lambda x, c: _features_first(x.T, c).T),
    Relation(
        "hidden and embedding halves exchanged (T01)", ("eh_proj",), lambda x, c: np.roll(x, x.shape[1] // 2, axis=1)
    ),
    Relation("transposed", (), lambda x, c: x.T),
    Relation("read in the other axis order", (), lambda x, c: x.T.reshape(x.shape)),
)


def permuted(name: str, x: Array, c: Config) -> Iterator[tuple[str, Array]]:
    """(relation, what the file would hold) for all that can happen to this tensor."""
    module = name.split(".")[-2] if "." in name else name
    for r in PERMUTED:
        if x.ndim == 2 and (not r.of or module in r.of):
            yield r.name, r.make(x, c)


def rescaled(codes: Array, scales: Array, block: tuple[int, int]) -> Iterator[tuple[str, Array]]:
    """What loaders make of FP8 codes (O, I) and their scales: (mistake, the effective weight)."""
    w, s = codes.astype(np.float32), scales.astype(np.float32)
    rows, columns = w.shape

    def spread(s: Array, b: int = block[0]) -> Array:
        tall: Array = s.repeat(b, axis=0)[:rows].repeat(block[1], axis=1)[:, :columns]
        return tall

    with np.errstate(all="ignore"):
        yield "scales ignored (F05)", w
        yield "divided by its scales, not multiplied", w / spread(s)
        inferred = -(-rows // s.shape[0])
        if inferred != block[0]:
            yield f"scales spread over blocks of {inferred} rows, not {block[0]} (F01, F02)", w * spread(s, inferred)
        yield "scales rounded up to powers of two, codes kept (F10)", w * spread(np.exp2(np.ceil(np.log2(s))))
        yield "scales cut down to powers of two, codes kept (F10)", w * spread(np.exp2(np.floor(np.log2(s))))
        if s.shape[0] == s.shape[1]:
            yield "scales transposed", w * spread(s.T)


BLOCKS: tuple[tuple[str, int, int], ...] = (("row", 1, 0), ("column", 0, 1), ("block of 128 x 128", 128, 128))
"""What shares a factor; its rows and columns, 0 for all."""


def factors(ours: Array, theirs: Array, rows: int = 0, columns: int = 0) -> tuple[Array, Array]:
    """(least-squares factor of each block, ours times it)."""
    x, y = ours.astype(np.float64), theirs.astype(np.float64)
    if x.ndim != 2 or not (rows or columns):
        s = np.asarray(np.vdot(x, y) / max(np.vdot(x, x), np.finfo(float).tiny))
        return s.reshape(1), x * s
    row_of = np.arange(x.shape[0]) // (rows or x.shape[0])
    column_of = np.arange(x.shape[1]) // (columns or x.shape[1])

    def summed(v: Array) -> Array:
        tall = np.add.reduceat(v, np.flatnonzero(np.diff(row_of, prepend=-1)), axis=0)
        both: Array = np.add.reduceat(tall, np.flatnonzero(np.diff(column_of, prepend=-1)), axis=1)
        return both

    s = summed(x * y) / np.maximum(summed(x * x), np.finfo(float).tiny)
    return s, x * s[row_of][:, column_of]
