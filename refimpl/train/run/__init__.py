"""A training run from a recipe file: the loop, what it reads, saves and tells."""

from .job import Checkpoints, Evaluation, Job, Log, Samples
from .journal import records
from .loop import End, simulated, train
from .reading import load_job, read_job

__all__ = [
    "Checkpoints",
    "End",
    "Evaluation",
    "Job",
    "Log",
    "Samples",
    "load_job",
    "read_job",
    "records",
    "simulated",
    "train",
]
