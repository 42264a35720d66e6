"""Speculative sampling (Leviathan et al. 2023, algorithm 1): drafts from q stand or fall so that what comes is drawn from p."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from refimpl.autograd.tensor import Array

from .distribution import acceptance, residual
from .draws import Draw, chance


class Draft(NamedTuple):
    """A proposed token and the distribution q (V,) that it was drawn from."""

    token: int
    q: Array


def verify(target: Callable[[int], Array], drafts: Sequence[Draft], draw: Draw) -> tuple[int, int]:
    """(how many drafts stand, the token that follows them).  target(j) (V,): the model's p after the first j drafts.

    Draft x stands with chance min(1, p(x)/q(x)); the first that falls is replaced by one from norm(max(0, p - q)); if all
    stand, one more comes from p. P(x) = q(x) min(1, p(x)/q(x)) + (1 - sum_y min(p(y), q(y))) norm(max(0, p - q))(x) = p(x). No
    drafts: x from p.
    """
    for j, (token, q) in enumerate(drafts):
        p = target(j)
        if not chance(draw, acceptance(p, q, token)):
            return j, draw(residual(p, q))
    return len(drafts), draw(target(len(drafts)))


@dataclass
class Tally:
    """What speculation came to. `tried[d]` counts verifications of the draft at depth d + 1, `stood[d]` those that stood; rows
    count each for themselves.
    """

    steps: int = 0
    tokens: int = 0
    tried: list[int] = field(default_factory=list)
    stood: list[int] = field(default_factory=list)

    def add(self, drafts: int, stood: int, tokens: int) -> None:
        """One verification of a row: so many drafts, of which so many stood, and the tokens that came of it."""
        self.steps += 1
        self.tokens += tokens
        missing = max(0, drafts - len(self.tried))
        self.tried += [0] * missing
        self.stood += [0] * missing
        for d in range(min(drafts, stood + 1)):  # behind the first that fell none was looked at
            self.tried[d] += 1
            self.stood[d] += d < stood

    @property
    def acceptance(self) -> list[float]:
        """By depth, the part of the drafts looked at that stood (R 5.4.3: 85-90 % for the second token)."""
        return [s / t if t else 0.0 for s, t in zip(self.stood, self.tried, strict=True)]

    @property
    def tokens_per_step(self) -> float:
        """Tokens a row got from one run of the model, its prompt's aside."""
        return self.tokens / self.steps if self.steps else 0.0


def expected_tokens(alpha: float, depth: int) -> float:
    """(1 - a^(D+1)) / (1 - a): tokens a step if each of D drafts stands with chance a (Leviathan et al. 2023, eq 1)."""
    return float(sum(alpha**j for j in range(depth + 1)))
