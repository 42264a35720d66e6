"""Known bugs of ports, each a changed stage, with where they happened and what makes them show."""

from . import attention, feedforward, norms, products, rope, routing
from .elsewhere import NOT_STAGES
from .mutant import Mutant

MUTANTS: dict[str, Mutant] = {
    m.id: m for room in (routing, rope, attention, norms, feedforward, products) for m in room.MUTANTS
}
"""id -> mutant."""

__all__ = ["MUTANTS", "NOT_STAGES", "Mutant"]
