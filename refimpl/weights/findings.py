"""What is said of one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# fmt: off
Status = Literal[
    "equal", "rounded", "left out", "permuted", "scaled", "offset", "copy", "zero",
    "not finite", "misshapen", "differs", "no scale", "missing", "extra",
]
# fmt: on
FINE = ("equal", "rounded", "left out")
"""What a sound conversion may do: round, and leave MTP modules out."""


@dataclass(frozen=True)
class Finding:
    """A tensor under its checkpoint name: how it relates to the case's, in which format it is stored, relative l2 error; `source`:
    the case's tensor that is there instead.
    """

    name: str
    status: Status
    how: str = ""
    stored: str = ""
    error: float = 0.0
    numbers: int = 0
    source: str = ""

    @property
    def ok(self) -> bool:
        """Nothing that a sound conversion does not do."""
        return self.status in FINE
