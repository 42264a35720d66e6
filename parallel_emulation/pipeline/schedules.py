"""The schedules by name, for the command line and the planner."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from refimpl.autograd.errors import SpecError, require

from .dualpipe import dualpipe, dualpipev
from .schedule import Schedule
from .schedules_1f1b import gpipe, interleaved, one_f_one_b, zb1p

SCHEDULES: Mapping[str, Callable[[int, int], Schedule]] = MappingProxyType(
    {
        "gpipe": gpipe,
        "1f1b": one_f_one_b,
        "interleaved": interleaved,
        "zb1p": zb1p,
        "dualpipe": dualpipe,
        "dualpipev": dualpipev,
    }
)
"""Name -> f(pp, micro_batches); pp counts ranks (DualPipeV and interleaved have more stages than that)."""


def build(name: str, pp: int, micro_batches: int, chunks: int | None = None) -> Schedule:
    """The named schedule, however it is spelt ("DualPipe", "interleaved-1f1b").

    `chunks` is interleaved's number of stages per rank (2 unless given).
    Raises SpecError for an unknown name, a `chunks` that the schedule does not have, and sizes it cannot work with.
    """
    given, name = name, re.sub(r"[-_ ]", "", name.lower())
    name = "interleaved" if name == "interleaved1f1b" else name
    if name not in SCHEDULES:
        raise SpecError(f"schedule {given!r}; known: {', '.join(SCHEDULES)}")
    if chunks is None:
        return SCHEDULES[name](pp, micro_batches)
    require(name == "interleaved", f"chunks={chunks} for {name}; only 'interleaved' has them as a choice")
    return interleaved(pp, micro_batches, chunks)
