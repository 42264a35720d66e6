"""The verdict on what an engine showed: distances from our float64 run, each held to those of twins on the same ids.

With x the shown log-probabilities of a place, e and p_k ours and the twins' of the same ids:

    distance = rms(x - e)      allowed = max(4 x worst_k rms(p_k - e) over all settled places, 4 u rms(logits)) + rounding of the text
    scale    = <x - e, e'> / <e', e'>, e' = e less its mean over a place; allowed max(4 x the twins', 1 u)

Places where rounding may choose other experts are in doubt and decide nothing, as in the diff. Best is CONSISTENT: an engine that
shows no more could still be wrong where these tokens do not lead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff.tolerance import FACTOR, LEAN, ROUNDINGS

from .expected import Expected
from .shown import Again, Entry, Place, Shown

Verdict = Literal["CONSISTENT", "INCONSISTENT", "INCONCLUSIVE"]
EXIT: dict[str, int] = {"CONSISTENT": 0, "INCONSISTENT": 1, "INCONCLUSIVE": 2}
_LOWEST = -1e4
"""What engines write for -inf, and below."""
_FEW = 16
"""Shown numbers below which roundings need not cancel."""
_DECIMALS = range(1, 9)


@dataclass(frozen=True)
class Rank:
    """Where a token of the case stands among those shown: by theirs, by ours."""

    place: Place
    theirs: int
    ours: int


@dataclass(frozen=True)
class Distances:
    """Of the engine, or of a twin, over places: the worst rms and the largest |difference| of a log-probability, the mean KL(ours,
    theirs) over what was shown and all else as one, how much all is scaled.
    """

    rms: float
    largest: float
    kl: float
    scale: float


@dataclass(frozen=True)
class Sensitivity:
    """The same places in other company: how many were compared, the largest |difference|, tokens that differ."""

    how: str
    places: int
    largest: float
    tokens: int
    ok: bool


@dataclass(frozen=True)
class Score:
    """What was found. `breaks`, places in order whose distance is beyond `allowed`; `tokens`, places where the generated (or most
    likely) token is one that roundings cannot make so; `hidden`, places whose list lacks a token that must be in it.
    """

    shown: Shown
    expected: Expected
    shift: int
    candidate: Distances
    twins: Distances
    allowed: Distances
    settled: tuple[Place, ...]
    breaks: tuple[Place, ...]
    tokens: tuple[Place, ...]
    hidden: tuple[Place, ...]
    ranks: tuple[Rank, ...]
    again: tuple[Sensitivity, ...]

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """What speaks against the engine, in words."""
        n = len(self.settled)
        found = [
            (self.breaks, f"log-probabilities leave the spread at {len(self.breaks)} of {n} places"),
            (
                abs(self.candidate.scale) > self.allowed.scale,
                f"log-probabilities are scaled by {1 + self.candidate.scale:.6g}: a temperature of {1 / (1 + self.candidate.scale):.6g}",
            ),
            (self.tokens, f"another token is most likely at {len(self.tokens)} places where roundings cannot make it so"),
            (self.hidden, f"a likely token is not among those shown at {len(self.hidden)} places"),
            *((not s.ok, f"{s.how}, the same prompt gives something else") for s in self.again),
        ]
        return tuple([text for bad, text in found if bad])

    @property
    def verdict(self) -> Verdict:
        """INCONSISTENT for any reason; INCONCLUSIVE where no settled place showed log-probabilities."""
        if self.reasons:
            return "INCONSISTENT"
        return "CONSISTENT" if self.settled else "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        """0 consistent, 1 inconsistent, 2 inconclusive."""
        return EXIT[self.verdict]


def measure(shown: Shown, e: Expected) -> Score:
    """The score, as the places stand or, if that fits where they do not, one position later: llama-cpp-python's echo pairs a token
    with what follows it where there is no begin-of-sentence token. SpecError for ids that the case's vocabulary has not.
    """
    _known(shown, e)
    found = _measured(shown, e, 0)
    if found.breaks:
        later = _measured(_shifted(shown), e, 1)
        if later.settled and not later.breaks:
            return later
    return found


def _known(shown: Shown, e: Expected) -> None:
    ids = {i for places in (shown, *shown.again) for entry in places.places.values() for i in entry}
    ids |= {i for some in (shown, *shown.again) for i in some.chosen.values()}
    strange = sorted(i for i in ids if i >= e.vocabulary)
    require(
        not strange,
        f"token id {strange[0] if strange else 0} is shown; the case's vocabulary is {e.vocabulary}: another model, or a padded one",
    )


def _shifted(shown: Shown) -> Shown:
    """Entries of the prompt belong one position later; generated tokens are where they are."""

    def later(places: Mapping[Place, Entry]) -> dict[Place, Entry]:
        return {(b, t + 1): x for (b, t), x in places.items() if t + 1 < len(shown.tokens[b])}

    again = tuple([Again(a.how, later(a.places), a.chosen) for a in shown.again])
    return Shown(shown.tokens, later(shown.places), shown.chosen, again, shown.source)


def _measured(shown: Shown, e: Expected, shift: int) -> Score:
    seen = {p: _pair(entry) for p, entry in sorted(shown.places.items()) if entry}
    settled = tuple([p for p in seen if not e.doubtful[p]])
    theirs = {p: seen[p][1] for p in settled}
    ours = {p: e.exact[p][seen[p][0]] for p in settled}
    twins = [{p: t[p][seen[p][0]] for p in settled} for t in e.twins]
    ids = {p: seen[p][0] for p in settled}
    spread = [_distances(x, ours) for x in twins]
    worst = Distances(*[max((abs(getattr(d, f)) for d in spread), default=0.0) for f in ("rms", "largest", "kl", "scale")])
    floor = ROUNDINGS * e.unit * max((_size(e, p, ours[p]) for p in settled), default=0.0) + _step(seen)
    allowed = Distances(
        max(FACTOR * worst.rms, floor),
        max(FACTOR * worst.largest, floor),
        FACTOR**2 * worst.kl,
        max(FACTOR * worst.scale, LEAN * e.unit + _step(seen)),
    )
    far = {p: _rms(theirs[p] - ours[p]) for p in settled}
    beyond = tuple([p for p in settled if not far[p] <= allowed.rms])
    most = max(_most(e), allowed.largest)
    return Score(
        shown,
        e,
        shift,
        _distances(theirs, ours),
        worst,
        allowed,
        settled,
        beyond,
        tuple(_wrong_tokens(shown, e, most)),
        tuple([p for p in settled if _hides(e, p, ids[p], theirs[p], _listed_anyway(shown, p, shift), most)]),
        tuple(_ranks(shown, e, ids, theirs)),
        tuple(_sensitivities(shown, e, most)),
    )


def _pair(entry: Entry) -> tuple[Array, Array]:
    ids = np.array(sorted(entry), np.intp)
    return ids, np.maximum([entry[int(i)] for i in ids], _LOWEST)


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(np.square(x)))) if x.size else 0.0


def _size(e: Expected, p: Place, shown: Array) -> float:
    """What a roundoff is relative to: the logits, and what log-softmax leaves of them."""
    return max(float(e.size[p]), _rms(shown))


def _most(e: Expected) -> float:
    """How far any log-probability may be off where no list was shown: four times what twins are, over the whole vocabulary."""
    keep = ~e.doubtful
    far = [np.abs(t - e.exact)[keep].max(initial=0.0) for t in e.twins]
    return max(FACTOR * float(max(far, default=0.0)), ROUNDINGS * e.unit * float(e.size.max(initial=0.0)))


def _step(seen: Mapping[Place, tuple[Array, Array]]) -> float:
    """Half the last decimal that the numbers were printed with, 0 if that is all of them."""
    x = np.concatenate([x for _, x in seen.values()]) if seen else np.zeros(0)
    return next((0.5 * 10.0**-d for d in _DECIMALS if x.size >= _FEW and (np.round(x, d) == x).all()), 0.0)


def _distances(x: Mapping[Place, Array], e: Mapping[Place, Array]) -> Distances:
    if not e:
        return Distances(0.0, 0.0, 0.0, 0.0)
    off = {p: x[p] - e[p] for p in e}
    centred = {p: e[p] - e[p].mean() for p in e}
    size = sum(float(c @ c) for c in centred.values())
    along = sum(float(centred[p] @ off[p]) for p in e)
    scaled = size > 0 and sum(c.size for c in centred.values()) >= _FEW
    return Distances(
        max(_rms(d) for d in off.values()),
        max(float(np.abs(d).max()) for d in off.values()),
        float(np.mean([_kl(e[p], x[p]) for p in e])),
        along / size if scaled else 0.0,
    )


def _kl(e: Array, x: Array) -> float:
    """KL(ours, theirs) of the shown tokens and one more that stands for all others: a lower bound of the whole."""
    p, q = np.exp(e), np.exp(np.minimum(x, 0))
    rest_p, rest_q = (max(1.0 - float(r.sum()), 0.0) for r in (p, q))
    rest = rest_p * np.log(rest_p / max(rest_q, 1e-300)) if rest_p > 1e-12 else 0.0
    return max(float(p @ (e - x)) + float(rest), 0.0)


def _wrong_tokens(shown: Shown, e: Expected, most: float) -> Iterator[Place]:
    """Settled places whose token is further below our most likely one than both may be off."""
    for p in sorted(shown.places.keys() | shown.chosen.keys()):
        token = shown.chosen.get(p)
        if token is None and len(entry := shown.places.get(p, {})) > 1:
            token = max(entry, key=entry.__getitem__)
        if token is not None and not e.doubtful[p] and e.exact[p].max() - e.exact[p][token] > 2 * most:
            yield p


def _listed_anyway(shown: Shown, p: Place, shift: int) -> int:
    """The prompt's own token, which is listed however unlikely it is; -1 where none is."""
    row, at = shown.tokens[p[0]], p[1] + 1 - shift
    return row[at] if at < len(row) else -1


def _hides(e: Expected, p: Place, ids: Array, x: Array, own: int, most: float) -> bool:
    """Whether a token that is not shown is more likely than the least of the list."""
    listed = x[ids != own]
    if listed.size < 2 or ids.size >= e.vocabulary:
        return False
    rest = np.delete(e.exact[p], ids)
    return bool(rest.max(initial=-np.inf) > listed.min() + 2 * most)


def _ranks(shown: Shown, e: Expected, ids: Mapping[Place, Array], x: Mapping[Place, Array]) -> Iterator[Rank]:
    """Of each next token that is shown."""
    for p in ids:
        row, following = shown.tokens[p[0]], p[1] + 1
        if following < len(row) and (at := np.flatnonzero(ids[p] == row[following])).size and ids[p].size > 1:
            theirs, ours = (int((y > y[at[0]]).sum()) for y in (x[p], e.exact[p][ids[p]]))
            yield Rank(p, theirs, ours)


def _sensitivities(shown: Shown, e: Expected, most: float) -> Iterator[Sensitivity]:
    """Both sides may be off by `most`, so two of them by twice that."""
    for again in shown.again:
        common = [p for p in again.places if p in shown.places and not e.doubtful[p]]
        largest = max(_apart((shown.places[p], again.places[p]) for p in common), default=0.0)
        tokens = [p for p, i in again.chosen.items() if shown.chosen.get(p, i) != i and not e.doubtful[p]]
        other = [p for p in tokens if not _near_tie(e, p, (shown.chosen[p], again.chosen[p]), most)]
        count = len(set(common) | (again.chosen.keys() & shown.chosen.keys()))
        if count:
            yield Sensitivity(again.how, count, largest, len(tokens), largest <= 2 * most and not other)


def _apart(pairs: Iterable[tuple[Entry, Entry]]) -> Iterator[float]:
    for a, b in pairs:
        yield max((abs(max(a[i], _LOWEST) - max(b[i], _LOWEST)) for i in a.keys() & b.keys()), default=0.0)


def _near_tie(e: Expected, p: Place, tokens: tuple[int, int], most: float) -> bool:
    return all(float(e.exact[p].max() - e.exact[p][i]) <= 2 * most for i in tokens)
