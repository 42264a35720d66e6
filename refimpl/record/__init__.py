"""Making cases and traces: new cases, our own runs, and one adapter a framework (`hf`: transformers)."""

from .make_case import new_case
from .ours import trace_case

__all__ = [
    "new_case",
    "trace_case",
]
