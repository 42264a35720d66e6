"""Engines that show only tokens and log-probabilities: asked over HTTP or read from a file, held against our own twins' spread."""

from .expectation import Expected, expected
from .measuring import Score, measure
from .shown import Shown

__all__ = ["Expected", "Score", "Shown", "expected", "measure"]
