"""The verdict on what an engine showed: distances from our float64 run, each held to those of twins on the same ids.

With x the shown log-probabilities of a place, e and p_k ours and the twins' of the same ids:

    distance = rms(x - e), allowed max(4 x worst_k rms(p_k - e) over all settled places, 4 u rms(logits) + rounding of the text)
    scale    = <x - e, e'> / <e', e'>, e' = e less its mean over a place; allowed max(4 x the twins', 4 x their chance's, 1 u)

Places where rounding may choose other experts are in doubt and decide nothing, as in the diff. Best is CONSISTENT: an engine that
shows no more could still be wrong where these tokens do not lead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.diff.tolerance import FACTOR, LEAN, ROUNDINGS

from .distances import LOWEST, Distances, distances, kl, pair, rms, step, tempered
from .expectation import Expected
from .shown import Again, Entry, Place, Shown

Verdict = Literal["CONSISTENT", "INCONSISTENT", "INCONCLUSIVE"]
EXIT: dict[str, int] = {"CONSISTENT": 0, "INCONSISTENT": 1, "INCONCLUSIVE": 2}
_NEARER = 4.0
"""How much nearer to ours the prompt must be one position later, by mean KL, to be read so. Both ways have places of their own."""


@dataclass(frozen=True)
class Rank:
    """Where a token of the case stands among those shown: by theirs, by ours."""

    place: Place
    theirs: int
    ours: int


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
    tempered: bool
    doubtful: tuple[Distances, Distances]

    @cached_property
    def reasons(self) -> tuple[str, ...]:
        """What speaks against the engine, in words."""
        off, temperature = abs(self.candidate.scale) > self.allowed.scale, 1 / (1 + self.candidate.scale or 1e-9)
        found = [
            (self.tempered, f"log-probabilities are those of a temperature of {temperature:.6g}"),
            (
                self.breaks and not self.tempered,
                f"log-probabilities leave the spread at {len(self.breaks)} of {len(self.settled)} places",
            ),
            (
                off and not self.breaks and not self.tempered,
                f"log-probabilities are scaled by {1 + self.candidate.scale:.6g}",
            ),
            (
                self.tokens,
                f"another token is most likely at {len(self.tokens)} places where roundings cannot make it so",
            ),
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
    """The score, as the places stand or, if that is much nearer, one position later: llama-cpp-python's echo pairs a token with
    what follows it where there is no begin-of-sentence token. SpecError for ids that the case's vocabulary has not.
    """
    _known(shown, e)
    later = _shifted(shown)
    shift = int(bool(later.places) and _apart_from(later, e) < _apart_from(shown, e) / _NEARER)
    return _measured(later if shift else shown, e, shift)


def _apart_from(shown: Shown, e: Expected) -> float:
    """Mean KL over all places, those in doubt too."""
    pairs = ((p, pair(entry)) for p, entry in shown.places.items() if entry)
    return float(np.mean([kl(e.exact[p][ids], x) for p, (ids, x) in pairs] or [0.0]))


def _known(shown: Shown, e: Expected) -> None:
    everything: list[Shown | Again] = [shown, *shown.again]
    ids = {i for some in everything for entry in some.places.values() for i in entry}
    strange = max(ids | {i for some in everything for i in some.chosen.values()}, default=0)
    require(
        strange < e.vocabulary, f"token id {strange} is shown; the case's vocabulary is {e.vocabulary}: another model's"
    )


def _shifted(shown: Shown) -> Shown:
    """Entries of the prompt belong one position later; generated tokens are where they are."""

    def later(places: Mapping[Place, Entry]) -> dict[Place, Entry]:
        return {(b, t + 1): x for (b, t), x in places.items() if t + 1 < len(shown.tokens[b])}

    again = tuple([Again(a.how, later(a.places), a.chosen) for a in shown.again])
    return Shown(shown.tokens, later(shown.places), shown.chosen, again, shown.source, shown.unnamed)


def _measured(shown: Shown, e: Expected, shift: int) -> Score:
    seen = {p: pair(entry) for p, entry in sorted(shown.places.items()) if entry}
    settled = tuple([p for p in seen if not e.doubtful[p]])
    mine, worst = _against(seen, settled, e)
    limits = _limits(seen, settled, e, worst)
    most = max(_most(e), limits.largest)
    far = {p: seen[p][1] - e.exact[p][seen[p][0]] for p in settled}
    breaks = tuple([p for p in settled if not rms(far[p]) <= limits.rms])
    return Score(
        shown=shown,
        expected=e,
        shift=shift,
        candidate=mine,
        twins=worst,
        allowed=limits,
        settled=settled,
        breaks=breaks,
        tokens=tuple(_wrong_tokens(shown, e, most)),
        hidden=tuple([p for p in settled if _hides(e, p, seen[p], shown, shift, most)]),
        ranks=tuple(_ranks(shown, e, {p: seen[p] for p in settled})),
        again=tuple(_sensitivities(shown, e, most)),
        tempered=bool(breaks) and tempered(far, {p: e.exact[p][seen[p][0]] for p in settled}, mine.scale, limits.rms),
        doubtful=_against(seen, [p for p in seen if e.doubtful[p]], e),
    )


def _limits(
    seen: Mapping[Place, tuple[Array, Array]], settled: Iterable[Place], e: Expected, worst: Distances
) -> Distances:
    """What is allowed, from the worst twin: roundoff is relative to the logits, and to what log-softmax leaves of them."""
    size = max((max(float(e.size[p]), rms(e.exact[p][seen[p][0]])) for p in settled), default=0.0)
    text = step([x for _, x in seen.values()])
    floor = ROUNDINGS * e.unit * size + text
    chance = FACTOR * max(worst.scale, worst.chance)  # four twins have four scales, too few; their places are many
    scale = max(chance, LEAN * e.unit + text)
    return Distances(
        max(FACTOR * worst.rms, floor), max(FACTOR * worst.largest, floor), FACTOR**2 * worst.kl, scale, chance
    )


def _against(
    seen: Mapping[Place, tuple[Array, Array]], at: Iterable[Place], e: Expected
) -> tuple[Distances, Distances]:
    """The engine's distances at these places, and the worst of the twins' at the same ids."""
    ids = {p: seen[p][0] for p in at}
    ours = {p: e.exact[p][i] for p, i in ids.items()}
    spread = [distances({p: t[p][i] for p, i in ids.items()}, ours) for t in e.twins]
    worst = [max((abs(getattr(d, f.name)) for d in spread), default=0.0) for f in fields(Distances)]
    return distances({p: seen[p][1] for p in ids}, ours), Distances(*worst)


def _most(e: Expected) -> float:
    """How far any log-probability may be off where no list was shown: four times what twins are, over the whole vocabulary."""
    keep = ~e.doubtful
    far = [np.abs(t - e.exact)[keep].max(initial=0.0) for t in e.twins]
    return max(FACTOR * float(max(far, default=0.0)), ROUNDINGS * e.unit * float(e.size.max(initial=0.0)))


def _wrong_tokens(shown: Shown, e: Expected, most: float) -> Iterator[Place]:
    """Settled places whose token is further below our most likely one than both may be off."""
    for p in sorted(shown.places.keys() | shown.chosen.keys()):
        token = shown.chosen.get(p)
        if token is None and len(entry := shown.places.get(p, {})) > 1:
            token = max(entry, key=entry.__getitem__)
        if token is not None and not e.doubtful[p] and e.exact[p].max() - e.exact[p][token] > 2 * most:
            yield p


def _hides(e: Expected, p: Place, seen: tuple[Array, Array], shown: Shown, shift: int, most: float) -> bool:
    """Whether a token that is not shown is more likely than the least of the list, in which the prompt's own token does not
    count: it is listed however unlikely it is.
    """
    (ids, x), row, at = seen, shown.tokens[p[0]], p[1] + 1 - shift
    listed = x[ids != (row[at] if at < len(row) else -1)]
    rest = np.delete(e.exact[p], [*ids, *shown.unnamed])
    return listed.size > 1 and bool(rest.max(initial=-np.inf) > listed.min() + 2 * most)


def _ranks(shown: Shown, e: Expected, seen: Mapping[Place, tuple[Array, Array]]) -> Iterator[Rank]:
    """Of each next token that is shown."""
    for p, (ids, x) in seen.items():
        row, following = shown.tokens[p[0]], p[1] + 1
        if following < len(row) and (at := np.flatnonzero(ids == row[following])).size and ids.size > 1:
            theirs, ours = (int((y > y[at[0]]).sum()) for y in (x, e.exact[p][ids]))
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
        yield max((abs(max(a[i], LOWEST) - max(b[i], LOWEST)) for i in a.keys() & b.keys()), default=0.0)


def _near_tie(e: Expected, p: Place, tokens: tuple[int, int], most: float) -> bool:
    return all(float(e.exact[p].max() - e.exact[p][i]) <= 2 * most for i in tokens)
