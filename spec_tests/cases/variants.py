"""One call of every stage that articles describe and V3 does not have, at sizes of the caller's."""

from typing import Any, NamedTuple

import numpy as np

from refimpl.layers.router import top_k


class Call(NamedTuple):
    args: tuple[Any, ...]
    static: dict[str, Any]


def calls(rng, *, B, S, T, D, E, K, V, **_):
    """{stage: a call with float64 arrays}; the S queries are the last of T places."""

    def normal(*shape):
        return rng.standard_normal(shape)

    def call(*args, **static):
        return Call(args, static)

    z, causal = normal(B, S, E), np.where(np.tri(S, T, T - S), 0, -np.inf)[None, None].repeat(B, axis=0)
    ids = top_k(z, K)
    found = {
        "top2_ones": call(z, k=2),
        "top2_renormalised": call(z, k=2),
        "temperature": call(z, tau=0.7),
        "gumbel": call(z, rng.gumbel(size=z.shape), tau=0.7),
        "mean_of_chosen": call(normal(B * S * K, D), ids),
        "coarse": call(normal(B, S, D), normal(E, D)),
        "refined": call(normal(B, S, D), rng.random((B, S, E)), normal(E, D)),
        "load_factor": call(np.bincount(ids.reshape(-1), minlength=E)),
        "kept": call(ids, n_experts=E, limit=1.1),
        "capacity_weights": call(normal(B, S, K), rng.integers(0, 2, (B, S, K))),
        "rerouted": call(z, k=K, limit=1.1),
        "cold_start": call(z, step=1, steps=2),
        "distance_mask": call(causal, ones="attend"),
        "sliding_window": call(causal, window=4),
        "segment_memory": call(normal(B, T - S, D), normal(B, S, D), length=T),
        "clip_logits": call(normal(B, D), normal(B, D), np.array(0.5)),
        "clip_loss": call(normal(B, B)),
        "confidence": call(normal(B, S, V)),
        "handoff": call(normal(B, S, V), normal(B, S, V), rng.random((B, S)), threshold=0.5),
        "ece": call(rng.random((B, S)), rng.integers(0, 2, (B, S))),
    }
    return {f"variant.{name}": c for name, c in found.items()}
