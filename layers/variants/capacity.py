"""Experts with a capacity, by the load factor lambda = load / mean load (article 4, section 2.1, text).

The article says that the factor balances "automatically" and prints no rule. Here its limit is what it is elsewhere (GShard,
Switch): no expert takes more than `limit` times the mean. What is over it is dropped, or goes to the token's next best expert
with room. First choices of all tokens are seated first, in the order of the tokens, then second choices, and so on. V3 drops
nothing and has no capacity.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array, data_of

from .marked import variant

_GSHARD = "Lepikhin et al. 2020, section 2.2 (arXiv 2006.16668)"


def capacity(n_rows: int, *, n_experts: int, limit: float) -> int:
    """The most rows an expert takes: those of a load factor of at most `limit`. `n_rows` is N K."""
    seats = math.floor(limit * n_rows / n_experts + 1e-9)  # 1.15 * 100 is 114.99999999999999
    require(seats >= 1, f"a load factor of {limit} leaves no seat: {n_rows} rows for {n_experts} experts")
    return seats


@variant("load_factor", what="load over mean load of every expert", claims="a4-14", shape="E")
def load_factor(load: Array) -> Array:
    """lambda = load / mean load; their mean is 1.  load (E,) int -> (E,)."""
    require(load.sum() > 0, "variant.load_factor: no expert has a load")
    return load / load.mean()


@variant(
    "kept", what="which choices are within capacity", claims="a4-15", source=_GSHARD, shape="B S K", compare="exact"
)
def kept(ids: Array, *, n_experts: int, limit: float) -> Array:
    """1 for a choice that is among the first `capacity` of its expert, else 0: dropped.  ids (B, S, K) int -> (B, S, K) int."""
    b, s, k = ids.shape
    seats = capacity(ids.size, n_experts=n_experts, limit=limit)
    queue = ids.reshape(-1, k).T.reshape(-1)  # first choices of all tokens, then second ones
    before = np.cumsum(queue[:, None] == np.arange(n_experts, like=ids), axis=0)[np.arange(len(queue)), queue] - 1
    return (before < seats).astype(ids.dtype).reshape(k, -1).T.reshape(b, s, k)


@variant("capacity_weights", what="gating values, 0 where dropped", claims="a4-15", source=_GSHARD, shape="B S K")
def capacity_weights(weights: Any, kept: Array) -> Any:
    """g_k kept_k, not renormalised: a token dropped everywhere keeps its residual.  weights (B, S, K), kept (B, S, K) -> (B,
    S, K).
    """
    return weights * kept.astype(weights.dtype)


@variant(
    "rerouted", what="chosen experts, the next best where one is full", claims="a4-15", shape="B S K", compare="set"
)
def rerouted(a: Array, *, k: int, limit: float) -> Array:
    """Each choice is the token's best expert with room that it does not hold yet; without one, the best that it does not hold,
    which is full, so that `kept` drops it.  a (B, S, E) -> (B, S, K) int.
    """
    a = data_of(a)
    b, s, n_experts = a.shape
    require(0 < k <= n_experts, f"variant.rerouted: the best {k} of {n_experts} experts were asked for")
    room = np.full(n_experts, capacity(b * s * k, n_experts=n_experts, limit=limit))
    liking = np.argsort(-a.reshape(-1, n_experts), axis=-1, kind="stable")  # (N, E)
    chosen: list[list[int]] = [[] for _ in liking]
    for _ in range(k):
        for own, order in zip(chosen, liking.tolist(), strict=True):
            free = [e for e in order if e not in own]
            seat = next((e for e in free if room[e] > 0), free[0])
            room[seat] -= 1
            own.append(seat)
    return np.array(chosen).reshape(b, s, k)
