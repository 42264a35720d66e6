"""What a fit looks at: one blamed tap, what its stage gives on the candidate's own inputs, and what the candidate has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from ..compare import Finding
from ..corpus import Mutant
from ..hypothesis import given, theirs
from ..lanes import Recorded
from ..padding import filled
from ..program import names
from ..supposed import as_ours
from ..tolerance import row_errors
from ..wide import is_large
from .few import first_tokens

SLACK = 4.0
"""A guess from a tap is followed up if it is this near, in what the tap is allowed; whether it is near enough the replay says."""

LEFT = 0.5
"""Of what is off no more than this may be left by numbers that were fitted to it."""


@dataclass(frozen=True)
class Evidence:
    """The finding, all calls by tap, what was recorded, the config, all taps that are blamed."""

    finding: Finding
    calls: Mapping[str, Call]
    recorded: Recorded
    config: Config
    blamed: frozenset[str] = frozenset()

    @property
    def call(self) -> Call:
        """The call that gives the tap."""
        return self.calls[self.finding.tap]

    @property
    def region(self) -> list[Call]:
        """The calls that were computed for it, itself last."""
        return [self.calls[t] for t in self.finding.region]

    @property
    def letters(self) -> list[str]:
        """The tap's axes."""
        return self.call.of.shape.split()

    @property
    def limit(self) -> float:
        """How near a guess must be."""
        return SLACK * self.finding.allowed

    @cached_property
    def _given(self) -> tuple[list[Any], Array]:
        return given(self.region, self.recorded)

    @property
    def args(self) -> list[Any]:
        """The call's arguments in float64."""
        return self._given[0]

    @property
    def e(self) -> Array:
        """What the stage gives."""
        return self._given[1]

    @cached_property
    def x(self) -> Array:
        """What the candidate has, in float64."""
        f, r = self.finding, self.recorded
        x = as_ours(f.tap, theirs(f.tap, r), self.e, r)
        return np.asarray(filled(self.call, x, self.e, r.padding), np.float64)

    @cached_property
    def few(self) -> Recorded:
        """What was recorded of the first tokens, where that is less, and enough to go by."""
        return first_tokens(self.finding, self.calls, self.recorded) or self.recorded

    @property
    def whole(self) -> bool:
        """Whether the candidate has numbers of the shape that the stage gives."""
        tap, r = self.finding.tap, self.recorded
        return tap not in r.partial and tap not in r.odd and self.x.shape == self.e.shape and self.e.dtype.kind == "f"

    @cached_property
    def everywhere(self) -> bool:
        """Whether half of the rows are off, or of the tokens that choose: what moves all of them does no less."""
        if not self.whole:
            return self.finding.error >= 0.5
        return bool((row_errors(self.call.stage, self.x, self.e) > self.finding.allowed).mean() >= 0.5)

    def explained(self, y: Array) -> bool:
        """Whether y is no further from the candidate's numbers than half of what these are off by: that what was fitted to them is
        near says little where much is allowed.
        """
        off, left = (np.linalg.norm(finite(self.x - a)) for a in (self.e, y))
        return bool(left <= LEFT * off)

    def axes_of(self, name: Any) -> list[str]:
        """The axes of an argument: a tap's, or of what is handed in for every token; none of a weight."""
        if name in self.calls:
            return self.calls[name].of.shape.split()
        return ["B", "S"] if name in ("tokens", "positions") else []

    def held(self, tap: str) -> Array | None:
        """A tap that was recorded, or that follows from what was handed in; None for others."""
        x = self.recorded.taps.get(tap)
        if (
            x is None
            and tap in self.calls
            and all(n in self.recorded.inputs or n[:2] == "w/" for n in names(self.calls[tap].args))
        ):
            x = given([self.calls[tap]], self.recorded)[1]
        return None if x is None or x.dtype.kind in "iub" else np.asarray(x, np.float64)


def evidence(
    f: Finding, calls: Mapping[str, Call], r: Recorded, c: Config, blamed: frozenset[str] = frozenset()
) -> Evidence:
    """All of a tap; of attention's squares, if they are large, and can stand alone, the first tokens."""
    some = first_tokens(f, calls, r) if is_large(theirs(f.tap, r).shape) else None
    return Evidence(f, calls, some or r, c, blamed)


Fit = Callable[[Evidence], Iterator[Mutant]]
"""Guesses at what is wrong, the likelier first."""


def guess(
    title: str, stage: str, fn: Callable[..., Any], also: Mapping[str, Callable[..., Any]] | None = None
) -> Mutant:
    """A mistake that is in no catalogue."""
    return Mutant("", title, stage, fn, also=also or {})


def near(x: Array, y: Array, limit: float) -> bool:
    """Whether x is y, as a whole, but for a share of it that is within the limit; where both are numbers."""
    both = np.isfinite(x) & np.isfinite(y)
    a, b = x[both], y[both]
    return bool(len(a)) and float(np.linalg.norm(a - b)) <= limit * float(np.linalg.norm(b))


def finite(x: Array) -> Array:
    """x, with 0 where it is no number."""
    return np.where(np.isfinite(x), x, 0)


def short(name: Any) -> str:
    """A tap without its phase and layer; what a layer reads is the stream, whichever tap it comes from."""
    last = str(name).rpartition("/")[2]
    return "the stream" if last in ("embed", "resid") else last


def weights_of(call: Call) -> list[str]:
    """The names of a call's weights."""
    return [n for n in names(call.args) if n.startswith("w/")]
