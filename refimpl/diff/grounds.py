"""What a judgement was reached on, for whoever looks closer at one of its taps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refimpl.autograd.errors import require
from refimpl.layers.config import Config
from refimpl.layers.stage import Call
from refimpl.model.phases import in_part

from .admission import Admitted
from .lanes import Recorded
from .names import by_name
from .precision import Precision


@dataclass(frozen=True)
class Grounds:
    """The config under which was judged (its dialect), the calls of the run, what the candidate gave as it was used (`recorded`),
    what was read of its trace (`admitted`), its precision.
    """

    config: Config
    program: list[Call]
    recorded: Recorded
    admitted: Admitted
    precision: Precision

    @property
    def calls(self) -> Mapping[str, Call]:
        """tap -> the call that gives it."""
        return {call.tap: call for call in self.program}

    @property
    def forward(self) -> list[Call]:
        """The calls of the runs of tokens, without gradients and updates."""
        return [call for call in self.program if in_part(call.tap)]

    def call(self, tap: str) -> Call:
        """The call that gives a tap, whose name may leave out the phase. SpecError for a tap that this run does not have or that
        the trace does not hold soundly.
        """
        found = [c for c in self.program if c.tap == tap] or [c for c in self.program if c.tap.partition("/")[2] == tap]
        require(found, f"this run has no tap {tap!r}{self._meant(tap)}; `refimpl taps CASE` lists them")
        parts = [c.tap for c in found if in_part(c.tap) and c.tap in self.admitted.taps]
        require(len(parts) < 2, f"{tap!r} is in several parts of the run; say which: {', '.join(parts)}")
        return self._held(next((c for c in found if c.tap in parts), found[0]))

    def _meant(self, tap: str) -> str:
        taps = list(self.calls)
        near = next((t for t in taps if t.endswith(f"/{tap}")), "") or by_name(tap, taps)
        return near and f", did you mean {near}"

    def _held(self, found: Call) -> Call:
        flaw = (
            f"{self.admitted.flawed.get(found.tap)}: that is all that is wrong with it, its numbers were not compared"
        )
        require(found.tap not in self.admitted.flawed, f"{found.tap}: {flaw}")
        require(found.tap in self.admitted.taps, f"{found.tap}: the trace does not hold it")
        return found
