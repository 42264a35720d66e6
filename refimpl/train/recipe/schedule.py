"""A schedule: a value that changes with the tokens consumed, as a list of pieces that follow one another without gaps."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SHAPES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,
}
"""Shape -> how much of the way from start to end is gone, when the part x in 0..1 of the piece is."""


@dataclass(frozen=True)
class Piece:
    """v = start + (end - start) shape(x): from token `first` on for `tokens` tokens. If `steps` is given, x counts the steps from
    `first_step` on instead ("linearly during the first 2K steps", R 4.2), while the batch may grow.
    """

    shape: str
    start: float
    end: float
    first: int
    tokens: int
    steps: float | None = None
    first_step: float = 0

    @property
    def last(self) -> int:
        """The first token after the piece."""
        return self.first + self.tokens

    def value(self, token: float, step: float) -> float:
        """The value for a step that begins when `token` tokens and `step` steps are done."""
        gone = (token - self.first) / self.tokens if self.steps is None else (step - self.first_step) / self.steps
        return self.start + (self.end - self.start) * SHAPES[self.shape](min(max(gone, 0.0), 1.0))


@dataclass(frozen=True)
class Schedule:
    """Pieces in order; they cover 0 to `tokens` of a phase."""

    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        """Where the last piece ends."""
        return self.pieces[-1].last

    def piece(self, token: float) -> Piece:
        """The piece that a token lies in; a token on a boundary belongs to the piece that begins there."""
        i = bisect_right([p.first for p in self.pieces], token) - 1
        return self.pieces[max(i, 0)]

    def value(self, token: float, step: float) -> float:
        """The value for a step that begins when `token` tokens and `step` steps of the phase are done."""
        return self.piece(token).value(token, step)
