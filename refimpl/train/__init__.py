"""Training: the optimiser, one step on one rank, and the same step on a mesh of ranks (`parallel`)."""

from .optimizer import AdamState, AdamW, adamw, clip, global_norm
from .training import Recipe, Report, State, constant, init, step, step_on, text_batches, train

__all__ = [
    "AdamState",
    "AdamW",
    "Recipe",
    "Report",
    "State",
    "adamw",
    "clip",
    "constant",
    "global_norm",
    "init",
    "step",
    "step_on",
    "text_batches",
    "train",
]
