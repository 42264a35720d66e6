"""Routing weights by another formula: of the chosen experts' scores or logits, normalised or not, times a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd import nn_ops
from refimpl.autograd.tensor import Array

from ..corpus import Mutant
from .evidence import Evidence, guess, near
from .sums import solved
from .words import likely

Formula = Callable[[Array, Array], Array]
"""Weights of the chosen experts' scores (B, S, K), and of all scores (B, S, E), but for a factor."""


def _logit(s: Array) -> Array:
    return np.log(s) - np.log1p(-s)


FORMULAS: tuple[tuple[str, Formula], ...] = (
    ("{} for all experts", lambda s, _: np.ones_like(s)),
    ("{} x softmax of the chosen experts' scores", lambda s, _: nn_ops.softmax(s)),
    ("{} x softmax of the chosen experts' logits", lambda s, _: nn_ops.softmax(_logit(s))),
    ("{} x the chosen experts' share of the softmax of all logits", lambda s, all_: _share(s, all_)),
    ("{} x the chosen experts' logits", lambda s, _: _logit(s)),
    ("{} x the squares of the chosen experts' scores", lambda s, _: s * s),
    (
        "{} x the squares of the chosen experts' scores, by their sum",
        lambda s, _: s * s / (s * s).sum(-1, keepdims=True),
    ),
    ("{} x the chosen experts' scores by their length", lambda s, _: s / np.sqrt((s * s).sum(-1, keepdims=True))),
    ("{} x the chosen experts' scores by the largest", lambda s, _: s / s.max(-1, keepdims=True)),
    ("{} x the chosen experts' scores", lambda s, _: s * 1),
    ("{} x the chosen experts' scores by the sum of all", lambda s, all_: s / all_.sum(-1, keepdims=True)),
)
"""What is said of weights, {} being the number, and what they are but for it."""


def _share(s: Array, all_: Array) -> Array:
    every = _logit(all_)
    top = every.max(axis=-1, keepdims=True)
    return np.asarray(np.exp(_logit(s) - top) / np.exp(every - top).sum(axis=-1, keepdims=True))


def weights(ev: Evidence) -> Iterator[Mutant]:
    """Another formula of a few, times the number that brings it nearest."""
    if ev.call.stage != "router.weights" or not ev.whole:
        return
    for said, formula in FORMULAS:
        with np.errstate(all="ignore"):
            y = formula(np.take_along_axis(ev.args[0], ev.args[1], axis=-1), ev.args[0])
        (k,) = solved([y], ev.x)
        if near(ev.x, k * y, ev.limit):
            for v, number in likely(k, ev.config):
                title = f"router.weights are {said.format(number).removeprefix('1 x ')}"
                yield guess(title, "router.weights", _by(formula, v))


def _by(formula: Formula, v: float) -> Callable[..., Any]:
    def fn(s: Array, ids: Array, **_: Any) -> Array:
        return v * formula(np.take_along_axis(s, ids, axis=-1), s)

    return fn
