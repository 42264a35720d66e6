"""What is sampled from: logits (V,) to probabilities (V,), one equation a function, all in float64.

Each function takes and returns a whole distribution, so a sampler is their composition and can be read, enumerated and
compared term by term. Ties go to the lower token id everywhere.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from refimpl.autograd.tensor import Array


def softmax(z: Array, temperature: float = 1.0) -> Array:
    """p_i = exp(z_i / T) / sum_j exp(z_j / T); T = 0 is its limit, all on the largest.  z (V,) -> (V,)."""
    if temperature == 0:
        return one_hot(int(np.argmax(z)), len(z))
    shifted = z.astype(np.float64) - z.max()
    with np.errstate(over="ignore"):  # by a tiny T: -inf, whose exp is 0
        return normalised(np.exp(shifted / temperature))


def log_softmax(z: Array) -> Array:
    """log p_i = z_i - log sum_j exp(z_j).  z (V,) -> (V,)."""
    shifted = z.astype(np.float64) - z.max()
    return shifted - np.log(np.exp(shifted).sum())


def repetition(z: Array, seen: Collection[int], penalty: float) -> Array:
    """z_i / penalty where positive, z_i * penalty where negative, for tokens seen (Keskar et al. 2019, 4.1).  z (V,)."""
    if penalty == 1 or not seen:
        return z
    ids = np.fromiter(seen, np.int64)
    z = z.astype(np.float64)
    z[ids] = np.where(z[ids] > 0, z[ids] / penalty, z[ids] * penalty)
    return z


def top_k(p: Array, k: int) -> Array:
    """p on its k largest entries, 0 elsewhere, renormalised.  p (V,) -> (V,)."""
    return restricted(p, _descending(p)[:k])


def top_p(p: Array, mass: float) -> Array:
    """p on the smallest set of largest entries that holds `mass` (Holtzman et al. 2020, eq 2-3), renormalised.  p (V,) ->
    (V,)."""
    order = _descending(p)
    before = np.cumsum(p[order]) - p[order]  # mass of all more likely tokens: while that is short of `mass`, one more
    return restricted(p, order[(before < mass) | (np.arange(len(p)) == 0)])


def min_p(p: Array, fraction: float) -> Array:
    """p where p_i >= fraction * max p (Nguyen et al. 2024, eq 1-2), renormalised.  p (V,) -> (V,)."""
    return restricted(p, np.flatnonzero(p >= fraction * p.max()))


def residual(p: Array, q: Array) -> Array:
    """norm(max(0, p - q)): what is drawn when a draft from q is rejected (Leviathan et al. 2023, 2.3).  p, q (V,) -> (V,).

    Where p = q nothing is ever rejected and nothing is left over; then p itself is given.
    """
    left = np.maximum(0, p - q)
    return normalised(left) if left.any() else p


def acceptance(p: Array, q: Array, token: int) -> float:
    """min(1, p(x) / q(x)): the chance that a draft x from q stands (Leviathan et al. 2023, 2.3).  p, q (V,)."""
    return float(min(1.0, p[token] / q[token]))


def overlap(p: Array, q: Array) -> float:
    """sum_i min(p_i, q_i): the acceptance to be expected, 1 - total variation (Leviathan et al. 2023, theorem 3.5)."""
    return float(np.minimum(p, q).sum())


def one_hot(token: int, size: int) -> Array:
    """All probability on one token.  -> (V,)."""
    p = np.zeros(size)
    p[token] = 1
    return p


def restricted(p: Array, kept: Array) -> Array:
    """p on the tokens kept, 0 elsewhere, renormalised.  p (V,), kept (n,) ids -> (V,)."""
    out = np.zeros_like(p)
    out[kept] = p[kept]
    return normalised(out)


def normalised(w: Array) -> Array:
    """w_i / sum_j w_j.  w (V,) not negative -> (V,)."""
    return w / w.sum()


def _descending(p: Array) -> Array:
    """Token ids by falling probability, ties by rising id.  p (V,) -> (V,)."""
    return np.argsort(-p, kind="stable")
