"""Served requests in a few numbers: throughput, time to the first token, time per output token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .simulate import Served


@dataclass(frozen=True)
class Summary:
    """Tokens a second from the first arrival to the last token; medians and 99th percentiles, in seconds; times sent away."""

    throughput: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    preempted: int


def summary(served: Sequence[Served]) -> Summary:
    """Percentiles by the nearest rank: the value that so many percent do not exceed, one that occurred."""
    took = max(s.last for s in served) - min(s.arrival for s in served)
    ttft, tpot = [s.ttft for s in served], [s.tpot for s in served if s.tokens > 1]
    return Summary(
        sum(s.tokens for s in served) / took,
        *(_percentile(ttft, 50), _percentile(ttft, 99)),
        *(_percentile(tpot, 50), _percentile(tpot, 99)),
        sum(s.preempted for s in served),
    )


def _percentile(values: Sequence[float], percent: int) -> float:
    return float(np.percentile(values, percent, method="inverted_cdf")) if values else 0.0
