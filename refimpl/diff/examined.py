"""One tap of a judged trace, looked at closely: what the candidate holds, what float64 gives, which number is worst."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Stage

from .case import Case
from .compare import Finding, settled_rows
from .grounds import Grounds
from .judge import Judgement, judge
from .part import Index, Part, part_of
from .reading import Pick, entries
from .replay import Step, replay
from .tolerance import floor_of, row_errors
from .trace import Trace


@dataclass(frozen=True)
class Examined:
    """A tap's finding, its replay, and the candidate's array x (in our arrangement; of a tap of which a part was recorded, the
    part that `pick` says).
    """

    grounds: Grounds
    finding: Finding
    step: Step
    x: Array
    pick: Pick

    @property
    def stage(self) -> Stage:
        """The stage that gives the tap."""
        return self.step.call.of

    def entries(self) -> list[Array]:
        """For every axis, which entries of the tap were recorded."""
        return entries(self.step.exact.shape, self.pick)

    def candidate(self) -> Array:
        """The candidate's array in the tap's full shape; float64's numbers where nothing was recorded."""
        whole = np.array(self.step.exact, self.x.dtype)
        whole[np.ix_(*self.entries())] = self.x
        return whole

    def _sound(self) -> Array:
        """Rows (all axes but the last) that were recorded and that no rounding could have sent to other experts."""
        lead = self.step.exact.shape[:-1]
        sound = np.zeros(lead, bool)
        sure = settled_rows(self.step, self.pick)
        sound[np.ix_(*self.entries()[:-1])] = True if sure is None else sure
        return sound

    def errors(self) -> Array:
        """Every row's error as the diff counts it: |x - e| / |e|, or 1 for a row that differs at all; 0 where none is counted."""
        x, e = self.candidate(), self.step.exact
        if self.stage.compare == "exact" and e.ndim == 0:
            return np.array(float(x != e))
        if self.stage.compare == "set":
            errors = (np.sort(x, axis=-1) != np.sort(e, axis=-1)).any(axis=-1).astype(np.float64)
        elif self.stage.compare == "exact":
            errors = (x != e).any(axis=-1).astype(np.float64)
        else:
            errors = row_errors(self.stage.name, x, e).reshape(e.shape[:-1])
        return np.where(self._sound(), errors, 0.0)

    def size(self, row: Index) -> float:
        """What a row's difference is divided by."""
        e = np.where(np.isfinite(self.step.exact), self.step.exact, 0).astype(np.float64)
        sizes = np.linalg.norm(np.atleast_1d(e), axis=-1)
        floor, _ = floor_of(self.stage.name)
        return max(float(sizes[row]) if row or sizes.ndim == 0 else float(sizes), floor * float(sizes.max()), 1e-300)

    def worst_row(self) -> Index:
        """The row that is furthest off."""
        errors = self.errors()
        return tuple([int(i) for i in np.unravel_index(int(np.argmax(errors)), errors.shape)])

    def worst_in(self, row: Index) -> Index:
        """The number of a row that is furthest off."""
        x, e = (np.asarray(a[row], np.float64) for a in (self.candidate(), self.step.exact))
        if e.ndim == 0:
            return row
        with np.errstate(invalid="ignore"):
            away = np.where(x == e, 0.0, np.abs(x - e))
        return (*row, int(np.argmax(np.where(np.isnan(away), np.inf, away))))

    def part(self, at: Index) -> Part:
        """The region as it leads to these numbers, nothing cut."""
        return part_of(self.grounds, self.finding.region, at, self.step.exact.shape)


def examine(case: Case, trace: Trace, tap: str) -> Examined:
    """Judge a trace and look at one of its taps. SpecError for a tap that was not compared, and says why."""
    return examined(judge(case, trace), tap)


def examined(judgement: Judgement, tap: str) -> Examined:
    """One tap of a judgement."""
    g = judgement.grounds
    assert g is not None
    call = g.call(tap)
    finding = next(f for f in judgement.findings if f.tap == call.tap)
    with np.errstate(all="ignore"):
        whole = replace(g.recorded, partial={})  # as `part_of` has it: what was recorded in part is computed
        step = next(s for s in replay(g.program, whole) if s.call.tap == call.tap)
    pick = g.admitted.picks.get(call.tap, {})
    x = g.recorded.taps.get(call.tap, g.admitted.taps[call.tap])
    return Examined(g, finding, step, x, pick)


def index_of(text: str | None, shape: Iterable[int]) -> Index | None:
    """`1,12,3` as an index into that shape, None for None. SpecError for what is none."""
    shape = tuple(shape)
    if text is None:
        return None
    parts = text.strip("[]()").replace(" ", ",").split(",")
    found = [p for p in parts if p]
    whole = all(p.lstrip("-").isdigit() for p in found) and len(found) == len(shape)
    require(whole, f"index {text!r}; expected {len(shape)} whole numbers with commas between, for shape {shape}")
    index = tuple([int(p) for p in found])
    inside = all(0 <= i < n for i, n in zip(index, shape, strict=True))
    require(inside, f"index {list(index)} lies outside shape {list(shape)}")
    return index
