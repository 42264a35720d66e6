"""Mechanisms that articles explaining V3 describe and V3 does not have: small stages named `variant.*`, never a default."""

from . import (
    average,
    calibration,
    capacity,
    cold_start,
    contrastive,
    distance,
    gumbel,
    handoff,
    progressive,
    segments,
    temperature,
    top2,
    window,
)
from .marked import MARK

__all__ = [
    "MARK",
    "average",
    "calibration",
    "capacity",
    "cold_start",
    "contrastive",
    "distance",
    "gumbel",
    "handoff",
    "progressive",
    "segments",
    "temperature",
    "top2",
    "window",
]
