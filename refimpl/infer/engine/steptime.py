"""How long a step takes, from measured steps: seconds = a + b tokens + c pairs + d rows, none negative."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.errors import require

from .job import Work


@dataclass(frozen=True)
class Load:
    """What a step has to do: `tokens` to run, query-key `pairs` of attention, `rows` in it (each reads its cache and, at its end,
    gets logits).
    """

    tokens: int
    pairs: int
    rows: int

    @classmethod
    def of(cls, work: Sequence[Work]) -> Load:
        """The load of a step's work."""
        return cls(sum(w.stop - w.start for w in work), sum(w.pairs for w in work), len(work))


@dataclass(frozen=True)
class StepTime:
    """Seconds for a step, a token, a pair, a row."""

    step: float
    token: float
    pair: float
    row: float

    def seconds(self, load: Load) -> float:
        """What the load takes."""
        return self.step + self.token * load.tokens + self.pair * load.pairs + self.row * load.rows


def fit(samples: Sequence[tuple[Load, float]]) -> StepTime:
    """The StepTime with the least sum of squared *relative* errors: short steps count as much as long ones. Of the four
    numbers some may be 0, none less: the best of the 15 choices of which are not.
    """
    require(len(samples) >= 4, f"{len(samples)} measured steps; four numbers need at least four")
    y = np.array([s for _, s in samples])
    require(bool((y > 0).all()), "a measured step took no time; the clock is too coarse")
    a = np.array([(1, load.tokens, load.pairs, load.rows) for load, _ in samples]) / y[:, None]
    best, least = np.zeros(4), np.inf
    for n in range(1, 5):
        for kept in itertools.combinations(range(4), n):
            x, *_ = np.linalg.lstsq(a[:, kept], np.ones(len(y)), rcond=None)
            error = float(((a[:, kept] @ x - 1) ** 2).sum())
            if (x >= 0).all() and error < least:
                best, least = np.zeros(4), error
                best[list(kept)] = x
    return StepTime(*best.tolist())


def worst(times: StepTime, samples: Sequence[tuple[Load, float]]) -> float:
    """The largest relative error on these steps."""
    return max(abs(times.seconds(load) / seconds - 1) for load, seconds in samples)
