"""Scores that were not recorded, or not as they should be: a window of keys that nobody asked for, another softmax scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from ..hypothesis import rerun, theirs
from ..tolerance import row_errors
from ..wide import MASKED
from .evidence import Evidence, guess
from .sums import SCORES, least, scaled
from .words import likely

WIDEST, STEPS, TURNS = math.log(100), 12, 24
"""Between a 100th and 100 times the right softmax scale, in so many steps on either side; then so many of the golden section."""


def window(ev: Evidence) -> Iterator[Mutant]:
    """Keys further back than a number of places are hidden: scores or the mask show which, an output from which token on."""
    scores = next((c.stage for c in ev.region if c.stage in ("mask", *SCORES) and c is not ev.call), "")
    if not ev.whole:
        return
    furthest = -1
    if ev.call.stage in ("mask", *SCORES):
        scores, back = ev.call.stage, _back(*ev.e.shape[-2:])
        seen = ((ev.x > MASKED) & (ev.e > MASKED)).any(axis=tuple(range(ev.e.ndim - 2)))
        furthest = int(back[seen].max(initial=-1))
    elif scores and ev.letters[:2] == ["B", "S"]:
        off = row_errors(ev.call.stage, ev.x, ev.e) > ev.finding.allowed
        late = off.reshape(*off.shape[:2], -1).any(axis=(0, 2))
        furthest = int(late.argmax()) - 1 if late.any() else -1
    if furthest >= 0:
        yield guess(f"keys more than {furthest} places back are masked", scores, _masked(scores, furthest))


def _back(queries: int, keys: int) -> Array:
    """How far back every key lies.  -> (S, T)."""
    return np.arange(queries)[:, None] + keys - queries - np.arange(keys)


def _masked(name: str, furthest: int) -> Callable[..., Any]:
    def fn(*args: Any, **static: Any) -> Array:
        y = STAGES[name].fn(*args, **static)
        return np.where(_back(*y.shape[-2:]) <= furthest, y, -np.inf)

    return fn


def scale(ev: Evidence) -> Iterator[Mutant]:
    """Another softmax scale, of scores that were not recorded: that with which the output is nearest."""
    call = next((c for c in ev.region[:-1] if c.stage in SCORES), None)
    if call is None or not ev.whole:
        return
    name, x = call.stage, np.asarray(theirs(ev.call.tap, ev.few), np.float64)

    def far(exponent: float) -> float:
        ours = rerun(ev.region, ev.few, guess("", name, scaled(name, math.exp(exponent))))
        return float(np.linalg.norm(ours - x))

    best = min(np.linspace(-WIDEST, WIDEST, 2 * STEPS + 1), key=far)
    for k, said in likely(math.exp(least(far, best - WIDEST / STEPS, best + WIDEST / STEPS, TURNS)), ev.config):
        yield guess(f"the softmax scale is {said} times what it should be", name, scaled(name, k))
