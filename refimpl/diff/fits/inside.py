"""One number inside what was computed for a tap, where none shows by itself: another softmax scale, a temperature, a cap, a clamp,
a number too much in a denominator. It is the one with which the tap, computed again, is nearest to the candidate's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from refimpl.autograd import nn_ops
from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from ..hypothesis import rerun, theirs
from .evidence import LEFT, Evidence, finite, guess
from .sums import SCORES, least, scaled
from .words import likely

STEPS, TURNS = 12, 40
"""Steps in which a number is looked for, then so many of the golden section."""
ALONG = 0.35
"""Cosine between what is off and what the number does at one of the tries, from which on it is looked for."""


@dataclass(frozen=True)
class Number:
    """What is said, with {} for the number; the stages that it may be in; a stage's function with it, of its name and the number;
    the smallest and largest that is looked for; a few that are tried first.
    """

    said: str
    stages: tuple[str, ...]
    fn: Callable[[str, float], Callable[..., Any]]
    low: float
    high: float
    tries: tuple[float, ...] = (0.2, 0.8, 1.5)


def _capped(name: str, c: float) -> Callable[..., Any]:
    """Squeezed between -c and c: c tanh(y / c)."""

    def fn(*args: Any, **static: Any) -> Array:
        y = STAGES[name].fn(*args, **static)
        return np.where(np.isneginf(y), y, c * np.tanh(y / c))

    return fn


def _temperature(name: str, k: float) -> Callable[..., Any]:
    return lambda z, **static: STAGES[name].fn(z * k, **static)


def _in_weights(name: str, v: float) -> Callable[..., Any]:
    return lambda *args, **static: STAGES[name].fn(*args, **static | {"eps": v})


def _in_softmax(name: str, v: float) -> Callable[..., Any]:
    """e^s / (sum e^s + v)."""

    def fn(s: Array) -> Array:
        top = np.maximum(s.max(axis=-1, keepdims=True), 0)
        y: Array = np.exp(s - top)
        return y / (y.sum(axis=-1, keepdims=True) + v * np.exp(-top))

    return fn


def _clamped(name: str, v: float) -> Callable[..., Any]:
    return lambda gate, up, *rest: STAGES[name].fn(gate, np.clip(up, -v, v), *rest)


def _gate_clamped(name: str, v: float) -> Callable[..., Any]:
    return lambda gate, up, *rest: STAGES[name].fn(np.minimum(gate, v), up, *rest)


def _swish(name: str, v: float) -> Callable[..., Any]:
    """gate sigmoid(v gate) up."""
    return lambda gate, up, *rest: STAGES[name].fn(gate, up * nn_ops.sigmoid(v * gate) / nn_ops.sigmoid(gate), *rest)


def _times(name: str, v: float) -> Callable[..., Any]:
    return lambda *args, **static: STAGES[name].fn(*args, **static) * v


_ACTS = ("mlp.act", "shared.act", "moe.act")
_BRANCHES = ("attn_out", "moe.routed", "moe.shared")
"""What is added to something else, so that a factor of it is none of the sum."""
NUMBERS = (
    Number("the softmax scale is {} times what it should be", SCORES, scaled, 1e-2, 1e2),
    Number("mla.scores is capped at {}", SCORES, _capped, 0.3, 1e3, (2.0, 10.0)),
    Number("logits is capped at {}", ("logits",), _capped, 0.3, 1e3, (2.0, 10.0)),
    Number(
        "the softmax of attention has {} too much in its denominator", ("mla.probs",), _in_softmax, 1e-3, 1e3, (1.0,)
    ),
    Number(
        "router.logits are {} times what they should be in router.scores", ("router.scores",), _temperature, 1e-2, 1e2
    ),
    Number(
        "the sum that routing weights are divided by has {} too much",
        ("router.weights",),
        _in_weights,
        1e-6,
        1e2,
        (0.1,),
    ),
    Number("up is clamped to +-{}", _ACTS, _clamped, 1e-2, 1e2, (0.3, 1.0, 4.0)),
    Number("gate is clamped to {} at most", _ACTS, _gate_clamped, 1e-2, 1e2, (0.3, 1.0, 4.0)),
    Number("SiLU is x sigmoid({} x)", _ACTS, _swish, 1e-1, 1e1, (1.5,)),
    *[Number(f"{name} is {{}} times what it should be", (name,), _times, 1e-2, 1e2) for name in _BRANCHES],
)


def numbers(ev: Evidence) -> Iterator[Mutant]:
    """What one number in a stage that was computed for the tap explains."""
    if not ev.whole:
        return
    x = np.asarray(theirs(ev.call.tap, ev.few), np.float64)
    off = finite(x - _with(ev, None))
    here = {c.stage for c in ev.region}
    for number in [n for n in NUMBERS if not here.isdisjoint(n.stages)]:
        made = partial(_made, number, next(s for s in number.stages if s in here))
        if max(_cosine(finite(_with(ev, made(v)) - x) + off, off) for v in number.tries) >= ALONG:
            yield from _guesses(ev, x, number, made, float(np.linalg.norm(off)))


def _made(number: Number, stage: str, v: float) -> Mutant:
    also = {s: number.fn(s, v) for s in number.stages if s != stage}
    return guess(number.said, stage, number.fn(stage, v), also)


def _with(ev: Evidence, m: Mutant | None) -> Array:
    """The tap's first tokens with a mistake in them."""
    return rerun(ev.region, ev.few, m or guess("", "", np.asarray))


def _cosine(a: Array, b: Array) -> float:
    a, b = a.ravel(), b.ravel()
    return float(a @ b) / max(float(np.sqrt((a @ a) * (b @ b))), np.finfo(float).tiny)


def _guesses(ev: Evidence, x: Array, n: Number, made: Callable[[float], Mutant], unchanged: float) -> Iterator[Mutant]:
    def far(exponent: float) -> float:
        return float(np.linalg.norm(finite(_with(ev, made(math.exp(exponent))) - x)))

    low, high = math.log(n.low), math.log(n.high)
    step = (high - low) / (2 * STEPS)
    best = min(np.linspace(low, high, 2 * STEPS + 1), key=far)
    if far(best) <= LEFT * unchanged:
        for v, said in likely(math.exp(least(far, best - step, best + step, TURNS)), ev.config):
            yield replace(made(v), title=n.said.format(said))
