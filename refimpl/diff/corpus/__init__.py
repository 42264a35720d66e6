"""Known bugs of ports, each a changed stage, with where they happened and what makes them show."""

from . import (
    attention,
    cached,
    feedforward,
    fp8,
    groups,
    norms,
    optimiser,
    products,
    rope,
    routing,
    scores,
    tables,
    training,
)
from .elsewhere import NOT_STAGES
from .mutant import Best, Mutant

_FILES = (
    routing,
    groups,
    rope,
    tables,
    scores,
    attention,
    cached,
    norms,
    feedforward,
    fp8,
    products,
    training,
    optimiser,
)
MUTANTS: dict[str, Mutant] = {m.id: m for file in _FILES for m in file.MUTANTS}
"""id -> mutant."""

__all__ = ["MUTANTS", "NOT_STAGES", "Best", "Mutant"]
