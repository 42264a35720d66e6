"""Arrays that hold several of our taps side by side along the last axis: found by value, taken apart, every part a tap of its own.

A fused product gives gate and up at once, or the latents of queries and keys; a kernel's input is q_nope beside q_rope, head by
head, and its cache c_kv beside k_rope. Where a stage's last axis is a sum (`Dn+Dr`), each summand may lie apart from the other.
Parts are told by the angle to what our own stages give on the candidate's other taps, which neither drift nor a wrong factor
turns; that only says what an array is, the parts are judged as every tap is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.precision import FLOAT32
from refimpl.layers.stage import Call

from .dims import Sizes, letters, size_of
from .gauges import ROPE_TAPS, swap_pairs
from .grounds import Grounds
from .lanes import Lane, Recorded
from .names import unit_of
from .program import last_use, names, owner
from .reading import Pick, readings
from .trace import Trace

ANGLE = 0.2
"""Sine of the angle below which two arrays are the same quantity: bfloat16 turns them less, others stand across."""


@dataclass(frozen=True)
class Piece:
    """Channels [low, high) of a tap's last axis, of `whole`, with our own values; heads says whether every head has its own."""

    tap: str
    low: int
    high: int
    whole: int
    axes: tuple[str, ...]
    ours: Array

    @property
    def rows(self) -> tuple[int, ...]:
        """How many rows: (B, S), or (M,) of dispatched ones."""
        return tuple(self.ours.shape[: 1 if self.axes[0] == "M" else 2])

    @property
    def name(self) -> str:
        """`mla.q`, or `mla.q[:12]` for some of its channels."""
        last = self.tap.rpartition("/")[2]
        low, high = self.low or "", self.high if self.high < self.whole else ""
        return last if (self.low, self.high) == (0, self.whole) else f"{last}[{low}:{high}]"


@dataclass(frozen=True)
class Found:
    """What an array is: its pieces in order, each with the candidate's numbers; which rows were recorded; in words."""

    parts: list[tuple[Piece, Array]]
    pick: Pick
    text: str

    @property
    def taps(self) -> dict[str, None]:
        """The taps that it holds something of."""
        return dict.fromkeys(p.tap for p, _ in self.parts)


def suspects(taps: Mapping[str, Array], program: list[Call], flawed: Iterable[str]) -> dict[str, tuple[Array, str]]:
    """Arrays that may be several taps: those of names that are no taps, and taps that are `flawed`; with the unit that the name
    tells.
    """
    ours, units = {call.tap for call in program}, {owner(call.tap) for call in program}
    found = {}
    for name in [t for t in taps if t not in ours or t in set(flawed)]:
        x, unit = np.asarray(taps[name]), unit_of(name)
        if x.dtype.kind not in "iub" and x.ndim >= 2:
            found[name] = x, unit if unit in units else ""
    return found


def reordered(g: Grounds | None, trace: Trace, blamed: Collection[str], sizes: Sizes) -> dict[str, Found]:
    """Blamed taps of which the channels are there, but in another order or beside those of another tap."""
    odd = [c.tap for c in g.program if c.tap in blamed and "+" in c.of.shape.rpartition(" ")[2]] if g else []
    if not g or not odd:
        return {}
    r = replace(g.recorded, taps={t: x for t, x in g.recorded.taps.items() if t not in odd})
    return fused_in({t: (np.asarray(trace.taps[t]), owner(t)) for t in odd}, g.program, r, g.config, sizes)


def taken_apart(trace: Trace, found: Mapping[str, Found]) -> tuple[Trace, dict[str, Pick], dict[str, list[str]]]:
    """The trace with parts in place of what they were found in; of taps that are there in part, which; what to declare -> taps.

    A tap that was recorded by itself as well stays as it was.
    """
    taps = {t: trace.taps[t] for t in trace.taps if t not in found}
    picks, notes, new = dict[str, Pick](), dict[str, list[str]](), dict[str, list[tuple[Piece, Array, Pick]]]()
    for name, one in found.items():
        said = re.sub(r"(?<!\w)(L?)\d+(?!\w)", r"\1i", name)
        notes.setdefault(f"{said} holds {one.text}", []).extend(one.taps)
        for p, part in one.parts:
            new.setdefault(p.tap, []).append((p, part, one.pick))
    for tap, parts in new.items():
        if tap not in taps:
            taps[tap], pick = _joined(parts)
            picks |= {tap: pick} if pick else {}
    expected = [t for name in trace.header.expected for t in (found[name].taps if name in found else [name])]
    dims = {t: d for t, d in trace.header.dims.items() if t not in found}
    header = replace(trace.header, expected=sorted(dict.fromkeys(expected)), dims=dims)
    return Trace(header, taps), picks, notes


def fused_in(
    suspects: Mapping[str, tuple[Array, str]], program: list[Call], r: Recorded, c: Config, sizes: Sizes
) -> dict[str, Found]:
    """The suspects that are several taps side by side. suspects: name -> array, and the unit (`fwd/L1`) it is of, "" if unknown."""
    found: dict[str, Found] = {}
    for unit, pieces in _units(program, r, {u for _, u in suspects.values()}, c, sizes):
        for name, (x, where) in suspects.items():
            others = [
                p for p in pieces if (p.tap, p.name, p.ours.size) != (name, name.rpartition("/")[2], x.size)
            ]  # blamed
            if name not in found and where in ("", unit) and (one := _apart(x, others, c)):
                found[name] = one
    return found


def _units(
    program: list[Call], r: Recorded, wanted: set[str], c: Config, sizes: Sizes
) -> Iterator[tuple[str, list[Piece]]]:
    """Unit by unit, what its stages give on the candidate's taps; units that nobody asks for are left out."""
    meant = [call for call in program if call.own is None and ("" in wanted or owner(call.tap) in wanted)]
    outputs, calls = {call.tap for call in meant if _lead(call)}, {call.tap: call for call in program}
    for unit, found in groupby(replayed(program, r, outputs), key=lambda one: owner(one[0])):
        yield unit, [piece for tap, value in found for piece in _pieces(calls[tap], value, c, sizes)]


def replayed(program: list[Call], r: Recorded, outputs: Collection[str]) -> Iterator[tuple[str, Array]]:
    """Tap by tap, in float32, what its stage gives on the candidate's taps, and on ours where it recorded none."""
    compute, last, lane = set(outputs), last_use(program), Lane(FLOAT32)
    for call in reversed(program):
        if call.tap in compute:
            compute |= {n for n in names(call.args) if n not in r.taps and not n.startswith("w/")}
    for i, call in enumerate(program):
        if call.tap in compute:
            lane.values[call.tap] = value = lane.run(call, r)
            if call.tap in outputs:
                yield call.tap, value
            for tap in [t for t in lane.values if last[t] <= i]:
                del lane.values[tap]


def _lead(call: Call) -> int:
    """How many axes of a stage's shape count rows; 0 where no row is a token's."""
    axes = call.of.shape.split()
    rows = 2 if axes[:2] in (["B", "S"], ["B", "T"]) else 1 if axes[:1] == ["M"] else 0
    numbers = call.of.compare in ("value", "gauge") and "/" in call.tap.partition("/")[2]
    return rows if numbers and rows < len(axes) <= rows + 2 else 0


def _pieces(call: Call, ours: Array, c: Config, sizes: Sizes) -> Iterator[Piece]:
    """A tap as a whole, and the summands of its last axis."""
    axes, numbers = call.of.shape.split(), letters(c, call.of, call.tap, sizes)
    width, first = ours.shape[-1], axes[-1].partition("+")
    cuts = {(0, width)} | ({(0, m := size_of(first[0], numbers)), (m, width)} if first[1] else set())
    for low, high in cuts:
        yield Piece(call.tap, low, high, width, tuple(axes[:-1]), ours[..., low:high])


def _apart(x: Array, pieces: Sequence[Piece], c: Config) -> Found | None:
    """x as pieces side by side, in the first arrangement in which it is; None if it is none, or one tap as it should be."""
    for rows in dict.fromkeys(p.rows for p in pieces) if x.ndim > 1 and x.size and x.dtype.kind not in "iub" else ():
        some, lead = [p for p in pieces if p.rows == rows], ["B", "S"] if len(rows) == 2 else ["M"]
        for heads in (0, c.num_attention_heads):
            full = (*rows, heads) if heads else rows
            for width in dict.fromkeys([x.shape[-1], x.size // int(np.prod(full)), x.shape[-1] // max(heads, 1)]):
                axes = [*lead, *(["H"] if heads else []), "W"]
                for reading in readings(x, (*full, width), axes, guess=True) if width else ():
                    seen = _seen_by(some, heads, len(lead), reading.pick)
                    for y, step in _in_turn(reading.array) if seen else ():
                        order = _order(y, seen)
                        if order and (step == 1 or (len(order) == 2 and 2 * order[0][1] == width)):
                            return _found(y, order, reading.pick, heads, len(lead), step)
    return None


def _in_turn(x: Array) -> Iterator[tuple[Array, int]]:
    """x as if its parts lay one behind the other, and as if the channels of two lay in turn; how far those of a part are apart."""
    yield x, 1
    if x.shape[-1] % 2 == 0:
        yield swap_pairs(x, to_interleaved=False), 2


def _seen_by(pieces: Sequence[Piece], heads: int, lead: int, pick: Pick) -> list[tuple[Piece, Array]]:
    """The pieces as they would lie in an array with, or without, an axis of heads, and of those rows."""
    found = []
    for p in pieces:
        ours, own = p.ours, len(p.axes) > lead
        for axis, entries in pick.items():
            ours = ours[(slice(None),) * axis + (entries,)]
        if own and (not heads or ours.shape[lead] != heads):
            ours = ours.reshape(*ours.shape[:lead], -1)
        if not heads or own:
            found.append((p, ours))
        else:  # the same for every head
            found.append((p, np.broadcast_to(ours[..., None, :], (*ours.shape[:-1], heads, ours.shape[-1]))))
    return [(p, ours) for p, ours in found if ours.ndim == lead + bool(heads) + 1]


def _order(x: Array, pieces: list[tuple[Piece, Array]]) -> list[tuple[Piece, int]] | None:
    """The pieces that x is, each with where it ends: at every place the widest that lies there, and what is nearest of those."""
    x = x.astype(np.float32)

    def rest(at: int) -> list[tuple[Piece, int]] | None:
        if at == x.shape[-1]:
            return []
        near = []
        for p, ours in pieces:
            end = at + ours.shape[-1]
            if end <= x.shape[-1] and (away := _angle(p, x[..., at:end], ours)) < ANGLE:
                near.append((-end, away, p))
        for end, _, p in sorted(near, key=lambda one: one[:2]):
            if (behind := rest(-end)) is not None:
                return [(p, -end), *behind]
        return None

    found = rest(0)
    whole = found is not None and len(found) == 1 and found[0][0].high - found[0][0].low == found[0][0].whole
    return None if whole else found


def _angle(p: Piece, x: Array, ours: Array) -> float:
    """The sine of the angle between x and ours; rotated channels may lie in either order."""
    rotated = p.tap.rpartition("/")[2] in ROPE_TAPS and x.shape[-1] == p.whole
    return min(
        sine(x, o) for o in [ours, *([swap_pairs(ours, to_interleaved=w) for w in (True, False)] if rotated else [])]
    )


def sine(x: Array, y: Array) -> float:
    """Of the angle between two arrays; 1 beyond a right one, or where one is 0."""
    x, y = x.ravel(), y.ravel()
    size = float(np.linalg.norm(x)) * float(np.linalg.norm(y))
    return float(np.sqrt(max(1 - (float(x @ y) / size) ** 2, 0))) if 0 < size < np.inf and x @ y > 0 else 1.0


def _found(x: Array, order: list[tuple[Piece, int]], pick: Pick, heads: int, lead: int, step: int) -> Found | None:
    """The parts of x, each in its tap's axes; None if heads that should share a part do not. step: 2 where two lay in turn."""
    parts, said, start = list[tuple[Piece, Array]](), list[str](), 0
    for p, end in order:
        part = x[..., start:end]
        if heads and len(p.axes) == lead:
            if not bool((part == part[..., :1, :]).all()):
                return None
            part = part[..., 0, :]
        elif not heads and len(p.axes) > lead:
            part = part.reshape(*part.shape[:lead], -1, p.high - p.low)
        parts.append((p, part))
        said.append(f"{p.name} = [..., {f'{start}:{end}' if step == 1 else f'{len(said)}::2'}]")
        start = end
    what = f"taps side by side{', head by head' if heads else ''}" if len(parts) > 1 else "a part of a tap"
    return Found(parts, pick, f"{what}: record {', '.join(said)}")


def _joined(parts: list[tuple[Piece, Array, Pick]]) -> tuple[Array, Pick]:
    """A tap of its pieces, one beginning where the one before it ends, and which part of the tap that is."""
    parts = sorted(parts, key=lambda one: (one[0].low, -one[0].high))
    first, pick = parts[0][0], parts[0][2]
    arrays, high = [parts[0][1]], first.high
    for p, part, rows in parts[1:]:
        if p.low == high and rows == pick and part.dtype == arrays[0].dtype:
            arrays, high = [*arrays, part], p.high
    x = np.concatenate(arrays, axis=-1)
    return x, pick if (first.low, high) == (0, first.whole) else {**pick, x.ndim - 1: slice(first.low, high)}
