"""Pipelines: a schedule is data; one object is run, checked, timed and drawn."""

from .checker import check, facts
from .executor import Outcome, Part, run
from .schedule import Batch, Layout, Op, Schedule, parse
from .schedules import SCHEDULES, build
from .timeline import Timeline, Times, simulate

__all__ = [
    "SCHEDULES",
    "Batch",
    "Layout",
    "Op",
    "Outcome",
    "Part",
    "Schedule",
    "Timeline",
    "Times",
    "build",
    "check",
    "facts",
    "parse",
    "run",
    "simulate",
]
