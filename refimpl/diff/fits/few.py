"""A trace's first tokens: what does not reproduce these reproduces nothing, and is soon tried, in little memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from ..compare import Finding
from ..corpus import Mutant
from ..dims import TOKEN_AXES
from ..hypothesis import reproduces, theirs
from ..lanes import Recorded
from ..program import names

TOKENS = 64
"""Of the first sequence; a stage knows nothing of tokens behind."""


@dataclass(frozen=True)
class Trials:
    """Mistakes on trial: calls by tap, and what was recorded; of a long trace the first tokens are tried first."""

    calls: Mapping[str, Call]
    recorded: Recorded
    few: dict[str, Recorded | None] = field(default_factory=dict)

    def reproduces(self, m: Mutant, f: Finding) -> bool | None:
        """Whether a mistake gives what the candidate has (`hypothesis.reproduces`)."""
        if f.tap not in self.few:
            self.few[f.tap] = first_tokens(f, self.calls, self.recorded)
        some = self.few[f.tap]
        if some and not m.ahead and reproduces(m, f, self.calls, some) is False:
            return False
        return reproduces(m, f, self.calls, self.recorded)


def first_tokens(f: Finding, calls: Mapping[str, Call], r: Recorded) -> Recorded | None:
    """What a region reads, and its tap, of the first tokens; None where they are few anyhow, or do not stand by themselves:
    dispatched rows, caches, modules that look ahead.
    """
    region = [calls[t] for t in f.region]
    read = {n for c in region for n in names(c.args) if n not in f.region and not n.startswith("w/")}
    if f.tap not in r.taps or "/mtp" in f.tap or any(n not in r.taps and n not in r.inputs for n in read):
        return None
    taps, inputs = dict[str, Array](), dict[str, Any]()
    for n in {*read, f.tap}:
        given = n in r.inputs
        x = np.asarray(r.inputs[n]) if given else theirs(n, r)
        axes = calls[n].of.shape.split() if n in calls else ["B", "S"][: x.ndim]
        if "B" not in axes or x.ndim != len(axes) or x.size <= 2 * TOKENS or _before(x, axes):
            return None
        (inputs if given else taps)[n] = _cut(x, axes)
    for n in [n for n in r.taps if n not in taps and n in calls]:  # what a fit may try in the place of what is read
        x, axes = np.asarray(r.taps[n]), calls[n].of.shape.split()
        if "B" in axes and x.ndim == len(axes) and not _before(x, axes):
            taps[n] = _cut(x, axes)
    return replace(r, taps=taps, inputs=inputs, withdrawn={}, padding=None)


def _before(x: Array, axes: Sequence[str]) -> bool:
    """Whether there are more keys than queries, or few tokens."""
    sizes = [x.shape[i] for i, letter in enumerate(axes) if letter in TOKEN_AXES]
    return len(set(sizes)) != 1 or sizes[0] <= TOKENS


def _cut(x: Array, axes: Sequence[str]) -> Array:
    return x[tuple([slice(1) if a == "B" else slice(TOKENS) if a in TOKEN_AXES else slice(None) for a in axes])]
