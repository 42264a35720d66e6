"""Judging another implementation's recorded run: case, trace, gates, replay stage by stage, tolerance, verdict, report."""

from .case import Case
from .judge import Judgement
from .report import render, summary, to_json
from .trace import Header, Trace, digest

__all__ = [
    "Case",
    "Header",
    "Judgement",
    "Trace",
    "digest",
    "render",
    "summary",
    "to_json",
]
