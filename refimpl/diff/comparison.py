"""One pass of a trace's taps along their replays: the findings, and what had to be read in another arrangement."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import Call

from . import gauges
from .admission import Admitted
from .compare import Finding, Units, compare, settled_rows
from .dims import Sizes, letters
from .fp8_rules import RULES
from .fused import sine
from .lanes import Recorded
from .names import by_value
from .pages import Pages
from .pattern import Scene, pattern
from .picture import picture
from .precision import Precision
from .program import owner, regions
from .reading import Pick, cut, entries
from .replay import Step, replay
from .shares import common
from .supposed import SUPPOSED, by_use, supposed
from .tolerance import Distance, distance

Track = Callable[[list[Call]], Iterable[Call]]
"""Shows progress through the program: returns an iterable of the same calls."""


@dataclass(frozen=True)
class Shown:
    """How one tap's tolerance came about: the finding, the roundoffs, every twin's distance from float64."""

    finding: Finding
    units: Units
    twins: tuple[Distance, ...]


@dataclass
class Comparison:
    """What the candidate gave, and what is found while the replay walks along.

    findings, in model order; `accepted`, tap -> the gauges in which it fits, and `plain`, its finding without; `without`, gauges
    that are not to be tried, and `told`, those in which other taps are known to be; `supposable`, whether a tap that fits in none
    may be in one all the same; `unknown`, arrays under names that are no taps, and `alike`, how near which tap of our own run is;
    `either`, rotated taps that fit in either order; `show`, a tap whose tolerance is to be explained, and `shown`, how it came
    about; `pictures`, whether findings show where a tap is off; `pages`, those of the trace.
    """

    config: Config
    precision: Precision
    admitted: Admitted
    recorded: Recorded
    findings: list[Finding] = field(default_factory=list)
    without: frozenset[str] = frozenset()
    told: frozenset[str] = frozenset()
    supposable: bool = False
    show: str = ""
    shown: Shown | None = None
    pictures: bool = False
    unknown: dict[str, Array] = field(default_factory=dict)
    alike: dict[str, tuple[float, str]] = field(default_factory=dict)
    pages: Pages = field(default_factory=lambda: Pages(None))
    either: set[str] = field(default_factory=set)
    accepted: dict[str, tuple[str, ...]] = field(default_factory=dict)
    plain: dict[str, Finding] = field(default_factory=dict)

    def run(self, program: list[Call], track: Track, start: int = 0, stop: int | None = None) -> None:
        """Compare every tap of the program, or of a span of it, that was admitted; say of the others why they were not."""
        a, walk = self.admitted, replay(program, self.recorded, self._watch if self.unknown else None, start, stop)
        inside, stage_of = self._regions(program), {c.tap: c.stage for c in program}
        for call in track(program[start:stop]):
            if call.tap in a.flawed:
                alone = () if call.tap in a.taps else (call.tap,)  # what others are judged on was computed by no stage
                self.findings.append(
                    Finding(call.tap, call.stage, False, np.inf, note=a.flawed[call.tap], region=alone)
                )
            step = next(walk) if call.tap in a.taps else None
            if step and call.tap not in a.flawed:
                region = inside[call.tap]
                coarsest = max(map(self.precision.unit, region))
                units = Units(self.precision.unit(call.tap), coarsest, tuple([stage_of[t] for t in region]))
                self.findings.append(replace(self._find(step, units, program), region=region))
                self.pages.read(a.taps[call.tap].nbytes)
                if call.tap in self.recorded.withdrawn:  # what follows spans it
                    inside = self._regions(program)
        for _ in walk:  # our own run to its end, for the arrays of unknown names
            raise AssertionError("a step that nobody asked for")

    def finish(self) -> None:
        """Take back what was accepted of a tap and not of its partner, if there was something to compare of that."""
        self.recorded.placed |= {t for t, what in self.accepted.items() if gauges.SLOTS in what}
        fit = [f.tap for f in self.findings if f.ok and not f.open and f.tap not in self.either]
        for tap in gauges.broken(self.accepted, fit):
            self.findings = [replace(self.plain[tap], region=f.region) if f.tap == tap else f for f in self.findings]
            del self.accepted[tap]

    def _regions(self, program: list[Call]) -> dict[str, tuple[str, ...]]:
        return regions(program, self.recorded.taps, self.admitted.picks)

    def _find(self, step: Step, units: Units, program: list[Call]) -> Finding:
        """The finding on a tap as it is, or in the first gauge in which it fits; then that is what later stages are run on."""
        call, tap = step.call, step.call.tap
        x, pick = self.admitted.taps[tap], self.admitted.picks.get(tap, {})
        unordered = call.stage == "router.weights" and call.args[1] not in self.admitted.taps
        if unordered:
            x = gauges.by_rank(x, cut(step.exact, pick))  # without the ids nobody can know the order of the slots
            if not pick:
                self.recorded.taps[tap] = x
            elif tap in self.recorded.partial:
                self.recorded.partial = {**self.recorded.partial, tap: (pick, x)}
        found = self._compare(step, x, units, pick)
        if tap == self.show:
            twins = [distance(call.stage, cut(np.asarray(t), pick), cut(step.exact, pick)) for t in step.twins()]
            self.shown = Shown(found, units, tuple(twins))
        if (
            found.ok
            and step.ends
            and step.naive is None
            and step.unsettled is None
            and x is self.recorded.taps.get(tap)
        ):
            self.recorded.sound[tap] = x  # an error that is finite tells
        if (
            found.ok and len(units.stages) > 1 and tap.endswith(gauges.ROPE_TAPS)
        ):  # of a wide region so much may be allowed
            turned = [gauges.swap_pairs(x, to_interleaved=way) for way in (True, False)]
            self.either |= {tap} if any(self._compare(step, t, units, pick).ok for t in turned) else set()
        if found.ok or call.of.compare in ("exact", "set"):
            return found
        if better := self._in_gauge(step, x, units, program):
            self.plain[tap] = found
        if not (better and better.ok):
            self._as_partner(tap, gauges.beside(tap))
        if better:
            return better
        if unordered and not pick:  # of weights that are not ours the largest need not belong to our first expert
            self.recorded.withdrawn[tap] = self.recorded.taps.pop(tap)
        return found

    def _in_gauge(self, step: Step, x: Array, units: Units, program: list[Call]) -> Finding | None:
        """The finding on a tap in the first gauge in which it fits, or is supposed to be, which is what later stages are run on."""
        tap, pick = step.call.tap, self.admitted.picks.get(step.call.tap, {})
        for what, other, sure in self._arrangements(step, x, program):
            better = self._compare(step, other, units, pick) if not self.without & {*what} else None
            if better and (better.ok or not sure):
                self.accepted[tap] = what
                if tap in self.recorded.partial:
                    self.recorded.partial = {**self.recorded.partial, tap: (pick, other)}
                if not pick:
                    self.recorded.taps[tap] = other
                    if (k := gauges.partner_of(tap)) in [f.tap for f in self.findings if not f.ok]:
                        self._as_partner(k, tap)
                return better
        return None

    def _arrangements(self, step: Step, x: Array, program: list[Call]) -> Iterator[tuple[tuple[str, ...], Array, bool]]:
        """What to declare, a tap that does not fit in another arrangement, and whether that counts only if it fits then."""
        call, pick = step.call, self.admitted.picks.get(step.call.tap, {})
        guess, exact = SUPPOSED not in self.without and not pick, cut(step.exact, pick)
        if call.stage == "router.weights" and call.args[1] in self.recorded.taps:
            self.supposable = True
            scale = self.config.routed_scaling_factor
            if used := by_use(program, self.recorded, call.tap, x, scale) if guess else None:
                yield *used, False
        for what, other in gauges.alternatives(call, x, exact, self.config):
            yield what, other, True
        beside = (
            [call.tap.replace("mla.scores", t) for t in gauges.ROPE_TAPS[:2]] if call.stage in gauges.SCORES else []
        )
        found = [self.accepted.get(t, ()) for t in (*beside, gauges.partner_of(call.tap))]
        for what, other in supposed(call, x, exact, self.config, set[str]().union(*found)):
            self.supposable = True
            if guess:
                yield what, other, False

    def _as_partner(self, tap: str, partner: str) -> None:
        """Read one of a layer's rotated q and k, which is wrong in any gauge, in those in which the other was found; if that
        was not recorded, in those of other layers.
        """
        taps = self.recorded.taps
        if not partner or tap not in taps:
            return
        what, alone = set(self.accepted.get(partner, ())), partner not in self.admitted.taps
        if alone:
            self.supposable, what = True, set(self.told - self.without)
        what -= set(self.accepted.get(tap, ()))
        if gauges.TURNED in what:
            to_interleaved = self.config.rope_interleave if alone else self._interleaves(partner)
            taps[tap] = gauges.swap_pairs(taps[tap], to_interleaved=to_interleaved)
        for share in common(what):
            taps[tap] = taps[tap].astype(np.float32) / np.float32(share.factor(self.config.softmax_scale))

    def _interleaves(self, tap: str) -> bool:
        """Whether a turned tap is read with its halves as interleaved pairs."""
        x, other = self.admitted.taps[tap], self.recorded.taps[tap]
        ways = (gauges.swap_pairs(x, to_interleaved=w) for w in (True, False))
        return sine(next(ways), other) <= sine(next(ways), other)

    def _compare(self, step: Step, x: Array, units: Units, pick: Pick) -> Finding:
        found = compare(step, x, units, pick)
        if (
            not found.ok
            and step.call.stage not in RULES
            and (over := pattern(self._scene(step, x, found, units, pick)))
        ):
            found = replace(found, note=f"{found.note}{':' if found.note.endswith('affected') else ';'} {over}")
        if not self.pictures:
            return found
        return replace(found, picture=picture(step.call.of, x, step.exact, settled_rows(step, pick), pick))

    def _scene(self, step: Step, x: Array, found: Finding, units: Units, pick: Pick) -> Scene:
        stage, tap, shape = step.call.of, step.call.tap, step.e.shape
        routed = any(s.startswith(("router.", "moe.")) for s in units.stages)
        return Scene(
            stage,
            x,
            cut(step.exact, pick) if pick else step.e,
            entries=entries(shape, pick),
            settled=settled_rows(step, pick),
            limit=found.allowed,
            widths=letters(self.config, stage, tap, Sizes.whole(1, 1))
            | dict(zip(stage.shape.split(), shape, strict=True)),
            ids=self.recorded.taps.get(f"{owner(tap)}/router.ids") if routed else None,
        )

    def _watch(self, tap: str, ours: Array) -> None:
        if tap not in self.admitted.taps:
            either = tap.rpartition("/")[2] in gauges.ROPE_TAPS
            orders = [gauges.swap_pairs(ours, to_interleaved=way) for way in (True, False)] if either else []
            for name, away in itertools.chain(*[by_value(self.unknown, a) for a in (ours, *orders)]):
                self.alike[name] = min(self.alike.get(name, (away, tap)), (away, tap))

    @property
    def gauges(self) -> dict[str, list[str]]:
        """What to declare -> the taps that fit so."""
        found: dict[str, list[str]] = {}
        for tap, all_ in self.accepted.items():
            for what in all_:
                found.setdefault(what, []).append(tap)
        return found
