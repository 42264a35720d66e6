"""Known bugs between a cache and the tokens that follow it: they show in a decode step or a later chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array

from .mutant import Mutant, stage, threads

_MERGE = threads("sglang #40903; sglang #35045; sglang #33064; vLLM #52796; vLLM #28840; vLLM #47079")


def _merged(base: float, name: str) -> Callable[..., Any]:
    """Attention of the cache and of the new tokens, each by itself, merged by their log-sum-exps, taken `base` times.

    p (B, H, S, T) holds e^(s - lse): the mass of a part is e^(lse of the part - lse), its merged weight that to the power `base`.
    """

    def fn(p: Array, values: Array, **static: Any) -> Any:
        past = p.shape[-1] - p.shape[-2]
        mass = np.stack([p[..., :past].sum(axis=-1), p[..., past:].sum(axis=-1)])  # (2, B, H, S)
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.where(mass > 0, mass**base, 0)
            factor = np.where(mass > 0, weight / weight.sum(axis=0) / mass, 0)
        scaled = np.concatenate([p[..., :past] * factor[0, ..., None], p[..., past:] * factor[1, ..., None]], axis=-1)
        return stage(name)(scaled.astype(p.dtype), values, **static)

    return fn


def _forgets(name: str) -> Callable[..., Any]:
    """Scores of the new tokens alone, as a prefill has them."""

    def fn(q: Any, q_rope: Any, keys: Any, k_rope: Any, mask: Array, **static: Any) -> Any:
        past = mask.shape[-1] - mask.shape[-2]
        mask = np.where(np.arange(mask.shape[-1]) < past, -np.inf, mask).astype(mask.dtype)
        return stage(name)(q, q_rope, keys, k_rope, mask, **static)

    return fn


def _both(
    id: str, title: str, names: tuple[str, str], make: Callable[[str], Any], where: tuple[str, ...]
) -> list[Mutant]:
    """The same mistake in both forms of attention."""
    suffixes = ("", "-absorbed")
    return [Mutant(id + s, title, n, make(n), where, "cache") for s, n in zip(suffixes, names, strict=True)]


_CTX, _SCORES = ("mla.ctx", "mla.ctx_latent"), ("mla.scores", "mla.scores_absorbed")
_LN2 = float(np.log(2))
MUTANTS = (
    *_both("A18", "a log-sum-exp to base 2 is merged as a natural one", _CTX, lambda n: _merged(1 / _LN2, n), _MERGE),
    *_both("A18b", "a natural log-sum-exp is merged as one to base 2", _CTX, lambda n: _merged(_LN2, n), _MERGE),
    *_both("A20", "the cache is not attended to", _SCORES, _forgets, threads("MaxText #4634")),
)
