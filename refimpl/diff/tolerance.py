"""How far a stage may be from float64: measured, per tap and per input, on twins of the stage at the declared
precision.

A twin is the specification's own stage at the candidate's precision, on the candidate's inputs. The first takes them as
they are; the others take them nudged by about the last place of the arithmetic, which shows how much a stage that
cancels (a score near zero, a norm of a small vector) magnifies any other order of summation.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.precision import rounded
from refimpl.layers.stage import Call

from .wide import MASKED, Place, Wide, paired

TWINS = 4
"""Members of the family; more change the largest error by little and cost a replay each."""
FACTOR = 4.0
"""A candidate is one more draw from the family: sums in another order may exceed the largest of four draws."""
ROUNDINGS = 4.0
"""No stage is asked to be better than this many units of roundoff: twins that happen to round well prove nothing."""
UNIT = {"float64": 2.0**-46, "float32": 2.0**-24, "bfloat16": 2.0**-9, "float16": 2.0**-11}
"""u by the dtype that a tap is stored in: unit roundoff, of bfloat16 half of it. Rows are compared by their norm, and rounding
to bfloat16 moves a row by 2**-9.2 of that. Of float64, in which the reference is computed as well, 128 times it: two sums of
some ten thousand numbers, each in its own order, are as far apart.
"""
LEAN = 1.0
"""Units of roundoff by which a whole tap may be too large or too small: roundings go either way and cancel."""
BLOCK = 1 << 16
"""Numbers that are compared at a time."""
ROOM = 1 << 18
"""Numbers whose differences are made in the same memory: fresh memory costs more than they do."""
FEW = 16
"""Numbers of a tap, a loss for instance, below which roundings need not cancel; of many numbers, those that count (`counting`)."""
CONSTANTS = ("mla.scores", "mla.scores_absorbed", "mla.lse", "mla.rope_tables", "router.weights", "moe.routed")
"""Stages that multiply by a constant, which is itself rounded once: their taps may lean twice as far."""
FLOOR = {
    "mla.scores": (0.1, "a softmax looks at differences, and a score near zero is a sum that cancels"),
    "mla.scores_absorbed": (0.1, "as mla.scores"),
    "mla.lse": (0.1, "it is as far off as a score, and may be near zero"),
}
"""stage -> (share of the largest row that a row counts as at least, its reason)."""
_GRADIENTS = (0.1, "a gradient is a sum of parts that cancel, behind a softmax those of all keys")
_OTHERS = (1e-3, "a thousandth, so that a row of zeros does not ask for zeros")
INNER = 2.0
"""Units of roundoff by which a value that was not recorded is moved: up to one unit in the last place."""
EXTRA = {
    "mla.rope_tables": (
        4.0,
        "x 4: frequencies are themselves rounded, pow errs by up to 2 units, and a position multiplies it",
    ),
}
"""stage -> (further factor, its reason)."""


Elements = tuple[float, float]
"""How far every single element may be off: of itself, and in addition."""


@dataclass(frozen=True)
class Noise:
    """The roundings a correct candidate may make: `unit(tap)` is that of the dtype in which it keeps a tap, or would.

    Twin 0 rounds what was not recorded as the declared plan does, and nothing else. The others move every operand of a stage
    and every value that was not recorded at random, by up to a unit in the last place of the output's storage: rounded or
    not, fused or not, in another order, scale on one factor or the other, all of it lies in such a ball.
    """

    unit: Callable[[str], float]
    format: Callable[[Call], str]

    def given(self, call: Call, a: Array, twin: int | None, place: Place | None = None) -> Array:
        """A recorded operand of a call, as a twin may see it; a block of it, which lies at `place`."""
        return a if not twin else _moved(a, self.unit(call.tap), (twin, call.tap), place)

    def inner(self, call: Call, out: Array, twin: int | None, place: Place | None = None) -> Array:
        """An output that was not recorded, as a twin may hold it; a block of it, which lies at `place`."""
        if call.of.compare in ("exact", "set") or twin is None:
            return out
        if not twin:
            return rounded(out, self.format(call))
        return _moved(out, INNER * self.unit(call.tap), (twin, call.tap), place)

    def outer(self, call: Call, out: Array) -> Array:
        """An output in the format in which the candidate keeps it."""
        return rounded(out, self.format(call))


def _moved(x: Array, by: float, seed: tuple[int, str], place: Place | None) -> Array:
    """x moved at random by at most `by` of itself; a block of an array is moved as it would be with all of it."""
    numbers = (*seed, x.size if place is None else math.prod(place.shape))
    seeds = [s if isinstance(s, int) else zlib.crc32(s.encode()) for s in numbers]
    if place is None:
        draws = np.random.default_rng(seeds).random(x.shape, np.float32)
    else:
        _, h, s, t = place.shape
        starts = [((place.sequence * h + head) * s + place.start) * t for head in range(h)]
        heads = [_draws(seeds, start, (place.stop - place.start) * t) for start in starts]
        draws = np.stack(heads).reshape(1, h, -1, t)[..., : x.shape[-1]]
    return x * (1 + by * (2 * draws - 1)).astype(x.dtype)


def _draws(seeds: list[int], start: int, n: int) -> Array:
    """n numbers of the sequence that `default_rng(seeds).random(..., float32)` gives, from `start` on: two to a state."""
    bits = np.random.PCG64(seeds)
    bits.advance(start // 2)
    return np.random.Generator(bits).random(start % 2 + n, np.float32)[start % 2 :]


@dataclass(frozen=True)
class Distance:
    """How far a tap is from another: the worst row's |x - e| / |e|, and by how much all of it leans, a - 1 in x = a e. `largest`,
    the largest row's |e|^2; `rows`, how many rows count, as (sum |e|^2)^2 / sum |e|^4 tells.
    """

    worst: float
    lean: float
    largest: float
    rows: float = math.inf


def distance(
    stage: str, x: Array | Wide, e: Array | Wide, settled: Array | None = None, largest: float = 0.0
) -> Distance:
    """Of a stage's output x from e, rows along the last axis, only the settled rows if they are told.

    A row counts as at least a share of the largest (`FLOOR`), which is not among the rows if `largest` tells its |e|^2.
    """
    far, size, along = sums(x, e)
    if settled is not None:
        far, size, along = (a[settled.reshape(a.shape)] for a in (far, size, along))
    largest = max(largest, float(size.max(initial=0)))
    errors = _relative(far, size, floor_of(stage)[0], largest)
    total = float(size.sum())
    leans = total > 0 and e.size >= FEW
    lean = abs(float(along.sum())) / total if leans else 0.0
    return Distance(float(errors.max(initial=0)), lean, largest, _count(size))


def elements_of(stage: str, unit: float, inputs: Callable[[], Iterator[list[Any]]]) -> Elements | None:
    """What single elements are held to, None where only rows are. A rotary table is no sum: in a coarse dtype each number of it is
    cos or sin of an angle that float32 knows to 4 units, rounded no more than twice. The frequencies' own rounding to bfloat16
    moves rows by less than the table's, but a cosine near 0 by far more.
    """
    if stage != "mla.rope_tables" or unit <= UNIT["float32"]:
        return None
    positions = next(inputs())[0]
    return ROUNDINGS * unit, 4 * UNIT["float32"] * (1 + float(np.abs(positions).max(initial=0)))


def strays(x: Array, e: Array, limit: Elements | None, settled: Array | None = None) -> int:
    """How many elements, of the settled rows if they are told, are further off than that."""
    if limit is None:
        return 0
    x, e = comparable(x, e)
    off = np.abs(x - e) > limit[0] * np.abs(e) + limit[1]
    return int((off if settled is None else off[settled]).sum())


def row_errors(stage: str, x: Array | Wide, e: Array | Wide) -> Array:
    """|x - e| / |e| of every row."""
    far, size, _ = sums(x, e)
    return _relative(far, size, floor_of(stage)[0], float(size.max(initial=0)))


def sums(x: Array | Wide, e: Array | Wide) -> tuple[Array, Array, Array]:
    """|x - e|^2, |e|^2 and <x - e, e> of every row."""
    sums = np.zeros((3, *e.shape[:-1]))
    room = np.empty(min(max(x.size, 1), ROOM))
    for place, a, b in paired(x, e):
        at = sums if place is None else sums[(slice(None), *place.index)]
        _add_up(np.atleast_1d(a), np.atleast_1d(b), at, room)
    return sums[0], sums[1], sums[2]


def _add_up(x: Array, e: Array, sums: Array, room: Array) -> None:
    """Add the three sums of every row, a few rows at a time so that what is computed stays in a cache.  sums (3, ...)."""
    if x.size > BLOCK and x.flags.c_contiguous and e.flags.c_contiguous:
        n, rows = e.shape[-1], math.prod(e.shape[:-1])
        found, part = np.zeros((3, rows)), max(BLOCK // n, 1)
        x, e = x.reshape(rows, n), e.reshape(rows, n)
        for at in range(0, rows, part):
            _three(x[at : at + part], e[at : at + part], found[:, at : at + part], room)
        sums += found.reshape(sums.shape)
    else:
        found = np.empty(sums.shape)
        _three(x, e, found, room)
        sums += found


def _three(x: Array, e: Array, out: Array, room: Array) -> None:
    """|x - e|^2, |e|^2 and <x - e, e> of every row.  x (..., i), e (..., i), out (3, ...); room for x - e, if it is enough."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinitely far is far enough
        masked = e.size and np.isneginf(e[(0,) * (e.ndim - 1)][-1])  # in a causal model the first query sees least
        if not masked:
            _dots(x, e.astype(np.float64, copy=False), out, room)
        if masked or not np.isfinite(out).all():
            _dots(*comparable(x, e), out, room)


def _dots(x: Array, e: Array, out: Array, room: Array) -> None:
    """The same; not finite where an entry is not."""
    d = room[: x.size].reshape(x.shape) if x.size <= room.size else np.empty(x.shape)
    np.copyto(d, x)
    d -= e
    for i, (left, right) in enumerate(((d, d), (e, e), (d, e))):
        np.vecdot(left, right, out=out[i, ...])  # an array also of one number


def floor_of(stage: str) -> tuple[float, str]:
    """The share of the largest row that a stage's row counts as at least, and its reason."""
    return FLOOR.get(stage, _GRADIENTS if stage.startswith(("bwd/", "grad/")) else _OTHERS)


def element_errors(stage: str, x: Array, e: Array) -> Array:
    """|x - e| of every element over the root mean square of its row of e: their root mean square is the row's error."""
    x, e = comparable(np.atleast_1d(x), np.atleast_1d(e))
    with np.errstate(over="ignore"):
        size = np.sqrt(np.mean(e * e, axis=-1, keepdims=True))
        least = max(floor_of(stage)[0] * float(size.max(initial=0)), math.sqrt(np.finfo(np.float64).tiny))
        return np.abs(x - e) / np.maximum(size, least)


def _relative(far: Array, size: Array, floor: float, largest: float) -> Array:
    """Square roots of the quotient; NaN counts as infinite."""
    far = np.where(np.isfinite(far), far, np.inf)
    least = max(floor**2 * largest, np.finfo(np.float64).tiny)
    with np.errstate(over="ignore"):
        return np.sqrt(far / np.maximum(size, least))


def comparable(x: Array, e: Array) -> tuple[Array, Array]:
    """Both in float64, with what cannot be subtracted made to agree or to be infinitely far.

    Where e is -inf (a masked score) x must be -inf too, or lower than any score. Where e is NaN or infinite because the stage's
    inputs are, nothing is asked of x: that is the fault of an earlier stage.
    """
    x, e = x.astype(np.float64), e.astype(np.float64, copy=False)
    if np.isfinite(e.sum()) and np.isfinite(x.sum()):
        return x, e
    agreed = (e == -np.inf) & (x < MASKED)
    x, e = np.where(agreed, 0, x), np.where(agreed, 0, e)
    if np.isfinite(e.sum()) and np.isfinite(x.sum()):
        return x, e
    masked, unknown = np.isneginf(e), ~np.isfinite(e) & ~np.isneginf(e)
    x = np.where(unknown, 0, np.where(masked, np.inf, x))
    return np.where(np.isfinite(x), x, 1e300), np.where(unknown | masked, 0, e)


def counting(e: Array) -> float:
    """(sum e^2)^2 / sum e^4: so many numbers of equal size would let roundings cancel as well; one far above all others: 1."""
    return _count(np.square(comparable(e, e)[1], dtype=np.float64))


def _count(squares: Array) -> float:
    """(sum s)^2 / sum s^2, of numbers of any size."""
    shares = squares / max(float(squares.max(initial=0)), np.finfo(np.float64).tiny)
    return float(shares.sum() ** 2 / max(np.square(shares).sum(), np.finfo(np.float64).tiny))


def cancelling(found: Distance, e: Array | Wide, upright: float) -> Distance:
    """What was found, without a lean beyond `upright` of an array in which too few numbers count for roundings to cancel."""
    alone = found.lean > upright and not isinstance(e, Wide) and counting(e) < FEW
    return replace(found, lean=0.0) if alone else found


def allowed_lean(stages: Iterable[str], unit: float, family: float, rows: float = math.inf) -> float:
    """How far the ratio may be from 1 after these stages, of which the coarsest is kept with that roundoff. A norm's factor is one
    for all of a row, so that of few rows its roundings need not cancel: of R below `FEW`, 1 + 2 / sqrt(R) times as far.
    """
    constant = 2 if any(s in CONSTANTS for s in stages) else 1
    return max(FACTOR * family, LEAN * unit * constant * (1 + 2 / math.sqrt(max(rows, 1)) if rows < FEW else 1))


def allowed(stage: str, unit: float, family: float) -> float:
    """The limit for a tap kept in a dtype of that roundoff whose worst twin errs by `family`."""
    extra, _ = EXTRA.get(stage, (1.0, ""))
    return max(FACTOR * family, ROUNDINGS * unit) * extra


def reason(stage: str, family: float) -> str:
    """The same in words, for the report."""
    _, why = EXTRA.get(stage, (1.0, ""))
    return f"max({FACTOR:g} x worst of {TWINS} twins {family:.1e}, {ROUNDINGS:g} roundings) {why}".rstrip()
