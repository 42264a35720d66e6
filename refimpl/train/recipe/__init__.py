"""A training run as data: schedules over tokens, phases, the optimiser's settings; checked, scaled, printed, drawn (R 4.2, 4.3)."""

from .amounts import amount, shown
from .reading import document, load, read, recipes
from .run import Optimizer, Phase, Run, Setting
from .scaling import scaled, to_toml
from .schedule import Piece, Schedule
from .steps import Steps
from .table import render, rows, to_json
from .tasks import Task, Weighting, divided

__all__ = [
    "Optimizer",
    "Phase",
    "Piece",
    "Run",
    "Schedule",
    "Setting",
    "Steps",
    "Task",
    "Weighting",
    "amount",
    "divided",
    "document",
    "load",
    "read",
    "recipes",
    "render",
    "rows",
    "scaled",
    "shown",
    "to_json",
    "to_toml",
]
