"""A judgement as text for people, or as JSON for programs."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from statistics import median

from refimpl.version import __version__

from .compare import Finding
from .diagnose import Diagnosis
from .judge import Judgement
from .spans import folded, over_layers
from .tolerance import reason

DRIFT = 100.0
"""Rounding that accumulates through a few layers stays below this many times what one stage is allowed."""
HALF = 0.5
"""Of a tap's size: what is so far away is visibly so, whatever a long region is allowed."""
SETS = ("router.ids", "router.groups")
MOST = 6
"""Stages that are shown with their details."""
CAUSES = 5
"""Causes that are said."""
LABEL = 16
"""Width of the column of labels."""
NUMBERS = ("error", "twin", "allowed", "lean", "upright", "chained")
"""Of a finding, in JSON."""


def render(j: Judgement, *, everything: bool = False, stages: int = MOST) -> str:
    """At most about a screen, so many stages with their details, the verdict last; `everything` lists every tap in model order."""
    lines = [f"{g.name:<10}{g.state:<5} {g.text}" for g in j.gates]
    bad = j.culprits
    state = "FAIL" if bad else "ok"
    what = (
        f"{len(bad)} of {len(j.findings)} taps leave the specification: {', '.join(sorted({_named(f) for f in bad}))}"
        if bad
        else f"{len(j.findings)} taps replayed"
    )
    lines += [f"{'local':<10}{state:<5} {what}", f"{'chained':<10}{'':<5} {_chained(j)}", *_recognised(j), *_renamed(j)]
    lines += _causes(j)
    if everything:
        lines += ["", f"  {'tap':<30} {'error':>9} {'allowed':>9} {'chained':>9}", *map(_row, j.findings)]
    groups, held = _groups(j), _held(j)
    lines += [line for group in groups[:stages] for line in _group(group, j, held)]
    if len(groups) > stages:
        lines += ["", f"  ... and {len(groups) - stages} more stages (--all lists every tap)"]
    return "\n".join([*lines, *_next(j), "", _verdict(j)])


def wrapped(text: str, width: int) -> str:
    """The text for a terminal of that width: long lines go on under their own text, words stay whole."""
    lines = []
    for line in text.split("\n"):
        own = len(line) - len(line.lstrip())
        under = " " * (own + 2 if own else LABEL if width >= 3 * LABEL else 2)
        lines += textwrap.wrap(
            line, width, subsequent_indent=under, break_long_words=False, break_on_hyphens=False
        ) or [""]
    return "\n".join(lines)


def _groups(j: Judgement) -> list[list[Finding]]:
    """Blamed taps of one known mistake together, and otherwise those of a stage, in model order of their first."""
    found: dict[str, list[Finding]] = {}
    why = {tap: d.title for d in reversed(j.causes) if d.id for tap in d.taps} if j.culprits else {}
    for f in j.culprits:
        found.setdefault(why.get(f.tap, f.stage), []).append(f)
    return list(found.values())


def _held(j: Judgement) -> set[str]:
    """Taps that were recorded, if not all were compared."""
    return {f.tap for f in j.findings}.union(
        *[taps for what, taps in j.notes.items() if what.endswith(": not compared")]
    )


def _group(group: list[Finding], j: Judgement, held: set[str]) -> Iterator[str]:
    """A stage, its layers, and its worst tap: how far off, how far it may be, where."""
    worst = max(group, key=lambda f: f.error / f.allowed if f.allowed else f.error)
    layers = over_layers(group, j.findings)
    where = folded([f.tap for f in group]) + (f" ({layers})" if layers else "")
    yield from ("", f"  {where}   error {worst.error:.1e}   allowed {worst.allowed:.1e}{_why(worst)}")
    at = f"{worst.tap}: " if len(group) > 1 else ""
    yield from (f"    {at}{worst.note}", *_region(worst, held))


def _next(j: Judgement) -> Iterator[str]:
    """The one tap to record next: what halves the widest region that is blamed, or shows a part that nothing showed."""
    if tap := next_tap(j):
        yield from ("", f"next      record {tap}")


def next_tap(j: Judgement) -> str:
    """The tap whose recording would tell most, "" if nothing is open."""
    recorded = _held(j)
    widest = max((f.region for f in j.culprits), key=len, default=())
    inner = [t for t in widest if t not in recorded and not t.endswith(("/mask", "/mla.rope_tables"))]
    if inner:
        return inner[len(inner) // 2]
    coverage = next((g for g in j.gates if g.name == "coverage" and g.state == "?"), None)
    ends = ("/resid", "/logits")
    return next((t for t in coverage.details if t.endswith(ends)), "") if coverage else ""


def _cause(d: Diagnosis) -> dict[str, object]:
    rivals = [{"id": other.id, "title": other.title} for other in d.rivals]
    told = {"id": d.id, "title": d.title, "threads": list(d.threads), "taps": list(d.taps)}
    return told | {"rivals": rivals, "same_numbers": d.same}


def _causes(j: Judgement) -> Iterator[str]:
    """Known mistakes that reproduce what is blamed, a common cause said once; and whether anything stays unexplained."""
    if not j.culprits:
        return
    for d in j.causes[:CAUSES]:
        known = ", ".join([*d.ids, *d.threads[:3]])
        yield f"{'cause':<10}{'':<5} {d.said}{f' ({known})' if known else ''}: reproduces {folded(d.taps)}"
    if more := len(j.causes[CAUSES:]):
        yield f"{'cause':<10}{'':<5} ... and {more} more (--json lists every cause)"
    named = {tap for d in j.causes for tap in d.taps}
    rest = [f.tap for f in j.culprits if f.tap not in named]
    if rest:
        yield f"{'cause':<10}{'':<5} no known mistake reproduces {folded(rest)}"


def _recognised(j: Judgement) -> Iterator[str]:
    """What was recognised and not blamed, a line each: readings, gauges, the dialect that had to be assumed."""
    for kind, found in (("reading", j.notes), ("gauge", j.gauges)):
        yield from (f"{kind:<10}{'':<5} {what}{_where(taps)}" for what, taps in found.items())
    yield from (
        f"{'dialect':<10}{'':<5} {name}={value} reproduces the candidate" for name, value in j.contested.items()
    )


def _renamed(j: Judgement) -> Iterator[str]:
    """What names that are no taps seem to mean."""
    known = {n: tap for n, tap in j.unknown.items() if tap}
    yield from (f"{'unknown':<10}{'':<5} {n}: is it {tap}?" for n, tap in list(known.items())[:6])
    if len(known) > 6:
        yield f"{'unknown':<10}{'':<5} and {len(known) - 6} more"


def _where(taps: list[str]) -> str:
    return f": {', '.join(taps[:3])}{f' and {len(taps) - 3} more' if len(taps) > 3 else ''}" if taps else ""


def _region(f: Finding, held: set[str]) -> Iterator[str]:
    """Which stages a difference may lie in, where more than one was computed for the tap."""
    inner = [t for t in f.region if t != f.tap]
    if inner:
        names = ", ".join(t.removeprefix("fwd/") for t in inner[-6:])
        more = "..., " if len(inner) > 6 else ""
        what = "compared" if held.intersection(inner) else "recorded"
        yield f"    in one of {len(f.region)} stages that were not {what} apart: {more}{names}, itself"


def _row(f: Finding) -> str:
    return f"  {f.tap:<30} {f.error:>9.1e} {f.allowed:>9.1e} {f.chained:>9.1e}" + ("" if f.ok else "  <-- " + f.note)


def _why(f: Finding) -> str:
    return f" = {reason(f.stage, f.twin)}" if f.allowed else ""


def _chained(j: Judgement) -> str:
    """Where the candidate is first visibly away from our own run: what comparing two recordings would show, drift
    and all.
    """
    usual = median(
        [f.allowed for f in j.findings if f.allowed] or [0.0]
    )  # a float32 tap behind bfloat16 ones drifts as they do
    far = [f for f in j.findings if _far(f, usual)]
    if not far:
        return "never visibly away from our own run"
    return f"first visible at {far[0].tap}, {len(far)} taps differ from there on"


def _far(f: Finding, usual: float) -> bool:
    if f.tap.endswith(SETS):
        return f.chained > 0
    return f.chained > min(DRIFT * max(f.allowed, usual), HALF)


def _verdict(j: Judgement) -> str:
    unseen = next((len(g.details) for g in j.gates if g.name == "coverage"), 0)
    names = sorted({_named(f) for f in j.culprits})
    gates = [g.name for g in j.gates if g.state == "FAIL"]
    culprit = f"culprit: {', '.join(names + gates)}" if names + gates else ""
    undecided = [g.name for g in j.gates if g.state == "?"]
    why = f"undecided: {', '.join(undecided)}" if undecided else ""
    return f"{j.verdict} ({'; '.join([x for x in (culprit, why, f'{unseen} taps unseen') if x])})"


def _named(f: Finding) -> str:
    """The tap without its place; of gradients the stage, which says what they are."""
    return f.stage if "/" in f.stage else f.tap.rpartition("/")[2]


def summary(j: Judgement) -> str:
    """One line."""
    return _verdict(j)


def to_json(j: Judgement) -> str:
    """schema refimpl-diff/1, published in report.schema.json (numbers that are not finite become null)."""

    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    def rows() -> Iterator[dict[str, object]]:
        for f in j.findings:
            numbers = {k: number(getattr(f, k)) for k in NUMBERS}
            about = {"tap": f.tap, "stage": f.stage, "ok": f.ok, "open": f.open, "note": f.note}
            yield about | {"region": list(f.places)} | numbers

    gates = [{"name": g.name, "state": g.state, "text": g.text, "details": list(g.details)} for g in j.gates]
    body = {"schema": "refimpl-diff/1", "version": __version__, "verdict": j.verdict, "exit_code": j.exit_code}
    causes = [_cause(d) for d in j.causes]
    recognised = {"gauges": j.gauges, "notes": j.notes, "unknown": j.unknown, "contested": j.contested}
    more = {"layouts": j.layouts} | recognised | {"causes": causes, "next": next_tap(j)}
    return json.dumps(body | more | {"gates": gates, "findings": list(rows())}, indent=1)
