"""Over what a blamed tap is off, in words: `all of head 2, tokens from 12 on; there channels 8-15, the second half`.

Rows (all axes but the last) count as off as the verdict counts them. Of the numbers in them, those of a channel are taken together,
and only if some are within what is allowed, and the others far beyond (`GAP`), is there anything to say of channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.stage import Stage

from .dims import TOKEN_AXES
from .subsets import Named, in_words
from .tolerance import element_errors, row_errors
from .wide import BLOCK, Wide, filled, places

WORDS = {"B": "sequence", "H": "head", "E": "expert", "G": "group", "K": "slot"} | dict.fromkeys(TOKEN_AXES, "token")
"""What an axis runs over, if not channels."""
PARTS = {
    "Dn+Dr": ("the part without position", "the rotated part"),
    "Dn+Dv": ("the keys' part", "the values"),
    "C+Dr": ("the latent", "the rotated key"),
}
"""The names of the two parts of an axis."""
ALL = 0.9
"""Share of the rows of a subset from which on it is all of it that is off."""
GAP = 4.0
"""Times by which channels that are off are further off than those that are not."""
CHANCE = 1e-3
"""Probability that rows which are not all of a subset lie in it all the same."""
FEW, FEW_ROWS = 4, 8
"""Indices that may be a few rows' own; rows of which a channel may be right by chance."""
LOOK = 1 << 18
"""Numbers that are looked at."""
GROWS, MANY = 0.9, 8
"""Rank correlation of tokens with their errors from which on these grow, over at least so many tokens."""


@dataclass(frozen=True)
class Scene:
    """A blamed tap beside what it should be, x and e; for every axis which entries of the tap were recorded; the rows that count,
    None for all; what a row may be off; what the letters of axes stand for; the experts (B, S, K) of its layer's tokens, if
    they matter to it and are known.
    """

    stage: Stage
    x: Array
    e: Array | Wide
    entries: Sequence[Array]
    settled: Array | None
    limit: float
    widths: Mapping[str, int]
    ids: Array | None = None

    @property
    def axes(self) -> list[str]:
        """Their letters."""
        return self.stage.shape.split()

    @property
    def exactly(self) -> bool:
        """Whether the tap holds numbers that are right or wrong, not near or far."""
        return self.stage.compare in ("exact", "set")


def pattern(s: Scene) -> str:
    """Over what the tap is off, "" if that is everything or nothing simple."""
    if not s.axes or s.x.shape != s.e.shape or len(s.axes) != s.x.ndim:
        return ""
    with np.errstate(all="ignore"):
        errors = _row_errors(s)
        counted = np.ones(errors.shape, bool) if s.settled is None else s.settled
        off = (errors > s.limit) & counted
        if not off.any():
            return ""
        rows, entries = _over_rows(s, off, counted), _over_distances(s, off) or _over_entries(s, off)
        said = [rows, f"{'there' if rows else 'in'} {entries}" if entries else "", _growing(s, errors, off)]
    return "; ".join(filter(None, said))


def _row_errors(s: Scene) -> Array:
    """Of every row; 1 for a row that differs where numbers are right or wrong."""
    if s.exactly:
        x, e = (np.sort(a, axis=-1) if s.stage.compare == "set" else a for a in (s.x, np.asarray(s.e)))
        found: Array = (x != e).any(axis=-1).astype(np.float64)
        return found
    return row_errors(s.stage.name, s.x, s.e).reshape(s.e.shape[:-1])


def _over_rows(s: Scene, off: Array, counted: Array) -> str:
    """Which sequences, heads, tokens, experts the rows are of that are off, of more than one."""
    if off.sum() == 1 or np.array_equal(off, counted):
        return ""
    found = list(_axes(s, off, counted))
    inside = np.logical_and.reduce([counted, *[np.broadcast_to(here, off.shape) for _, here, _ in found]])
    whole = off[inside].mean() >= ALL
    said = [words for words, _, share in found if whole or share ** off.sum() < CHANCE]
    if said:
        return f"{'all of' if whole else 'only in'} {', '.join(said)}"
    return _over_experts(s, off, counted) if s.ids is not None else ""


def _axes(s: Scene, off: Array, counted: Array) -> Iterator[tuple[str, Array, float]]:
    """Of every axis of rows, tokens last, whose entries that are off can be told in words: these, a mask of them, their share."""
    order = sorted(enumerate(s.axes[:-1]), key=lambda pair: pair[1] in TOKEN_AXES)
    for axis, letter in order:
        others = tuple([i for i in range(off.ndim) if i != axis])
        here, there = off.any(axis=others), np.flatnonzero(counted.any(axis=others))
        at = np.flatnonzero(here[there])
        scattered = at[-1] - at[0] >= len(at)
        if letter == "M" or (scattered and len(at) <= FEW and off.sum() < 2 * len(at)):
            continue  # a few tokens, each of one row, are no pattern
        if words := in_words(here[there], WORDS.get(letter, "row"), s.entries[axis][there]):
            yield words, np.expand_dims(here, others), len(at) / len(there)


def _over_experts(s: Scene, off: Array, counted: Array) -> str:
    """The fewest experts whose rows are all that is off, or whose tokens are."""
    members = _members(s, off.shape) & counted
    used = np.flatnonzero(members.any(axis=tuple(range(1, members.ndim))))
    wrong, left = list[int](), off.copy()
    for i in sorted(used.tolist(), key=lambda i: -int(members[i].sum())):
        if off[members[i]].mean() >= ALL and left[members[i]].any():
            wrong.append(i)
            left &= ~members[i]
    if left.any() or 2 * len(wrong) > len(used):
        return ""
    words = in_words(np.isin(used, wrong), "expert", used)
    return f"all {'of' if s.axes[0] == 'M' else 'tokens of'} {words}" if words else ""


def _members(s: Scene, shape: tuple[int, ...]) -> Array:
    """Which rows are of an expert, or of tokens that chose it: (E, rows) or (E, B, S); (0, ...) where experts have none."""
    ids, experts = np.asarray(s.ids), np.arange(s.widths["E"])
    if s.axes[:-1] == ["B", "S"] and ids.shape[:2] == shape:
        return np.asarray((ids == experts[:, None, None, None]).any(axis=-1))
    if s.axes[:-1] == ["M"] and ids.size == shape[0]:
        return np.asarray(np.sort(ids.ravel()) == experts[:, None])  # dispatched rows lie by expert
    return np.zeros((0, *shape), bool)


def _over_entries(s: Scene, off: Array) -> str:
    """Which channels, experts, keys are off in the rows that are."""
    letter, entries, wrong = s.axes[-1], s.entries[-1], np.zeros(0, bool)
    if s.stage.compare == "set":
        letter = "G" if s.stage.name == "router.groups" else "E"
        entries, wrong = _chosen(s, off)
    elif s.exactly:
        wrong = np.asarray((s.x != np.asarray(s.e))[off].any(axis=0))
    else:
        wrong = _clear(np.sqrt(np.mean(np.square(_elements(s, off)), axis=0)), s.limit)
    if off.sum() < FEW_ROWS and 4 * wrong.sum() > 3 * len(wrong):
        return ""
    one = {"T": "key", "V": "logit", "Dr/2": "frequency"}.get(letter) or WORDS.get(letter, "channel")
    return in_words(wrong, one, entries, _parts(letter, s.widths))


def _chosen(s: Scene, off: Array) -> tuple[Array, Array]:
    """Ids that are chosen in rows that are off, and which of them one of the two alone chose; none if these are most, since with
    an expert too many there is one too few.
    """
    x, e = s.x[off], np.asarray(s.e)[off]
    ids = np.union1d(x, e)
    theirs, ours = ((a[..., None] == ids).any(axis=-2) for a in (x, e))
    found = np.asarray((theirs != ours).any(axis=0))
    return ids, found & (2 * found.sum() <= len(found))


def _elements(s: Scene, off: Array) -> Array:
    """Errors of the numbers of rows that are off, of many some all over the tap."""
    some = _some(s.x, s.e, off)
    x, e = (np.concatenate(rows) for rows in zip(*some, strict=True))
    return np.minimum(element_errors(s.stage.name, x, e), 1e30)


def _some(x: Array, e: Array | Wide, off: Array) -> Iterator[tuple[Array, Array]]:
    """Rows of both that are off, no more numbers of them than are looked at."""
    n = x.shape[-1]
    if not isinstance(e, Wide):
        some = np.flatnonzero(off)[:: -(-int(off.sum()) * n // LOOK)]
        yield x.reshape(-1, n)[some], e.reshape(-1, n)[some]
        return
    found = [place for place in places(e.shape) if off[place.index].any()]
    for place in found[:: -(-len(found) * BLOCK // LOOK)]:
        here = off[place.index]
        yield x[place.index][here], filled(e.block(place), n, e.fill)[here]


def _clear(errors: Array, limit: float) -> Array:
    """Which of these are off, if some are within the limit and the others far beyond what those are, else none."""
    errors = np.maximum(errors, 1e-3 * limit)
    order = np.sort(errors)
    steps = np.where(order[:-1] <= limit, order[1:] / order[:-1], 0)
    if not steps.size or steps.max() < GAP:
        return np.zeros(len(errors), bool)
    return np.asarray(errors > order[int(np.argmax(steps))])


def _parts(letter: str, widths: Mapping[str, int]) -> list[Named]:
    """The parts of an axis that have names."""
    if letter == "E" and (n := widths["G"]) > 1:
        size = widths["E"] // n
        return [(f"group {g}", g * size, (g + 1) * size) for g in range(n)]
    if letter not in PARTS:
        return []
    first, both = widths[letter.partition("+")[0]], sum(widths[a] for a in letter.split("+"))
    return [(PARTS[letter][0], 0, first), (PARTS[letter][1], first, both)]


def _over_distances(s: Scene, off: Array) -> str:
    """How far before a query the keys lie that are off."""
    if s.axes[-2:] != ["S", "T"] or s.x.size > LOOK:
        return ""
    x, e, others = s.x, np.asarray(s.e), tuple(range(s.x.ndim - 2))
    error = (x != e).astype(float) if s.exactly else np.minimum(element_errors(s.stage.name, x, e), 1e30)
    counted = off[..., None] & ((error > 0) | (e != np.min(e)))  # what is masked, and is so in both, counts in neither
    error, counted = np.where(counted, error, 0).max(axis=others), counted.any(axis=others)
    away = s.entries[-2][:, None] + s.widths["T"] - s.widths["S"] - s.entries[-1]
    distances = np.unique(away[counted])
    worst = np.array([error[away == d].max() for d in distances])
    words = in_words(worst > 0 if s.exactly else _clear(worst, s.limit), "distance", distances)
    return f"keys at {words} (query - key)" if words else ""


def _growing(s: Scene, errors: Array, off: Array) -> str:
    """Whether tokens are the further off the later they stand."""
    axis = next((i for i, a in enumerate(s.axes[:-1]) if a in TOKEN_AXES), None)
    if axis is None or s.exactly:
        return ""
    others = tuple([i for i in range(off.ndim) if i != axis])
    means = np.where(off, errors, 0).sum(axis=others) / np.maximum(off.sum(axis=others), 1)
    means = means[means > 0]
    if len(means) < MANY or not np.isfinite(means).all():
        return ""
    ranks = np.corrcoef(np.argsort(np.argsort(means)), np.arange(len(means)))[0, 1]
    part = len(means) // 4
    grown = means[-part:].mean() / means[:part].mean()
    if abs(ranks) < GROWS or 1 / GAP < grown < GAP:
        return ""
    return f"{'more' if ranks > 0 else 'less'} from token to token"
