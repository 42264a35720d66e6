"""What an engine showed of a case: after which token, the log-probabilities of which ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refimpl.autograd.errors import SpecError, require

Place = tuple[int, int]
"""Row and position: what is shown there is of the token that follows it."""
Entry = Mapping[int, float]
"""Token id -> log-probability."""


@dataclass(frozen=True)
class Again:
    """The same places shown once more: under which circumstance, what, and which tokens were generated."""

    how: str
    places: Mapping[Place, Entry]
    chosen: Mapping[Place, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """`places`, what was shown; `chosen`, the token that was generated there greedily; `again`, the same in other company;
    `unnamed`, ids that the replies could not name and are in no list; `source`, where from, in words.
    """

    tokens: list[list[int]]
    places: Mapping[Place, Entry] = field(default_factory=dict)
    chosen: Mapping[Place, int] = field(default_factory=dict)
    again: tuple[Again, ...] = ()
    source: str = ""
    unnamed: frozenset[int] = frozenset()


def number(text: Any, what: str) -> int:
    """A natural number, as JSON's keys have it. SpecError for anything else."""
    known = isinstance(text, int) and not isinstance(text, bool) and text >= 0
    ok = known or (isinstance(text, str) and text.isdecimal() and len(text) < 12)
    require(ok, f"{what} {text!r}; expected a natural number")
    return int(text)


class Impossible(SpecError):
    """A number that is no log-probability of anything: NaN, or of more than certainty. Another way to ask would hide it."""


def logprob(x: Any) -> float:
    """A log-probability; SpecError for what is no number, Impossible for NaN and what is positive."""
    require(isinstance(x, int | float) and not isinstance(x, bool), f"log-probability {x!r}; expected a number")
    if not x < 1e-3:
        raise Impossible(f"log-probability {x!r}; expected a number that is not positive")
    return float(x)
