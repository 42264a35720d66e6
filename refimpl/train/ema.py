"""The average of the parameters over the steps, kept apart from the step (R 3.2.3): in memory of its own, brought up to date while
the next step runs. The decay is not published.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.module import is_buffer

Weights = dict[str, Array]


def averaged(average: Mapping[str, Array], weights: Mapping[str, Array], decay: float) -> Weights:
    """a <- decay a + (1 - decay) w, in a's dtype; buffers (the balancing bias) are no parameters: the newest value counts.

    SpecError if the two do not have the same names.
    """
    odd = sorted(set(average) ^ set(weights))
    require(not odd, f"average and weights have different names: {odd[:3]}")

    def one(name: str, a: Array) -> Array:
        w = weights[name].astype(a.dtype)
        return w if is_buffer(name) else np.asarray(decay, a.dtype) * a + np.asarray(1 - decay, a.dtype) * w

    return {name: one(name, a) for name, a in average.items()}


class Ema:
    """The average, computed by a thread of its own: `add` after every step returns at once unless the one before is still being
    added, so at most one set of weights waits; `value` waits and gives the average. A step never changes weights in place, so
    nothing is copied. To go on from a checkpoint, start with the average that it holds.
    """

    def __init__(self, start: Mapping[str, Array], decay: float) -> None:
        require(0 <= decay < 1, f"decay is {decay}; it must be in 0..1, without 1")
        self._decay = decay
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ema")
        self._newest: Future[Weights] = Future()
        self._newest.set_result({name: np.array(w, dtype=np.float32) for name, w in start.items()})

    def add(self, weights: Mapping[str, Array]) -> None:
        """Take the weights after a step into the average. An error of the step before is raised here."""
        self._newest = self._pool.submit(averaged, self._newest.result(), weights, self._decay)

    def value(self) -> Weights:
        """The average after every step that was added."""
        return self._newest.result()

    def __enter__(self) -> Ema:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
