"""Which tokens' experts no admissible rounding can change.

Where the experts were not recorded they are chosen again from replayed scores. A choice that is won by less than roundings move
the scores may fall either way in a correct candidate; everything computed from such a token afterwards says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call

from .lse import LSE
from .padding import Padding, rows_at, rows_of
from .program import names

SLACK = 4.0
"""A choice counts as won if its margin is more than this many times what the twins move the scores by."""
_CHOICES = ("router.groups", "router.ids")
_MIXING = ("mla.scores", "mla.scores_absorbed", "mla.ctx", "mla.ctx_latent")
"""Stages in which a token reads those before it."""
Values = Mapping[str, Array]


class Unsettled:
    """Follows the doubtful tokens (B, S) through a program: from a close choice to everything that is computed from it."""

    def __init__(self, padding: Padding | None = None) -> None:
        self.marks, self.padding = dict[str, Array](), padding

    def see(self, call: Call, exact: Values, twins: Sequence[Values], recorded: Values) -> None:
        """Note which tokens of this call's output are in doubt. `exact` and `twins` hold computed values by tap."""
        found = [self.marks[n] for n in names(call.args) if n in self.marks and n not in recorded]
        if call.stage in _CHOICES:
            found.append(_close(call, exact, twins, recorded))
        size = exact[call.tap].shape
        if call.own is not None and call.stage != LSE and found:  # a gradient comes from every token behind
            self._set(call, np.ones_like(found[0]))
        elif call.stage.startswith("cache."):
            self._cached(call, size[1], recorded)
        elif found and call.stage in _MIXING:
            mark = _spread(found, keys=max(m.shape[1] for m in found))
            length = size[1 if call.stage.startswith("mla.ctx") else 2]
            self._set(call, np.logical_or.accumulate(mark, axis=1)[:, -length:])
        elif found:
            place = rows_at(call.of.shape.split())
            length = min([m.shape[1] for m in found] + ([size[place[1]]] if place else []))
            self._set(call, np.logical_or.reduce([m[:, :length] for m in found]))

    def _cached(self, call: Call, length: int, recorded: Values) -> None:
        """Tokens of the cache, then the new ones."""
        marks = [self.marks.get(n) if n not in recorded else None for n in names(call.args)]
        known = next((m for m in marks if m is not None), None)
        if known is not None:
            new = marks[1].shape[1] if marks[1] is not None else length - known.shape[1]
            sizes = (length - new, new)
            whole = [np.zeros((len(known), n), bool) if m is None else m for m, n in zip(marks, sizes, strict=True)]
            self._set(call, np.concatenate(whole, axis=1))

    def _set(self, call: Call, mark: Array) -> None:
        if mark.any():
            self.marks[call.tap] = mark

    def of(self, call: Call, shape: Sequence[int]) -> Array | None:
        """The tokens of a call's output that say nothing, doubtful ones and padding, None if there are none."""
        found, padding = self.marks.get(call.tap), rows_of(call, shape, self.padding)
        return (
            found if padding is None else padding if found is None or found.shape != padding.shape else found | padding
        )


def _spread(marks: Sequence[Array], keys: int) -> Array:
    """Which keys (B, T) are in doubt, a query being its own key: the last ones are the queries."""
    mark = np.zeros((len(marks[0]), keys), bool)
    for m in marks:
        mark[:, keys - m.shape[1] :] |= m
    return mark


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
    return ~(gap > SLACK * np.max(moved, axis=0, initial=0)) | np.isnan(e).any(axis=-1)
