"""Test vectors: what a stage must give, in files that an engine of any language reads, and readers that judge what it gave."""

from .read_vectors import Vectors
from .runs import all_runs
from .writing import write_vectors

__all__ = ["Vectors", "all_runs", "write_vectors"]
