"""Which tokens' experts no admissible rounding can change.

Where the experts were not recorded they are chosen again from replayed scores. A choice that is won by less than roundings move
the scores may fall either way in a correct candidate; everything computed from such a token afterwards says nothing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Call
from refimpl.model.phases import in_part

from .padding import Padding, rows_at, rows_of
from .program import names, owner

SLACK = 4.0
"""A choice counts as won if its margin is more than this many times what the twins move the scores by."""
_CHOICES = ("router.groups", "router.ids")
_MIXING = ("mla.scores", "mla.scores_absorbed", "mla.ctx", "mla.ctx_latent")
"""Stages in which a token reads those before it."""
_ANYTHING = ("embed", "mtp.emb", *_MIXING)
"""Stages that may give anything in padding: there is no token, and a query of padding may have no keys."""
Values = Mapping[str, Array]


class Unsettled:
    """Follows the doubtful tokens (B, S) through a program: from a close choice to everything that is computed from it.

    Dispatched rows lie by expert, then by token. Where a layer's ids are computed and one token's choice is in doubt, recorded rows
    may be any token's: then what is made of them says nothing.
    """

    def __init__(self, program: Iterable[Call], recorded: Container[str], padding: Padding | None = None) -> None:
        self.marks, self.padding = dict[str, Array](), padding
        self.rows = {c.tap for c in program if c.of.shape.startswith("M ")}
        self.sent = {
            owner(tap) for tap in self.rows if tap in recorded
        }  # units whose rows lie as the candidate's ids say
        self.loose = set[str]()  # computed taps in which padding may hold anything
        self.tokens = dict[str, Array]()  # unit -> the token of every dispatched row, where that is known
        self.empty = dict[str, Array]()  # unit -> its padding (B, S)

    def see(self, call: Call, exact: Values, twins: Sequence[Values], recorded: Values) -> None:
        """Note which tokens of this call's output are in doubt. `exact` and `twins` hold computed values by tap."""
        args = set(names(call.args))
        found = [self.marks[n] for n in args if n in self.marks and n not in recorded]
        if call.stage in _CHOICES:
            found.append(_close(call, exact, twins, recorded))
        if call.tap not in recorded and (call.stage in _ANYTHING or args & self.loose):
            self.loose.add(call.tap)
        if call.stage == "router.ids":
            self._sent(call, found, recorded.get(call.tap, exact.get(call.tap)), known=call.tap in recorded)
        if found and args & self.rows and owner(call.tap) in self.sent:
            found.append(np.ones_like(found[0]))
        self._follow(call, found, exact[call.tap].shape, recorded)

    def _sent(self, call: Call, found: list[Array], ids: Array | None, *, known: bool) -> None:
        """Note which token every dispatched row belongs to; those of padding are in doubt if their ids may be any."""
        unit, padding = owner(call.tap), self.padding.at(call) if self.padding else None
        if padding is not None:
            self.empty[unit] = padding
            if call.tap in self.loose and unit in self.sent:
                found.append(padding)
        assert ids is not None
        if known or not any(m.any() for m in found):
            self.tokens[unit] = np.argsort(ids, axis=None, kind="stable") // ids.shape[-1]

    def _follow(self, call: Call, found: list[Array], size: Sequence[int], recorded: Values) -> None:
        """From the marks of what a call reads to its own."""
        if found and call.own is not None and not in_part(call.tap):  # a gradient comes from every token behind
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
        """Note a mark. Padding is not looked at, nor seen by any token; only where its rows are sent counts."""
        padding = self.padding.at(call) if self.padding and call.stage != "router.ids" else None
        if padding is not None and padding.shape == mark.shape:
            mark = mark & ~padding
        if mark.any():
            self.marks[call.tap] = mark

    def of(self, call: Call, shape: Sequence[int]) -> Array | None:
        """What of a call's output says nothing, doubtful tokens (B, S) or rows (M,), and padding; None if all says something."""
        unit, mark = owner(call.tap), self.marks.get(call.tap)
        tokens = self.tokens.get(unit) if call.tap in self.rows else None
        padding = rows_of(call, shape, self.padding) if tokens is None else self.empty.get(unit)
        found = mark if padding is None else padding if mark is None or mark.shape != padding.shape else mark | padding
        return found if found is None or tokens is None else found.ravel()[tokens]


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
