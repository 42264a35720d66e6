"""Mistakes of multi-head latent attention: latents, scores, mask, values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.rope import mscale

from .mutant import Mutant, scaled, setting, stage, threads, unmade
from .norms import rms
from .rope import uneven, yarn

_SCORES = "mla.scores"
_A12 = threads("transformers #44261; transformers #44346; transformers #44585; vLLM #35515")


def _low_rank(c: Config) -> bool:
    return c.q_lora_rank is not None


def _other_scale(by: Callable[[float, Array, Array], float]) -> Callable[..., Array]:
    """Scores with scale changed to by(scale, q, q_rope)."""

    def fn(q: Array, q_rope: Array, kv: Array, k_rope: Array, mask: Array, *, scale: float) -> Array:
        out: Array = stage(_SCORES)(q, q_rope, kv, k_rope, mask, scale=by(scale, q, q_rope))
        return out

    return fn


def _by_mscale(c: Config) -> float:
    """m(factor, mscale)^2."""
    assert c.yarn is not None
    return mscale(c.yarn.factor, c.yarn.mscale) ** 2 if c.yarn.mscale else 1.0


def _by_latent(q: Array, q_rope: Array, *rest: Array, scale: float, reads: tuple[Array]) -> Array:
    """Scores scaled by the root of C + Dr, as the absorbed form's dot products are long."""
    other = scale * math.sqrt(q.shape[-1] / (reads[0].shape[-1] + q_rope.shape[-1]))
    out: Array = stage(_SCORES)(q, q_rope, *rest, scale=other)
    return out


def _over_queries(s: Array) -> Array:
    out: Array = stage("mla.probs")(s.swapaxes(-1, -2)).swapaxes(-1, -2)
    return out


def _masked(change: Callable[[Array], Array]) -> Callable[..., Array]:
    """Scores under another mask."""

    def fn(q: Array, q_rope: Array, kv: Array, k_rope: Array, mask: Array, *, scale: float) -> Array:
        out: Array = stage(_SCORES)(q, q_rope, kv, k_rope, change(mask), scale=scale)
        return out

    return fn


def _next_too(mask: Array) -> Array:
    """Every query also sees the key after it."""
    return np.where(np.tri(mask.shape[-2], mask.shape[-1], 1, dtype=bool), 0.0, -np.inf) + 0 * mask[..., :1, :1]


def _not_itself(mask: Array) -> Array:
    """A query does not see its own key, but for the first."""
    m = mask.copy()
    for i in range(1, m.shape[-2]):
        m[..., i, i] = -np.inf
    return m


def _values_first(p: Array, kv: Array, *, v_dim: int) -> Array:
    out: Array = stage("mla.ctx")(p, kv[..., :v_dim], v_dim=v_dim)
    return out


def _by(part: str) -> Callable[[float, Array, Array], float]:
    """1 / sqrt of a part of the channels, YaRN's factor kept."""

    def scale(s: float, q: Array, r: Array) -> float:
        width = r.shape[-1] if part == "rope" else q.shape[-1] - r.shape[-1]
        return float(s * math.sqrt(q.shape[-1] / width))

    return scale


def _unmasked(*args: Any, **static: Any) -> Array:
    out: Array = stage("mask")(*args, **static)
    return np.where(out.min(axis=(-2, -1), keepdims=True) < 0, np.zeros_like(out), out)


def _one_later(*args: Any, past: int, **static: Any) -> Array:
    """A query also sees the next key."""
    out: Array = stage("mask")(*args, past=past, **static)
    return np.maximum(
        out, np.where(np.eye(out.shape[-2], out.shape[-1], past + 1, dtype=bool), 0.0, -np.inf).astype(out.dtype)
    )


def _one_earlier(*args: Any, past: int, **static: Any) -> Array:
    """A query does not see its own key; the first sees nothing."""
    out: Array = stage("mask")(*args, past=past, **static)
    return np.where(np.eye(out.shape[-2], out.shape[-1], past, dtype=bool), -np.inf, out).astype(out.dtype)


def _padding_seen(positions: Array, valid: Array | None, *documents: Array | None, **static: Any) -> Array:
    """Padding is a key like any other."""
    out: Array = stage("mask")(positions, None, *documents, **static)
    return out


def _normed_queries(x: Array, w: Array, *, n_heads: int) -> Array:
    q: Array = stage("mla.q")(x, w, n_heads=n_heads)
    return q / rms(q, 1e-6)


def _eps(name: str, eps: float) -> Mutant:
    at = name.rpartition(".")[2]
    return Mutant(f"A12-{at}-{eps:g}", f"the norms' eps is {eps:g}", name, setting(name, eps=eps), _A12, "small norms")


MUTANTS = (
    Mutant(
        "A04",
        "the softmax scale lacks mscale squared",
        _SCORES,
        _other_scale(lambda scale, q, r: q.shape[-1] ** -0.5),
        threads("mobius #548; optimum-intel #1877; transformers #47435; TRT-LLM #3675"),
        "YaRN",
        yarn,
    ),
    Mutant(
        "A05",
        "the softmax scale has mscale once instead of squared",
        _SCORES,
        _other_scale(lambda scale, q, r: math.sqrt(scale * q.shape[-1] ** -0.5)),
        regime="YaRN",
        applies=yarn,
    ),
    Mutant(
        "A05b",
        "the softmax scale has mscale where mscale_all_dim is meant",
        _SCORES,
        unmade,
        threads("Megatron-LM #1429"),
        "mscale that is not mscale_all_dim",
        uneven,
        made=lambda c: _other_scale(lambda scale, q, r: q.shape[-1] ** -0.5 * _by_mscale(c)),
    ),
    Mutant(
        "A09", "the softmax scale is inverted", _SCORES, _other_scale(lambda s, q, r: 1 / s), threads("MaxText #1370")
    ),
    Mutant(
        "A09b",
        "mscale squared divides the softmax scale",
        _SCORES,
        _other_scale(lambda s, q, r: 1 / (q.shape[-1] * s)),
        threads("MaxText #1370"),
        "YaRN",
        yarn,
    ),
    *[_eps(name, eps) for name in ("mla.q_a_norm", "mla.c_kv") for eps in (1e-5, 1e-6, 1e-12)],
    Mutant(
        "A13",
        "the query latent is not normalised",
        "mla.q_a_norm",
        lambda x, w, *, eps: x,
        threads("Megatron-LM #1611; Megatron-LM #1620; Megatron-Bridge #5261"),
        applies=_low_rank,
    ),
    Mutant(
        "A13b",
        "the query latent is normalised without its weight",
        "mla.q_a_norm",
        lambda x, w, *, eps: x / rms(x, eps),
    ),
    Mutant("A13c", "the key-value latent is not normalised", "mla.c_kv", lambda kv, w, *, eps: kv[..., : w.shape[0]]),
    Mutant(
        "A13d",
        "queries of full rank are normalised, head by head",
        "mla.q",
        _normed_queries,
        threads("Megatron-Bridge #5261"),
        "q_lora_rank null",
        lambda c: not _low_rank(c),
    ),
    Mutant(
        "A13e", "queries are normalised, head by head, behind their latent", "mla.q", _normed_queries, applies=_low_rank
    ),
    Mutant(
        "A17",
        "attention has no causal mask",
        _SCORES,
        _masked(lambda m: m * 0 if np.isfinite(m).all() else np.zeros_like(m)),
    ),
    Mutant("A17b", "a query also sees the next key", _SCORES, _masked(_next_too)),
    Mutant("A17c", "a query does not see its own key", _SCORES, _masked(_not_itself)),
    Mutant("A17d", "the mask lets every query see every key", "mask", _unmasked, threads("mlxcel #991; mlxcel #998")),
    Mutant("A17e", "the mask lets a query see the next key", "mask", _one_later),
    Mutant("A17f", "the mask hides a query's own key", "mask", _one_earlier),
    Mutant("A17g", "the mask lets tokens see padding", "mask", _padding_seen, regime="padding"),
    Mutant("X17", "the softmax scale knows the nope channels only", _SCORES, _other_scale(_by("nope"))),
    Mutant("X18", "the softmax scale knows the rotated channels only", _SCORES, _other_scale(_by("rope"))),
    Mutant("X25", "the softmax runs over the queries", "mla.probs", _over_queries),
    Mutant("X26", "the softmax scale counts the latent's channels", _SCORES, _by_latent, reads=("mla.c_kv",)),
    Mutant("X19", "the scores are not scaled", _SCORES, _other_scale(lambda s, q, r: 1.0)),
    Mutant("X20", "values are taken where keys are, and keys where values are", "mla.ctx", _values_first),
    Mutant("X21", "attention output is scaled twice", "mla.ctx", scaled("mla.ctx", 2.0)),
)
