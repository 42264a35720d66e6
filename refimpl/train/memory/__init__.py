"""Memory of a training step: micro-batches, what is kept and what is made once more, the peak predicted and measured."""

from . import budget
from .accumulate import accumulate, gradients, step
from .held import held
from .policies import Frugal, Policy, Segment
from .predict import Probe, measured, peak

__all__ = [
    "Frugal",
    "Policy",
    "Probe",
    "Segment",
    "accumulate",
    "budget",
    "gradients",
    "held",
    "measured",
    "peak",
    "step",
]
