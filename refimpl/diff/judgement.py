"""What a judgement of a trace says: gates, findings, what was recognised, causes when they are asked for, the verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from .compare import Finding
from .diagnose import Diagnosis
from .gates import Gate
from .grounds import Grounds

Verdict = Literal["CONFORMS", "CONFORMS_IN_GAUGE", "CONTESTED", "DIVERGES", "INCONCLUSIVE"]
EXIT = {"CONFORMS": 0, "CONFORMS_IN_GAUGE": 0, "CONTESTED": 0, "DIVERGES": 1, "INCONCLUSIVE": 2}


@dataclass
class Judgement:
    """Gates, findings in model order, what was recognised and not blamed (`gauges`: what to declare -> taps; `notes`: the same
    for readings; `unknown`: names that are no taps -> which tap they seem to be), the dialect that had to be assumed, taps that
    nothing was replayed on, whether some may be in a gauge though they fit in none, verdict.
    """

    gates: list[Gate] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    layouts: dict[str, str] = field(default_factory=dict)
    gauges: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    contested: dict[str, str] = field(default_factory=dict)
    withdrawn: frozenset[str] = frozenset()
    supposable: bool = False
    diagnosis: Callable[[], list[Diagnosis]] = field(default=list, repr=False)
    grounds: Grounds | None = field(default=None, repr=False)

    @cached_property
    def causes(self) -> list[Diagnosis]:
        """Known mistakes that reproduce what is blamed, those that explain most first; searched for when first asked."""
        with np.errstate(all="ignore"):
            return self.diagnosis()

    @property
    def culprits(self) -> list[Finding]:
        """Taps whose own stage, fed with the candidate's inputs, gives something else."""
        return [f for f in self.findings if not f.ok]

    @property
    def blamed(self) -> set[str]:
        """The culprits' taps, without those that only show again what a withdrawn tap shows."""
        return {f.tap for f in self.culprits if not self.withdrawn & set(f.region[:-1])}

    @property
    def off(self) -> float:
        """How much is off: a tap by its error or, at most, its whole size; a name that is no tap as much as that."""
        return len(self.unknown) + sum([min(1.0, f.error) for f in self.culprits])

    @property
    def verdict(self) -> Verdict:
        """DIVERGES if a gate or a tap failed; INCONCLUSIVE if a gate could not decide or nothing was compared."""
        states = {g.state for g in self.gates}
        if self.culprits or "FAIL" in states:
            return "DIVERGES"
        if "?" in states:
            return "INCONCLUSIVE"
        if self.contested:
            return "CONTESTED"
        return "CONFORMS_IN_GAUGE" if self.gauges else "CONFORMS"

    @property
    def exit_code(self) -> int:
        """0 conforms, 1 diverges, 2 inconclusive (3, bad input, is a SpecError)."""
        return EXIT[self.verdict]
