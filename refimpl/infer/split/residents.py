"""Dynamic redundancy: each rank holds more experts than it runs, and which it runs is chosen per step and layer (R 3.4.1).

"We are exploring": each GPU hosts 16 experts, 9 are active, and "before the all-to-all operation at each layer begins, we compute
the globally optimal routing scheme on the fly". How is not published. Choosing the best residents is a scheduling problem
without a fast exact answer; this is a greedy one, the same on every rank, compared with enumeration in its test.
"""

from __future__ import annotations

import numpy as np

from refimpl.autograd import Array, SpecError
from refimpl.autograd.errors import require
from refimpl.parallel_emulation.eplb import Placement


def choose_residents(load: Array, phy2log: Array, ranks: int, active: int) -> Array:
    """Which slots run.  load (E,) tokens of each expert in this step, phy2log (R,) -> (R,) bool, at most `active` a rank.

    Heaviest expert first into the least loaded rank that holds it and has room, others making room where they can; then
    replicas of the busiest rank's experts elsewhere, as long as the busiest gets less. Experts without tokens do not run.
    SpecError where the experts that are needed do not fit.
    """
    slots = len(phy2log)
    require(ranks >= 1 and slots % ranks == 0, f"{ranks} ranks do not divide {slots} slots")
    require(active >= 1, f"{active} active experts a rank")
    chosen = _Chosen(load.astype(np.float64), phy2log, np.arange(slots) // (slots // ranks), active)
    for e in np.argsort(-load, kind="stable"):
        if load[e] and not chosen.place(int(e), set()):
            raise SpecError(
                f"{int((load > 0).sum())} experts are needed; they do not fit {active} a rank where they are held"
            )
    while chosen.spread():
        pass
    return chosen.on


class _Chosen:
    def __init__(self, load: Array, phy2log: Array, rank: Array, active: int) -> None:
        self.load, self.phy2log, self.rank, self.active = load, phy2log, rank, active
        self.on = np.zeros(len(phy2log), bool)

    def loads(self) -> Array:
        """(ranks,) when an expert's running replicas share its tokens equally."""
        count = np.bincount(self.phy2log[self.on], minlength=len(self.load))
        share = self.load / np.maximum(count, 1)
        return np.bincount(self.rank, np.where(self.on, share[self.phy2log], 0.0))

    def place(self, e: int, tried: set[int]) -> bool:
        """Run expert e somewhere, moving others on if need be (an augmenting path over ranks)."""
        loads, running = self.loads(), np.bincount(self.rank, self.on)
        slots = [int(s) for s in np.flatnonzero(self.phy2log == e) if not self.on[s] and self.rank[s] not in tried]
        slots.sort(key=lambda s: (running[self.rank[s]] >= self.active, loads[self.rank[s]], s))
        for s in slots:
            r = int(self.rank[s])
            if running[r] < self.active or self._make_room(r, tried | {r}):
                self.on[s] = True
                return True
        return False

    def _make_room(self, r: int, tried: set[int]) -> bool:
        for s in np.flatnonzero(self.on & (self.rank == r)):
            self.on[s] = False
            if self.place(int(self.phy2log[s]), tried):
                return True
            self.on[s] = True
        return False

    def spread(self) -> bool:
        """One more replica, or one elsewhere, that makes the busiest rank less busy; False if there is none."""
        loads = self.loads()
        busiest = int(loads.argmax())
        best, found = _heaviest(loads), None
        for here in np.flatnonzero(self.on & (self.rank == busiest)):
            for s in np.flatnonzero(~self.on & (self.phy2log == self.phy2log[here]) & (self.rank != busiest)):
                for stays in (True, False):
                    after = self._with(int(s), int(here), stays)
                    if after is not None and _heaviest(after.loads()) < best:
                        best, found = _heaviest(after.loads()), after.on
        if found is not None:
            self.on = found
        return found is not None

    def _with(self, s: int, here: int, stays: bool) -> _Chosen | None:
        """What would be if slot s ran as well as slot `here`, or in its place, others making room; None if they cannot."""
        other = _Chosen(self.load, self.phy2log, self.rank, self.active)
        other.on = self.on.copy()
        other.on[here] = stays
        r = int(self.rank[s])
        if (other.on & (self.rank == r)).sum() >= self.active and not other._make_room(r, {r}):
            return None
        other.on[s] = True
        return other


def _heaviest(loads: Array) -> tuple[float, int]:
    """The largest load, and how many ranks have it: less is better. Rounded, since equal sums may differ in their last bit."""
    most = round(float(loads.max()), 9)
    return most, int((loads > most - 1e-6).sum())


def only(p: Placement, layer: int, on: Array) -> Placement:
    """The placement of one layer with the slots that run, for `choose_replicas`.  on (R,) bool.  An expert that does not run keeps
    count 1 and slot -1.
    """
    experts = p.logcnt.shape[1]
    rows = [np.flatnonzero(on & (p.phy2log[layer] == e)) for e in range(experts)]
    logcnt = np.array([[max(len(r), 1) for r in rows]])
    log2phy = np.full((1, experts, int(logcnt.max())), -1, np.int64)
    for e, r in enumerate(rows):
        log2phy[0, e, : len(r)] = r
    return Placement(p.phy2log[layer : layer + 1], log2phy, logcnt)
