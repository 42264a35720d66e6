"""Finding a map's taps among the calls of one run: whoever can see calls (hooks, wrapped methods, a callback) tells a `Watch`
of them, and it keeps copies of the tensors that the map names. Nothing is refused: what is not there is said in the notes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint.header import DTYPES
from refimpl.diff import Case
from refimpl.diff.dims import Sizes, letters, size_of
from refimpl.diff.names import Framework
from refimpl.layers.stage import Stage

from .catalogue import entries
from .ranks import Spread, dims_of, spread_of
from .refimpl_tap import raw
from .tapmap import Part, Place, at_layer, used

Key = tuple[str, str]
"""(path of a module, function called while it runs, or "" for the module's own call)."""


def array(x: Any) -> Array:
    """A copy of any library's array, in its own dtype. TypeError for what is none."""
    bits = raw(x)
    return np.frombuffer(bits.data, DTYPES[bits.dtype]).reshape(bits.shape).copy()


class Watch:
    """The taps of a case that a map knows, and where each of them is looked for."""

    def __init__(self, map_: Framework, case: Case) -> None:
        self.config, self.sizes = case.config, Sizes.whole(len(case.tokens), len(case.tokens[0]))
        self.tokens = len(case.tokens) * len(case.tokens[0])
        self.places: dict[str, tuple[Stage, list[tuple[Place, list[Part]]]]] = {}  # tap -> its stage, its alternatives
        self.seen: dict[Part, Array] = {}
        self.spread: dict[Part, Spread] = {}  # of those that lie over ranks, how
        self.count: Counter[Key] = Counter()
        self.notes: dict[str, None] = {}
        self.axes: dict[str, str] = {}  # tap -> its axes, where the map declares them
        for tap, stage, i in taps_of(case):
            for places in used(map_, [tap.rpartition("/")[2]]).values():
                self.places[tap] = stage, [(p, [_at(part, map_.layer, i) for part in p.parts]) for p in places]
        self._wanted: dict[Key, list[Part]] = {}
        for part in dict.fromkeys(
            part for _, options in self.places.values() for _, parts in options for part in parts
        ):
            self._wanted.setdefault((part.path, part.function), []).append(part)

    @property
    def keys(self) -> list[Key]:
        """What has to be watched."""
        return list(self._wanted)

    def choose(self, has: Callable[[str], bool], paths: Iterable[str], what: str) -> None:
        """Drop alternatives whose modules the model lacks. SpecError if that leaves a tap without a place."""
        known = list(paths)
        for tap, (stage, options) in self.places.items():
            left = [(p, parts) for p, parts in options if all(has(part.path) for part in parts)]
            if not left:
                path = next(part.path for part in options[-1][1] if not has(part.path))
                raise SpecError(f"{what} has no module {path!r}, where the map looks for {tap}{_near(path, known)}")
            self.places[tap] = stage, left
        kept = {part for _, options in self.places.values() for _, parts in options for part in parts}
        self._wanted = {k: found for k, parts in self._wanted.items() if (found := [p for p in parts if p in kept])}

    def see(self, key: Key, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> None:
        """Be told of a call."""
        if key not in self._wanted:
            return
        self.count[key] += 1
        for part in self._wanted[key]:
            if part.nth == self.count[key]:
                try:
                    x = _pick(part, args, kwargs, out)
                    self.seen[part], spread = array(x), spread_of(x)
                    self.spread |= {part: spread} if spread else {}
                except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
                    self.notes[f"{_said(part)} is not there: {error}"] = None

    def fill(self, find: Callable[[Part], Array | None]) -> None:
        """Be told of all that a dump holds, instead of calls."""
        for part in [part for parts in self._wanted.values() for part in parts]:
            x = find(part)
            if x is not None:
                self.seen[part] = x

    def taps(self) -> dict[str, Array]:
        """What was seen, tap by tap, in the map's arrangement; and the notes say what was not."""
        found = {}
        for tap, (stage, options) in self.places.items():
            chosen = next(((p, parts) for p, parts in options if all(part in self.seen for part in parts)), None)
            if chosen is None:
                self.notes[f"{tap} was not seen at {' | '.join(p.text for p, _ in options)}"] = None
                continue
            numbers = letters(self.config, stage, tap, self.sizes)
            numbers["N"] = self.tokens
            if (spread := next((self.spread[p] for p in chosen[1] if p in self.spread), None)) is not None:
                found[tap] = self._shared(tap, stage, chosen, spread, numbers)
                continue
            x = _joined(chosen[0], [_cut(self.seen[part], part, numbers) for part in chosen[1]])
            found[tap] = self._shaped(tap, x, chosen[0], numbers)
        return found

    def _shared(
        self, tap: str, stage: Stage, chosen: tuple[Place, list[Part]], spread: Spread, numbers: dict[str, int]
    ) -> Array:
        """This rank's part of a tap, with dims that say which it is."""
        place, parts = chosen
        axes = (place.axes or stage.shape).split()
        dims = dims_of(spread, axes, numbers) if len(parts) == 1 and parts[0].cut == ("", "") else ""
        self.axes |= {tap: dims} if dims else {}
        if not dims:
            self.notes[f"{tap} lies over ranks in a way that its place does not tell: declare its dims"] = None
        return np.ascontiguousarray(self.seen[parts[0]])

    def _shaped(self, tap: str, x: Array, place: Place, numbers: dict[str, int]) -> Array:
        """x with the axes that the map declares; as it is where they do not fit."""
        shape = tuple([size_of(axis, numbers) for axis in place.axes.split()])
        if not shape or x.size == np.prod(shape):
            self.axes |= {tap: place.axes} if shape else {}
            return x.reshape(shape or x.shape)
        self.notes[f"{tap} has shape {x.shape}, where the map says {place.axes}, {shape}"] = None
        return x

    def repeated(self) -> list[str]:
        """A note on modules that ran more often than once, though the map says nothing of a second call."""
        once = [key for key, parts in self._wanted.items() if not key[1] and all(part.nth == 1 for part in parts)]
        more = sorted({re.sub(r"(?<!\w)\d+(?!\w)", "i", key[0]) for key in once if self.count[key] > 1})
        return [f"called more than once, the first call is kept: {', '.join(more)}"] if more else []


def taps_of(case: Case) -> list[tuple[str, Stage, int | None]]:
    """(tap, stage, layer) of all taps that a run of the main model can have, in either form of attention."""
    found: dict[str, tuple[Stage, int | None]] = {}
    for attend in ("expanded", "absorbed"):
        for e in entries(case.config, batch=len(case.tokens), length=len(case.tokens[0]), attend=attend, mtp=False):
            unit = re.fullmatch(r"fwd/L(\d+)/.+", e.tap)
            found.setdefault(e.tap, (e.stage, int(unit[1]) if unit else None))
    return [(tap, stage, i) for tap, (stage, i) in found.items()]


def _at(part: Part, below: str, i: int | None) -> Part:
    path = at_layer(part.path, below, i)
    return Part(path, part.function, part.nth, part.input, part.arg, part.item, part.cut)


def _pick(part: Part, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> Any:
    """The tensor of a call that a part names."""
    if part.input:
        if part.arg.isdigit():
            place = int(part.arg)
            out = args[place] if place < len(args) else list(kwargs.values())[place - len(args)]
        else:
            out = kwargs[part.arg]
    if not part.item:
        return out
    require(not hasattr(out, "shape"), "one array, not several")
    if part.item.isdigit():
        return out[int(part.item)]
    return out[part.item] if isinstance(out, Mapping) else getattr(out, part.item)


def _cut(x: Array, part: Part, numbers: Mapping[str, int]) -> Array:
    low, high = (size_of(side, numbers) if side else None for side in part.cut)
    return x[..., low:high]


def _joined(place: Place, found: list[Array]) -> Array:
    """Sum, computed in float32 and rounded to the recorded dtype, or concatenation along the last axis."""
    if len(found) == 1:
        return np.ascontiguousarray(found[0])
    if place.join == "cat":
        return np.concatenate(found, axis=-1)
    wide = [x.astype(np.result_type(np.float32, x.dtype)) for x in found]
    total: Array = sum(wide[1:], wide[0])
    return total.astype(found[0].dtype)


def _near(path: str, known: Sequence[str]) -> str:
    """The longest beginning of a path that there is, with what lies below it."""
    words = path.split(".")
    for n in range(len(words) - 1, -1, -1):
        head = ".".join(words[:n])
        if head in known or n == 0:
            prefix = f"{head}." if head else ""
            below = sorted({k[len(prefix) :].partition(".")[0] for k in known if k.startswith(prefix) and k != head})
            return f"; {head or 'the model'} has {', '.join(filter(None, below)) or 'nothing below it'}"
    return ""


def _said(part: Part) -> str:
    side = f"input {part.arg} of " if part.input else ""
    return f"{side}{_key_said((part.path, part.function))}" + (f"[{part.item}]" if part.item else "")


def _key_said(key: Key) -> str:
    return f"{key[1]} in {key[0]}" if key[1] else key[0]
