"""Known bugs of ports, each a changed stage, with where they happened and what makes them show."""

from . import attention, feedforward, norms, rope, routing
from .elsewhere import NOT_STAGES
from .mutant import Mutant

MUTANTS: dict[str, Mutant] = {
    m.id: m for m in (*routing.MUTANTS, *rope.MUTANTS, *attention.MUTANTS, *norms.MUTANTS, *feedforward.MUTANTS)
}
"""id -> mutant."""

__all__ = ["MUTANTS", "NOT_STAGES", "Mutant"]
