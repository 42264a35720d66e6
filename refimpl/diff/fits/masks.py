"""Scores that were not recorded, or not as they should be: a window of keys that nobody asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import STAGES

from ..corpus import Mutant
from ..tolerance import row_errors
from ..wide import MASKED
from .evidence import Evidence, guess
from .sums import PARTS, SCORES


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


def halves(ev: Evidence) -> Iterator[Mutant]:
    """Scores that were not recorded and lack a part: q k of nope channels, or of rotated ones."""
    for call in [c for c in ev.region[:-1] if c.stage in SCORES]:
        for i, said in enumerate(PARTS):
            yield guess(f"mla.scores is {said} alone", call.stage, _alone(call.stage, i))


def _alone(name: str, part: int) -> Callable[..., Any]:
    return lambda *args, **static: STAGES[name].fn(
        *[a * 0 if i == 1 - part else a for i, a in enumerate(args)], **static
    )


def _back(queries: int, keys: int) -> Array:
    """How far back every key lies.  -> (S, T)."""
    return np.arange(queries)[:, None] + keys - queries - np.arange(keys)


def _masked(name: str, furthest: int) -> Callable[..., Any]:
    def fn(*args: Any, **static: Any) -> Array:
        y = STAGES[name].fn(*args, **static)
        return np.where(_back(*y.shape[-2:]) <= furthest, y, -np.inf)

    return fn
