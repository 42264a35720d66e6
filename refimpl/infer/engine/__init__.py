"""The batching engine: pages of latents, a scheduler with policies, a batch-invariant mode; and the same in simulated time."""

from .blocks import Blocks
from .forward import Piece
from .invariant import Tiled
from .job import Job, Work
from .loop import Engine
from .pages import Pages
from .policies import POLICIES, ArrivalGap, ByComplexity, FirstCome, Policy, Queue, ShortestFirst
from .scheduler import Limits, Scheduler, Step

__all__ = [
    "POLICIES",
    "ArrivalGap",
    "Blocks",
    "ByComplexity",
    "Engine",
    "FirstCome",
    "Job",
    "Limits",
    "Pages",
    "Piece",
    "Policy",
    "Queue",
    "Scheduler",
    "ShortestFirst",
    "Step",
    "Tiled",
    "Work",
]
