"""What a run of the suite found of an implementation: a line a claim and profile, as a table, as JSON, as a badge.

A claim's state is the worst of its runs (regimes): failed, blocked (a claim that it rests on failed), known (listed as a known
failure, and failed), skipped (not implemented or not applicable, with the reason), passed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Literal
from xml.sax.saxutils import escape

State = Literal["failed", "blocked", "known", "skipped", "passed"]
STATES: tuple[State, ...] = ("failed", "blocked", "known", "skipped", "passed")
SCHEMA = "refimpl-conformance/1"
"""The JSON report's."""
_COLOURS = {True: "#2e7d32", False: "#b3261e"}


@dataclass(frozen=True)
class Outcome:
    """One run of one claim. id: `ST-router.ids`; `regime` of the case, "" for none; `section` of R; `text`, why it did not pass."""

    id: str
    regime: str
    profile: str
    section: str
    sentence: str
    state: State
    text: str = ""


@dataclass
class Report:
    """The outcomes of a run on one implementation; `certified` counts skips within the chosen profiles as failures."""

    implementation: str
    revision: str
    certified: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    def of(self, profile: str) -> dict[State, int]:
        """How many claims of a profile are in which state."""
        worst: dict[str, State] = {}
        for o in self.outcomes:
            if o.profile == profile:
                worst[o.id] = min((o.state, worst.get(o.id, "passed")), key=STATES.index)
        return {s: sum(w == s for w in worst.values()) for s in STATES}

    @property
    def profiles(self) -> list[str]:
        """Those that were run."""
        return list(dict.fromkeys(o.profile for o in self.outcomes))

    def passed(self, profile: str) -> bool:
        """Nothing failed, something passed, and nothing was skipped if that is forbidden."""
        n = self.of(profile)
        return n["passed"] > 0 and not n["failed"] + n["blocked"] + (n["skipped"] + n["known"] if self.certified else 0)

    @property
    def conforms(self) -> bool:
        """Every profile that was run passed, and no entry of a list of exceptions is stale."""
        return bool(self.profiles) and all(map(self.passed, self.profiles)) and not self.stale

    def table(self) -> str:
        """For a terminal: a line a profile, then what did not pass."""
        head = ("profile", *STATES[::-1], "")
        rows = [
            (p, *[str(self.of(p)[s]) for s in STATES[::-1]], "conforms" if self.passed(p) else "does not")
            for p in self.profiles
        ]
        widths = [max(len(r[i]) for r in (head, *rows)) for i in range(len(head))]
        lines = [f"{self.implementation} against specification {self.revision}"]
        lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in (head, *rows)]
        for o in sorted(self.outcomes, key=lambda o: STATES.index(o.state)):
            if o.state not in ("passed", "skipped"):
                lines.append(f"{o.state}: {o.id}{'@' + o.regime if o.regime else ''}: {o.sentence} {o.text}".rstrip())
        lines += [f"skipped {n} x: {text}" for text, n in self._skips().items()]
        return "\n".join([*lines, *[f"matches no claim: {s}" for s in self.stale]])

    def _skips(self) -> dict[str, int]:
        texts = [o.text for o in self.outcomes if o.state == "skipped"]
        return {t: texts.count(t) for t in dict.fromkeys(texts)}

    def to_json(self) -> str:
        """Everything, schema refimpl-conformance/1."""
        profiles = {p: {"conforms": self.passed(p), **self.of(p)} for p in self.profiles}
        whole = {
            "schema": SCHEMA,
            "implementation": self.implementation,
            "revision": self.revision,
            "certified": self.certified,
            "conforms": self.conforms,
            "profiles": profiles,
            "stale": self.stale,
            "outcomes": [asdict(o) for o in self.outcomes],
        }
        return json.dumps(whole, indent=1)

    def badge(self) -> str:
        """An SVG of two fields: "DeepSeek-V3 spec" and the profiles that passed."""
        passed = [p for p in self.profiles if self.passed(p)]
        words = ", ".join(passed) if self.conforms else f"{len(passed)} of {len(self.profiles)} profiles"
        return _badge("DeepSeek-V3 spec", words or "none", _COLOURS[self.conforms])


def _badge(left: str, right: str, colour: str) -> str:
    a, b = (7 * len(t) + 12 for t in (left, right))
    text = "".join(
        f'<text x="{x}" y="14" textLength="{w - 12}">{escape(t)}</text>'
        for x, w, t in ((6, a, left), (a + 6, b, right))
    )
    title = escape(f"{left}: {right}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{a + b}" height="20" role="img" aria-label="{title}">'
        f'<title>{title}</title><rect width="{a}" height="20" fill="#444"/>'
        f'<rect x="{a}" width="{b}" height="20" fill="{colour}"/>'
        f'<g fill="#fff" font-family="monospace" font-size="12">{text}</g></svg>\n'
    )


def listed(text: str) -> dict[str, str]:
    """Lines `ID  # reason` of a file of exceptions -> {pattern: reason}."""
    found = {}
    for line in text.splitlines():
        pattern, _, reason = line.partition("#")
        if pattern.strip():
            found[pattern.strip()] = reason.strip()
    return found


def unreasoned(entries: Iterable[tuple[str, str]]) -> list[str]:
    """Exceptions without a reason."""
    return [pattern for pattern, reason in entries if not reason]
