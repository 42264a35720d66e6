"""A score for people and for programs (schema refimpl-score/1)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

from .distances import Distances
from .measuring import Score
from .shown import Place

_ROWS = (
    ("rms", "log-probability off, rms of a place, worst"),
    ("largest", "log-probability off, largest"),
    ("kl", "KL(ours, theirs), mean"),
    ("scale", "scaled by 1 +"),
)


def render(s: Score, notes: tuple[str, ...] = ()) -> str:
    """Lines: what was shown, the distances beside the twins', tokens and ranks, other company, the verdict."""
    return "\n".join(
        [*_head(s), *notes, "", *(_table(s) if s.settled else ()), *_tokens(s), *_again(s), "", _verdict(s)]
    )


def _head(s: Score) -> Iterator[str]:
    places = sum(len(row) for row in s.shown.tokens)
    count = sum(len(e) for e in s.shown.places.values())
    doubtful = sum(1 for p in s.shown.places if s.expected.doubtful[p])
    yield f"shown     {s.shown.source or 'a file'}"
    what = f"{count} log-probabilities" if count else f"{len(s.shown.chosen)} tokens, no log-probabilities"
    yield f"          {len(s.shown.places)} of {places} places, {what}; {doubtful} places in doubt"
    yield f"expected  {s.expected.precision}, spread of {len(s.expected.twins)} twins"
    if s.shift:
        yield "reading   what follows token i of the prompt is given as token i's own (an echo without a BOS)"


def _table(s: Score) -> Iterator[str]:
    yield f"{'':<44}{'shown':>10}{'twins':>10}{'allowed':>10}"
    for key, what in _ROWS:
        numbers = [getattr(d, key) for d in (s.candidate, s.twins, s.allowed)]
        judged = key in ("rms", "scale")
        yield f"{what:<44}" + "".join(f"{x:>10.1e}" for x in (numbers if judged else numbers[:2]))
    yield ""


def _tokens(s: Score) -> Iterator[str]:
    shown, twins = s.doubtful
    if shown.rms:
        yield f"in doubt        rms up to {shown.rms:.1e}, mean KL {shown.kl:.1e}; the twins' {twins.rms:.1e}, {twins.kl:.1e}"
    if s.breaks:
        first = min(s.breaks, key=lambda p: (p[1], p[0]))
        yield f"first break     {_named(first)}; {len(s.breaks)} of {len(s.settled)} places beyond"
    moved = [r for r in s.ranks if r.theirs != r.ours]
    if s.ranks:
        yield f"ranks           of {len(s.ranks)} next tokens {len(moved)} stand elsewhere{_first([r.place for r in moved])}"
    if s.shown.chosen or s.settled:
        yield f"most likely     {len(s.tokens)} places with a token that roundings do not explain{_first(list(s.tokens))}"
    if s.hidden:
        yield f"hidden          {len(s.hidden)} lists lack a likely token{_first(list(s.hidden))}"


def _again(s: Score) -> Iterator[str]:
    for a in s.again:
        same = "the same" if not a.largest else f"up to {a.largest:.1e} apart"
        tokens = f", {a.tokens} other tokens" if a.tokens else ""
        yield f"{a.how:<16}{same}{tokens} at {a.places} places{'' if a.ok else '  <-- beyond the spread'}"


def _verdict(s: Score) -> str:
    if s.reasons:
        return f"INCONSISTENT ({'; '.join(s.reasons)})"
    if s.settled:
        return f"CONSISTENT (with the case at {len(s.settled)} places; what is not shown is not judged)"
    why = (
        "only tokens are shown: they agree"
        if s.shown.chosen
        else "no log-probabilities are shown where none is in doubt"
    )
    return f"INCONCLUSIVE ({why})"


def _named(p: Place) -> str:
    return f"row {p[0]}, position {p[1]}"


def _first(places: list[Place]) -> str:
    return f", first {_named(min(places, key=lambda p: (p[1], p[0])))}" if places else ""


def to_json(s: Score, notes: tuple[str, ...] = ()) -> str:
    """schema refimpl-score/1."""

    def numbers(d: Distances) -> dict[str, float]:
        return asdict(d)

    content = {
        "schema": "refimpl-score/1",
        "verdict": s.verdict,
        "reasons": s.reasons,
        "source": s.shown.source,
        "notes": notes,
        "precision": s.expected.precision,
        "shift": s.shift,
        "places": {"shown": len(s.shown.places), "settled": len(s.settled), "all": sum(map(len, s.shown.tokens))},
        "candidate": numbers(s.candidate),
        "twins": numbers(s.twins),
        "allowed": numbers(s.allowed),
        "doubtful": [numbers(d) for d in s.doubtful],
        "breaks": s.breaks,
        "tokens": s.tokens,
        "hidden": s.hidden,
        "ranks": [asdict(r) for r in s.ranks],
        "again": [asdict(a) for a in s.again],
    }
    return json.dumps(content, indent=1)
