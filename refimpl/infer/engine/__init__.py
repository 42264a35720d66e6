"""The batching engine: pages of latents, a scheduler with policies, a batch-invariant mode; and the same in simulated time."""

from .blocks import Blocks
from .forward import Piece
from .invariant import Tiled
from .job import Job, Work
from .loop import Counts, Engine
from .metrics import Summary, summary
from .pages import Pages
from .policies import POLICIES, ArrivalGap, ByComplexity, FirstCome, Policy, Queue, ShortestFirst
from .scheduler import Limits, Scheduler, Step
from .simulate import Served, simulate
from .steptime import Load, StepTime, fit, worst
from .traces import MIX, Arrival, Kind, arrivals

__all__ = [
    "MIX",
    "POLICIES",
    "Arrival",
    "ArrivalGap",
    "Blocks",
    "ByComplexity",
    "Counts",
    "Engine",
    "FirstCome",
    "Job",
    "Kind",
    "Limits",
    "Load",
    "Pages",
    "Piece",
    "Policy",
    "Queue",
    "Scheduler",
    "Served",
    "ShortestFirst",
    "Step",
    "StepTime",
    "Summary",
    "Tiled",
    "Work",
    "arrivals",
    "fit",
    "simulate",
    "summary",
    "worst",
]
