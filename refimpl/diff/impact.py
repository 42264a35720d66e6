"""How much of what the logits are off by each finding owns, from the files alone: which of several findings matters.

Alone: our run with this finding's graft and no other. Without: the candidate's run with this finding's stage corrected, that is our
run with the differences of all its recorded taps but these. Both are measured against our own run of float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.layers.stage import tap_matches
from refimpl.model.phases import in_part

from .corpus import MUTANTS
from .grafting import Graft, differences, grafted, of_mistake
from .grounds import Grounds
from .judge import Judgement
from .spans import folded


@dataclass(frozen=True)
class Moved:
    """How far logits are from ours: KL(ours, theirs), its mean and largest over positions, the largest |difference| of one logit,
    the share of positions with another most likely token.
    """

    kl: float
    kl_worst: float
    logit: float
    flipped: float


@dataclass(frozen=True)
class Impact:
    """One finding: its taps, the cause that was grafted ("" for the recorded difference), what it moves alone, what is left without
    it.
    """

    taps: tuple[str, ...]
    cause: str
    alone: Moved
    without: Moved


@dataclass(frozen=True)
class Impacts:
    """For the logits under a tap's name, over so many positions: the candidate's own distance from ours (as recorded, or as all its
    recorded differences together make it), that of all recorded differences that
    belong to no finding (rounding), and each finding's.
    """

    logits: str
    positions: int
    recorded: bool
    candidate: Moved
    rest: Moved
    findings: tuple[Impact, ...]


def impacts(
    j: Judgement,
    graft: Iterable[str] = (),
    *,
    by_layer: bool = False,
    track: Callable[[list[Any]], Iterable[Any]] = iter,
) -> list[Impacts]:
    """The impact of every finding of a judgement, or of the recorded taps that match `graft`, a stage at a time (`by_layer`: a tap
    at a time): on the main model's logits, then on each MTP module's that a finding can reach.
    """
    g = j.grounds
    assert g is not None
    apart, mistakes = differences(g), _mistakes(j)
    groups = _groups(j, list(graft), by_layer=by_layer)
    ours, together = grafted(g, {}, _logits), grafted(g, apart, _logits)
    rest = grafted(g, _but(apart, [t for group in groups for t in group]), _logits)
    runs = []
    for group in track(groups):
        alone = grafted(g, _own(j, group, apart, mistakes), _logits)
        runs.append((group, _cause(group, mistakes), alone, grafted(g, _but(apart, group), _logits)))
    return [_measured(g, tap, y, together[tap], rest[tap], runs) for tap, y in ours.items()]


Run = tuple[tuple[str, ...], str, dict[str, Array], dict[str, Array]]
"""A finding's taps, its cause, the logits with its grafts alone, those with all others."""


def _measured(g: Grounds, tap: str, ours: Array, together: Array, rest: Array, runs: list[Run]) -> Impacts:
    """The logits of one tap in all these runs against ours."""
    keep, theirs = _positions(g, ours), g.recorded.taps.get(tap)
    candidate = moved(ours, together if theirs is None else theirs, keep)
    found = [
        Impact(taps, why, moved(ours, alone[tap], keep), moved(ours, without[tap], keep))
        for taps, why, alone, without in runs
    ]
    return Impacts(tap, int(keep.sum()), theirs is not None, candidate, moved(ours, rest, keep), tuple(found))


def _but(grafts: Mapping[str, Graft], taps: Iterable[str]) -> dict[str, Graft]:
    out = set(taps)
    return {t: graft for t, graft in grafts.items() if t not in out}


def _logits(tap: str) -> bool:
    return tap.endswith("/logits")


def _positions(g: Grounds, logits: Array) -> Array:
    """Which positions are tokens, not padding."""
    valid = g.recorded.inputs.get("valid")
    keep: Array = np.ones(logits.shape[:2], bool) if valid is None else np.asarray(valid)[:, : logits.shape[1]] != 0
    return keep


def _groups(j: Judgement, patterns: list[str], *, by_layer: bool) -> list[tuple[str, ...]]:
    """Taps that are grafted together: those of one known mistake, or of one stage, in model order."""
    forward, why = [f for f in j.findings if in_part(f.tap)], _mistakes(j)  # a gradient moves no logit of its own run
    assert j.grounds is not None
    forward = [f for f in forward if set(f.region) <= set(j.grounds.calls)]  # codes have no place there
    usable = [f for f in forward if f.tap in j.grounds.admitted.taps and np.isfinite(f.allowed)]
    wanted = [f for f in usable if (any(tap_matches(f.tap, p) for p in patterns) if patterns else not f.ok)]
    none = f"no recorded tap matches {', '.join(patterns)} (gradients and updates move no logit of their run)"
    require(wanted or not patterns, none)
    found: dict[str, list[str]] = {}
    for f in wanted:
        found.setdefault(f.tap if by_layer else why.get(f.tap, f.stage), []).append(f.tap)
    return [tuple(taps) for taps in found.values()]


def _mistakes(j: Judgement) -> dict[str, str]:
    """Blamed tap -> the title of the known mistake that reproduces it."""
    return {tap: d.title for d in reversed(j.causes) if d.id for tap in d.taps} if j.culprits else {}


def _cause(group: tuple[str, ...], mistakes: Mapping[str, str]) -> str:
    titles = {mistakes.get(t, "") for t in group}
    return titles.pop() if len(titles) == 1 else ""


def _own(
    j: Judgement, group: tuple[str, ...], apart: Mapping[str, Graft], mistakes: Mapping[str, str]
) -> dict[str, Graft]:
    """The grafts of one finding: the mistake at every call of its stage that lies in the regions, or the differences."""
    g, title = j.grounds, _cause(group, mistakes)
    assert g is not None
    regions = {t for f in j.findings if f.tap in group for t in f.region}
    by_stage = {
        m.stage: m.under(g.config)
        for m in MUTANTS.values()
        if title and m.title == title and m.applies(g.config) and m.regime != "fp8"
    }
    found = {t: of_mistake(by_stage[g.calls[t].stage]) for t in regions if g.calls[t].stage in by_stage}
    return found or {t: apart[t] for t in group}


def moved(ours: Array, theirs: Array, keep: Array) -> Moved:
    """The distance of two (B, S, V) logits over the positions to keep."""
    a, b = (np.asarray(y, np.float64)[keep] for y in (ours, theirs))
    if not a.size:
        return Moved(0.0, 0.0, 0.0, 0.0)
    with np.errstate(all="ignore"):
        p, q = (y - y.max(axis=-1, keepdims=True) for y in (a, b))
        p, q = (y - np.log(np.exp(y).sum(axis=-1, keepdims=True)) for y in (p, q))
        kl = np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0)
        return Moved(
            float(kl.mean()), float(kl.max()), float(np.abs(a - b).max()), float((a.argmax(-1) != b.argmax(-1)).mean())
        )


def render_impacts(found: list[Impacts]) -> str:
    """A table for each logits; what moves nothing of an MTP module's is left out."""
    blocks = [_table(i) for i in found if i is found[0] or any(f.alone.kl > i.rest.kl for f in i.findings)]
    return "\n\n".join(blocks)


def _table(i: Impacts) -> str:
    head = f"{'':<44} {'alone, in our own run':^29}   {'corrected, in the candidate':^36}"
    columns = f"{i.logits}, {i.positions} positions"
    rows = [
        head,
        f"{columns:<44} {'KL':>9} {'|logit|':>9} {'flipped':>9}   {'KL left':>9} {'|logit|':>9} {'flipped':>9} {'gone':>6}",
    ]
    rows.append(_row("the candidate" if i.recorded else "all recorded differences", i.candidate))
    for f in i.findings:
        gone = 1 - f.without.kl / i.candidate.kl if i.candidate.kl else 0.0
        rows.append(f"{_row(folded(f.taps), f.alone)}   {_numbers(f.without)} {gone:>6.1%}")
        rows += [f"  by the known mistake: {f.cause}"] if f.cause else []
    rows.append(_row("all else that was recorded" if i.findings else "nothing is blamed: rounding", i.rest))
    return "\n".join(rows)


def _row(name: str, m: Moved) -> str:
    return f"{name:<44} {_numbers(m)}"


def _numbers(m: Moved) -> str:
    return f"{m.kl:>9.1e} {m.logit:>9.1e} {m.flipped:>9.1%}"


def impacts_to_json(found: list[Impacts]) -> str:
    """schema refimpl-impact/1."""
    return json.dumps({"schema": "refimpl-impact/1", "logits": [asdict(i) for i in found]}, indent=1)
