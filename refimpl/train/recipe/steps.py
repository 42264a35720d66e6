"""Which step begins at which token, when the batch grows: runs of steps of equal batch, so that a run of 14.8 T tokens is a
short list.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from refimpl.autograd.errors import require

from .schedule import Piece, Schedule

MOST = 10**5
"""Values that a batch takes in a phase."""


@dataclass(frozen=True)
class Equal:
    """Steps `step`, `step` + 1, ... of the same batch, the first of which begins at `token`."""

    step: int
    token: int
    batch: int


@dataclass(frozen=True)
class Steps:
    """The steps of a phase: step k begins at token(k) and takes batch(k) sequences. The last one is the first that reaches
    `tokens`, so a phase goes over by less than one batch.
    """

    runs: tuple[Equal, ...]
    sequence: int
    tokens: int

    def __len__(self) -> int:
        last = self.runs[-1]
        return last.step + -(-(self.tokens - last.token) // (last.batch * self.sequence))

    def _run(self, step: float) -> Equal:
        return self.runs[max(bisect_right([r.step for r in self.runs], step) - 1, 0)]

    def batch(self, step: float) -> int:
        """Sequences of a step."""
        return self._run(step).batch

    def token(self, step: float) -> int:
        """Tokens done before a step; part of a step counts as that part of its tokens."""
        run = self._run(step)
        return run.token + round((Fraction(step) - run.step) * run.batch * self.sequence)

    def step(self, token: int) -> int:
        """The first step that begins at or after a token."""
        run = self.runs[max(bisect_right([r.token for r in self.runs], token) - 1, 0)]
        return run.step + -(-(token - run.token) // (run.batch * self.sequence))


def steps_of(batch: Schedule, sequence: int, multiple: int) -> Steps:
    """The steps that a batch schedule makes: the schedule's value at a step's first token, rounded to a multiple (half up, at
    least one multiple).
    """
    values = sum(min(abs(p.end - p.start) / multiple, p.tokens / sequence) for p in batch.pieces)
    require(
        values <= MOST, f"a batch that takes {values:.0f} values; at most {MOST:,}, a larger batch_multiple makes fewer"
    )
    return Steps(tuple(_runs(batch, sequence, multiple)), sequence, batch.tokens)


def _runs(batch: Schedule, sequence: int, multiple: int) -> Iterator[Equal]:
    step, token, previous = 0, 0, 0
    while token < batch.tokens:
        piece = batch.piece(token)
        size = _size(piece, token, multiple)
        if size != previous:
            yield Equal(step, token, size)
        same = _same(piece, token, size, sequence, multiple)
        step, token, previous = step + same, token + same * size * sequence, size


def _size(piece: Piece, token: int, multiple: int) -> int:
    return max(multiple, int(piece.value(token, 0) / multiple + 0.5) * multiple)


def _same(piece: Piece, token: int, size: int, sequence: int, multiple: int) -> int:
    """How many steps from the one at `token` on begin in the piece and have this size: its values only rise or only fall, so the
    first other one is found by bisection.
    """
    last = -(-(piece.last - token) // (size * sequence))  # at least 1
    if piece.start == piece.end:
        return last
    return bisect_left(
        range(last), True, lo=1, key=lambda k: _size(piece, token + k * size * sequence, multiple) != size
    )
