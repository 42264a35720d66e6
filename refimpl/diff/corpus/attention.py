"""Mistakes of multi-head latent attention: latents, queries, mask, values."""

from __future__ import annotations

from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config

from .mutant import Mutant, scaled, setting, stage, threads
from .norms import rms

_A12 = threads("transformers #44261; transformers #44346; transformers #44585; vLLM #35515")


def _low_rank(c: Config) -> bool:
    return c.q_lora_rank is not None


def _over_queries(s: Array) -> Array:
    out: Array = stage("mla.probs")(s.swapaxes(-1, -2)).swapaxes(-1, -2)
    return out


def _values_first(p: Array, kv: Array, *, v_dim: int) -> Array:
    out: Array = stage("mla.ctx")(p, kv[..., :v_dim], v_dim=v_dim)
    return out


def _keys_last(q: Array, q_rope: Array, kv: Array, *rest: Array, scale: float) -> Array:
    keys = kv[..., q_rope.shape[-1] - q.shape[-1] :]
    out: Array = stage("mla.scores")(q, q_rope, keys, *rest, scale=scale)
    return out


def _turned(w: Array, heads: int, first: int) -> Array:
    """The same matrix with a head's rows in another order: those from `first` on, then the others.  w (H (Dn+Dv), C)."""
    rows = w.reshape(heads, -1, w.shape[-1])
    return np.concatenate([rows[:, first:], rows[:, :first]], axis=1).reshape(w.shape)


def _values_first_absorbed(o: Array, w: Array, *, v_dim: int) -> Array:
    out: Array = stage("mla.ctx_absorbed")(o, _turned(w, o.shape[2], v_dim), v_dim=v_dim)
    return out


def _keys_last_absorbed(q: Array, w: Array, *, nope: int) -> Array:
    out: Array = stage("mla.q_absorbed")(q, _turned(w, q.shape[2], w.shape[0] // q.shape[2] - nope), nope=nope)
    return out


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


def _one_earlier_but_first(*args: Any, past: int, **static: Any) -> Array:
    """A query does not see its own key, but for the first of all."""
    out: Array = stage("mask")(*args, past=past, **static)
    own = np.eye(out.shape[-2], out.shape[-1], past, dtype=bool) & (np.arange(out.shape[-1]) > 0)
    return np.where(own, -np.inf, out).astype(out.dtype)


def _padding_seen(positions: Array, valid: Array | None, *documents: Array | None, **static: Any) -> Array:
    """Padding is a key like any other."""
    out: Array = stage("mask")(positions, None, *documents, **static)
    return out


def _over_all(kv: Array, w: Array, *, eps: float) -> Array:
    out: Array = w * kv[..., : w.shape[0]] / rms(kv, eps)
    return out


def _normed_queries(x: Array, w: Array, *, n_heads: int) -> Array:
    q: Array = stage("mla.q")(x, w, n_heads=n_heads)
    return q / rms(q, 1e-6)


def _eps(name: str, eps: float) -> Mutant:
    at = name.rpartition(".")[2]
    return Mutant(f"A12-{at}-{eps:g}", f"the norms' eps is {eps:g}", name, setting(name, eps=eps), _A12, "small norms")


MUTANTS = (
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
    Mutant("A13f", "the key-value latent's norm counts the rotated channels too", "mla.c_kv", _over_all),
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
    Mutant("A17d", "the mask lets every query see every key", "mask", _unmasked, threads("mlxcel #991; mlxcel #998")),
    Mutant("A17e", "the mask lets a query see the next key", "mask", _one_later),
    Mutant("A17f", "the mask hides a query's own key", "mask", _one_earlier),
    Mutant("A17f-later", "a query does not see its own key", "mask", _one_earlier_but_first),
    Mutant("A17g", "the mask lets tokens see padding", "mask", _padding_seen, regime="padding"),
    Mutant("X25", "the softmax runs over the queries", "mla.probs", _over_queries, ahead=True),
    Mutant("X20", "values are taken where keys are, and keys where values are", "mla.ctx", _values_first),
    Mutant(
        "X20b",
        "values are taken where keys are, and keys where values are",
        "mla.scores",
        _keys_last,
        also={"mla.ctx": _values_first},
    ),
    Mutant(
        "X20-absorbed",
        "values are taken where keys are, and keys where values are",
        "mla.ctx_absorbed",
        _values_first_absorbed,
        also={"mla.q_absorbed": _keys_last_absorbed},
    ),
    Mutant("X21", "attention output is scaled twice", "mla.ctx", scaled("mla.ctx", 2.0)),
    Mutant("X21-absorbed", "attention output is scaled twice", "mla.ctx_absorbed", scaled("mla.ctx_absorbed", 2.0)),
)
