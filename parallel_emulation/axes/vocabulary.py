"""The vocabulary split over the ranks of `tp`: embedding, head and cross-entropy, none of which needs a whole matrix.

Rank r owns the rows `part(tp, V)` of the embedding and of the head. A token's row comes from the one rank that owns it,
a token's loss from the maximum, the sum and the picked logit over all ranks: 3 numbers a token travel instead of V.
DeepSeek's inference code splits embedding and head the same way (model.py at 9b4e978: mask and all-reduce, all-gather).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd import Array, SpecError, primitive
from refimpl.autograd.tensor import Vjp
from refimpl.layers import common
from refimpl.layers.loss import IGNORE
from refimpl.parallel_emulation.collectives import all_reduce, copy_to, gather_from, reduce_from, shares
from refimpl.parallel_emulation.comm import Comm

from .tensor import part

Result = tuple[Array, tuple[Vjp | None, ...]]


def shard_rows(tp: Comm, w: Any) -> Any:
    """My rows of the embedding or the head.  w (V, D) -> (V_tp, D)."""
    return w[part(tp, w.shape[0], "vocabulary rows")]


def embed(tp: Comm, tokens: Array, w: Any, *, vocab: int) -> Any:
    """x = w[tokens].  tokens (B, S), w (V_tp, D) my rows -> (B, S, D) replicated.

    Equal to the serial lookup: the ranks that do not own a row add zeros to it (a -0 becomes +0). One all-reduce of
    B S D numbers, nothing backward.
    """
    return reduce_from(embed_partial(tp, tokens, w, vocab=vocab), comm=tp, label="embed")


def embed_partial(tp: Comm, tokens: Array, w: Any, *, vocab: int) -> Any:
    """w[tokens] where I own the row, else zeros.  tokens (B, S), w (V_tp, D) -> (B, S, D) partial over tp."""
    mine = _my_rows(tp, w.shape[0], vocab)
    _check_ids("token ids", tokens, vocab)
    here = (tokens >= mine.start) & (tokens < mine.stop)
    return only(common.embed(np.where(here, tokens - mine.start, 0), w), here[..., None])


@primitive
def only(x: Array, keep: Array) -> Result:
    """y = x where keep, else 0, whatever stands there.  x (*), keep (*) bool, broadcast -> y (*)."""

    def vjp_x(dy: Array) -> Array:
        return np.where(keep, dy, np.zeros((), dy.dtype))

    return np.where(keep, x, np.zeros((), x.dtype)), (vjp_x, None)


def logits(tp: Comm, x: Any, w: Any) -> Any:
    """My part of x wT.  x (B, S, D) replicated, w (V_tp, D) -> (B, S, V_tp).  B S D numbers all-reduced backward."""
    return common.logits(copy_to(x, comm=tp, label="head"), w)


def whole_logits(tp: Comm, y: Any, *, vocab: int) -> Any:
    """All logits on every rank, as inference needs them.  y (B, S, V_tp) -> (B, S, V) replicated."""
    return gather_from(y, comm=tp, axis=-1, sizes=shares(vocab, tp.size), label="logits")


def main_loss(tp: Comm, y: Any, labels: Array, *, vocab: int, denominator: float | None = None) -> Any:
    """`layers.loss.main` of logits split by vocabulary.  y (B, S, V_tp), labels (B, S) int -> () replicated."""
    rows = y[:, : y.shape[1] - 1].reshape(-1, y.shape[-1])
    return nll(rows, labels[:, 1:].reshape(-1), tp=tp, vocab=vocab, denominator=denominator)


@primitive
def nll(logits: Array, labels: Array, *, tp: Comm, vocab: int, denominator: float | None = None) -> Result:
    """y = sum_n (log sum_v e^z[n, v] - z[n, labels[n]]) / n_valid; label -100 is ignored.  logits (N, V_tp), labels (N,)
    -> y () replicated.

    `nn_ops.nll` with the maximum, then the sum of e^(z - max) and the picked z - max, all-reduced: N and 2 N numbers.
    The gradient of my logits needs no message.
    """
    mine = _my_rows(tp, logits.shape[-1], vocab)
    valid = labels != IGNORE
    _check_ids("labels", labels[valid], vocab)
    count = denominator if denominator is not None else max(int(valid.sum()), 1)
    at = np.flatnonzero(valid & (labels >= mine.start) & (labels < mine.stop))  # rows whose label is mine
    target = labels[at] - mine.start
    z = logits - all_reduce(tp, logits.max(axis=-1), "nll.max", op=np.maximum)[:, None]
    e = np.exp(z)
    sums = np.zeros_like(logits, shape=(2, len(labels)))
    sums[0], sums[1, at] = e.sum(axis=-1), z[at, target]
    total, picked = all_reduce(tp, sums, "nll.sums")

    def vjp_logits(dy: Array) -> Array:
        scale = dy / count
        d = e * np.where(valid, scale / total, 0)[:, None]
        d[at, target] -= scale
        return d

    return np.where(valid, np.log(total) - picked, 0).sum() / count, (vjp_logits, None)


def _my_rows(tp: Comm, held: int, vocab: int) -> slice:
    mine = part(tp, vocab, "vocabulary rows")
    if held != mine.stop - mine.start:
        raise SpecError(f"{held} vocabulary rows on rank {tp.rank}; of {vocab} its share is {mine.start}:{mine.stop}")
    return mine


def _check_ids(what: str, ids: Array, vocab: int) -> None:
    if ids.size and not (ids.min() >= 0 and ids.max() < vocab):
        raise SpecError(f"{what} from {ids.min()} to {ids.max()}; expected 0 to {vocab - 1}")
