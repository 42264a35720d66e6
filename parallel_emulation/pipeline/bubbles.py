"""The published bubble formulas (R table 2, DualPipe README) and where they are exact.

Found by simulating a grid of integer times, and tested on it: outside these conditions take the bubble from
`timeline.simulate`; the formula of DualPipe is then off in either direction and different on each rank.
"""

from __future__ import annotations

from .schedule import Schedule
from .timeline import Times


def published(schedule: Schedule, t: Times) -> float:
    """Idle time of a rank: makespan - busy. With S stages on P ranks and times per chunk (one stage, one micro-batch):

    GPipe, 1F1B, interleaved (P-1)(F+B); ZB1P (P-1)(F+B-2W); DualPipe, DualPipeV (S/2-1)(F&B+B-3W).
    """
    ranks, stages = schedule.layout.n_ranks, schedule.layout.n_stages
    if schedule.name in ("dualpipe", "dualpipev"):
        return (stages / 2 - 1) * (t.overlapped + t.B - 3 * t.W)
    return (ranks - 1) * (t.F + t.B - (2 * t.W if schedule.name == "zb1p" else 0))


def is_exact(schedule: Schedule, t: Times) -> bool:
    """Whether every rank idles exactly for `published` (sufficient; messages must take no time).

    GPipe, 1F1B, interleaved: always. ZB1P: W <= F, W <= I and m >= P. DualPipe, DualPipeV: F = I, F&B = F + B and
    W <= F; with two stages there is no bubble at all.
    """
    input_part = t.B - t.W
    if t.message:
        return schedule.layout.n_ranks == 1
    if schedule.name == "zb1p":
        enough = schedule.layout.micro_batches >= schedule.layout.n_ranks
        return schedule.layout.n_ranks == 1 or (enough and min(t.F, input_part) >= t.W)
    if schedule.name in ("dualpipe", "dualpipev"):
        return schedule.layout.n_stages == 2 or (input_part == t.F and t.overlapped == t.F + t.B and t.W <= t.F)
    return True
