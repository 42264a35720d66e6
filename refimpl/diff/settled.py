"""Which tokens' experts no admissible rounding can change.

Where the experts were not recorded they are chosen again from replayed scores. A choice that is won by less than roundings move
the scores may fall either way in a correct candidate; everything computed from such a token afterwards says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .program import names

SLACK = 4.0
"""A choice counts as won if its margin is more than this many times what the twins move the scores by."""
_CHOICES = ("router.groups", "router.ids")
_MIXING = ("mla.scores", "mla.scores_absorbed", "mla.ctx", "mla.ctx_latent")
"""Stages in which a token reads those before it."""
Values = Mapping[str, Array]


class Unsettled:
    """Follows the doubtful tokens (B, S) through a program: from a close choice to everything that is computed from it."""

    def __init__(self) -> None:
        self.marks: dict[str, Array] = {}

    def see(self, call: Call, exact: Values, twins: Sequence[Values], recorded: Values) -> None:
        """Note which tokens of this call's output are in doubt. `exact` and `twins` hold computed values by tap."""
        found = [self.marks[n] for n in names(call.args) if n in self.marks and n not in recorded]
        if call.stage in _CHOICES:
            found.append(_close(call, exact, twins, recorded))
        length = min((m.shape[1] for m in found), default=0)
        mark = np.logical_or.reduce([m[:, :length] for m in found]) if found else None
        if mark is None or not mark.any():
            return
        mixing = call.stage in _MIXING
        self.marks[call.tap] = np.logical_or.accumulate(mark, axis=1) if mixing else mark

    def of(self, call: Call) -> Array | None:
        """The doubtful tokens of a call's output, None if there are none."""
        return self.marks.get(call.tap)


def _close(call: Call, exact: Values, twins: Sequence[Values], recorded: Values) -> Array:
    """Tokens whose choice is won by no more than SLACK times what roundings move its scores by."""
    scores, kept = call.args[0], call.args[1] if call.stage == "router.ids" else None
    e = recorded.get(scores, exact.get(scores))
    assert e is not None
    moved = [np.abs(t[scores] - e).max(axis=-1) for t in twins if scores not in recorded and scores in t]
    e = np.asarray(e, np.float64)
    if isinstance(kept, str):
        groups = recorded.get(kept, exact.get(kept))
        assert groups is not None
        inside = (np.arange(call.static["n_group"]) == groups[..., None]).any(axis=-2)
        e = np.where(np.repeat(inside, e.shape[-1] // inside.shape[-1], axis=-1), e, -np.inf)
    k = call.static["topk_group" if call.stage == "router.groups" else "k"]
    if k >= e.shape[-1]:
        return np.zeros(e.shape[:-1], bool)
    falling = -np.sort(-e, axis=-1)
    with np.errstate(invalid="ignore"):
        gap = falling[..., k - 1] - falling[..., k]
    return ~(gap > SLACK * np.max(moved, axis=0, initial=0))
