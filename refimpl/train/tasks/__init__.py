"""Several tasks at once: samples of each, a loss for each, weights between them. Described in articles, not in V3."""

from . import losses, weighting
from .own import Own
from .reader import TaskBatch, TaskReader, joined
from .samples import Rows, Sample, samples
from .step import step
from .weighting import History

__all__ = [
    "History",
    "Own",
    "Rows",
    "Sample",
    "TaskBatch",
    "TaskReader",
    "joined",
    "losses",
    "samples",
    "step",
    "weighting",
]
