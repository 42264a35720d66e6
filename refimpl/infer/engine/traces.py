"""When requests come and how long they are: traces for the simulator, from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refimpl.autograd.errors import require


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, its prompt, how many tokens it will want (which the scheduler knows only as a limit)."""

    time: float
    prompt: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Kind:
    """A class of requests: its share, the ranges of prompt and output lengths (uniform, both ends included)."""

    share: float
    prompt: tuple[int, int]
    output: tuple[int, int]


MIX = (Kind(0.8, (16, 64), (16, 48)), Kind(0.2, (192, 320), (48, 96)))
"""Four short requests for every long one."""


def arrivals(rate: float, n: int, rng: Any, *, cv: float = 1.0, mix: Sequence[Kind] = MIX) -> list[Arrival]:
    """n requests at `rate` a second: gaps from a gamma distribution of mean 1/rate and coefficient of variation cv.

    cv = 1 is Poisson; more is bursty (as BurstGPT, arXiv 2401.17644, fits measured services). Prompts are random, no two alike.
    """
    require(rate > 0 and cv > 0 and n >= 1, f"{n} arrivals at rate {rate}, cv {cv}; expected positive numbers")
    shape, now, found = 1 / cv**2, 0.0, []
    shares = [k.share / sum(k.share for k in mix) for k in mix]
    for i in range(n):
        now += float(rng.gamma(shape, 1 / (rate * shape)))
        kind = mix[int(rng.choice(len(mix), p=shares))]
        length, output = (int(rng.integers(a, b + 1)) for a, b in (kind.prompt, kind.output))
        found.append(Arrival(now, (-1 - i, *[int(t) for t in rng.integers(0, 1 << 16, length - 1)]), output))
    return found
