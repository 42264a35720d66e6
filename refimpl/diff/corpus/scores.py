"""Mistakes of attention scores, in their scale and their mask, in both forms of attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.rope import mscale

from .mutant import Mutant, always, stage, threads, unmade
from .tables import uneven, yarn

_SCORES, _ABSORBED = "mla.scores", "mla.scores_absorbed"
Scale = Callable[[float, int, int], float]
"""A wrong scale of the scores, from the right one, the width of a head's keys, Dn + Dr, and of their rotated part, Dr."""


def _scale(
    id: str,
    title: str,
    wrong: Scale,
    where: tuple[str, ...] = (),
    regime: str = "any",
    applies: Callable[[Config], bool] = always,
) -> list[Mutant]:
    """A wrong scale in both forms. Absorbed queries (B, S, H, C) do not tell the width of a head's keys, but the config does."""

    def expanded(q: Array, q_rope: Array, *rest: Array, scale: float) -> Array:
        out: Array = stage(_SCORES)(q, q_rope, *rest, scale=wrong(scale, q.shape[-1], q_rope.shape[-1]))
        return out

    def of(c: Config, scale: float) -> float:
        return wrong(scale, c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_rope_head_dim)

    absorbed = _of_config(id, title, of, where, regime, applies)[1]
    return [Mutant(id, title, _SCORES, expanded, where, regime, applies), absorbed]


def _of_config(
    id: str,
    title: str,
    wrong: Callable[[Config, float], float],
    where: tuple[str, ...] = (),
    regime: str = "any",
    applies: Callable[[Config], bool] = always,
) -> list[Mutant]:
    """A scale that takes the config to say, in both forms."""

    def made(name: str) -> Callable[[Config], Callable[..., Any]]:
        return lambda c: lambda *args, scale: stage(name)(*args, scale=wrong(c, scale))

    forms = ((id, _SCORES), (f"{id}-absorbed", _ABSORBED))
    return [Mutant(i, title, name, unmade, where, regime, applies, made=made(name)) for i, name in forms]


def _mask(id: str, title: str, change: Callable[[Array], Array]) -> list[Mutant]:
    """Scores under another mask, in both forms."""

    def fn(name: str) -> Callable[..., Any]:
        return lambda q, q_rope, keys, k_rope, mask, **static: stage(name)(
            q, q_rope, keys, k_rope, change(mask), **static
        )

    return [Mutant(i, title, name, fn(name)) for i, name in ((id, _SCORES), (f"{id}-absorbed", _ABSORBED))]


def _by_mscale(c: Config, scale: float) -> float:
    """m(factor, mscale)^2 in the place of m(factor, mscale_all_dim)^2."""
    assert c.yarn is not None
    factor = mscale(c.yarn.factor, c.yarn.mscale) ** 2 if c.yarn.mscale else 1.0
    return scale * factor / c.yarn.softmax_factor


def _by_latent(c: Config, scale: float) -> float:
    """The root of C + Dr, as the absorbed form's dot products are long, in the place of that of Dn + Dr."""
    width = c.qk_nope_head_dim + c.qk_rope_head_dim
    return scale * math.sqrt(width / (c.kv_lora_rank + c.qk_rope_head_dim))


def _next_too(mask: Array) -> Array:
    """Every query also sees the key after it."""
    n, t = mask.shape[-2:]
    return np.where(np.tri(n, t, t - n + 1, dtype=bool), 0.0, -np.inf) + 0 * mask[..., :1, :1]


def _not_itself(mask: Array) -> Array:
    """A query does not see its own key, but for the first."""
    n, t = mask.shape[-2:]
    own = np.eye(n, t, t - n, dtype=bool) & (np.arange(t) > 0)
    return np.where(own, -np.inf, mask)


def _nothing_hidden(mask: Array) -> Array:
    """Every query sees every key."""
    return mask * 0 if np.isfinite(mask).all() else np.zeros_like(mask)


MUTANTS = (
    *_scale(
        "A04",
        "the softmax scale lacks mscale squared",
        lambda scale, width, rope: width**-0.5,
        threads("mobius #548; optimum-intel #1877; transformers #47435; TRT-LLM #3675"),
        "YaRN",
        yarn,
    ),
    *_scale(
        "A05",
        "the softmax scale has mscale once instead of squared",
        lambda scale, width, rope: math.sqrt(scale * width**-0.5),
        regime="YaRN",
        applies=yarn,
    ),
    *_of_config(
        "A05b",
        "the softmax scale has mscale where mscale_all_dim is meant",
        _by_mscale,
        threads("Megatron-LM #1429"),
        "mscale that is not mscale_all_dim",
        uneven,
    ),
    *_scale("A09", "the softmax scale is inverted", lambda scale, *_: 1 / scale, threads("MaxText #1370")),
    *_scale(
        "A09b",
        "mscale squared divides the softmax scale",
        lambda scale, width, rope: 1 / (width * scale),
        threads("MaxText #1370"),
        "YaRN",
        yarn,
    ),
    *_mask("A17", "attention has no causal mask", _nothing_hidden),
    *_mask("A17b", "a query also sees the next key", _next_too),
    *_mask("A17c", "a query does not see its own key", _not_itself),
    *_scale(
        "X17",
        "the softmax scale knows the nope channels only",
        lambda scale, width, rope: scale * math.sqrt(width / (width - rope)),
    ),
    *_scale(
        "X18",
        "the softmax scale knows the rotated channels only",
        lambda scale, width, rope: scale * math.sqrt(width / rope),
    ),
    *_of_config("X26", "the softmax scale counts the latent's channels", _by_latent),
    *_scale("X19", "the scores are not scaled", lambda *_: 1.0),
)
