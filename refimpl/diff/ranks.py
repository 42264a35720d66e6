"""One trace of many: every rank of a parallel engine writes its own file, with the same tap names, and they are put together.

The header key `parallel` says which rank a file is of: {"rank": 3, "axes": {"tp": [1, 2], "dp": [1, 2]}}, by axis its coordinate
and the axis' size. The marks in a tap's dims (`marks`) say along which axes it is split, or a sum that is not yet taken; over all
others it is replicated, and the lowest rank that recorded it counts. Axes whose ranks are the same ones as another's (ep over tp
and dp) are declared as well, with `"ranks"`, the number of ranks, which else is the product of the sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array

from .header import Header, read_file
from .marks import Marks, is_marked, marks_of
from .numbering import as_ours, is_count
from .shards import Rank, Shards, place_of

UNITED = ("dims", "expected", "notes", "parallel", "self_check", "weights")
"""Header keys in which ranks may differ: each tells what it recorded, loaded and checked."""


def holds_parts(header: Header) -> bool:
    """Whether a trace holds parts of taps only, so that it cannot be read alone."""
    return any(map(is_marked, header.dims.values()))


def read_ranks(path: Path, files: Sequence[Path]) -> tuple[Header, Shards]:
    """The traces of all ranks as one. SpecError for a rank that is missing or twice there, and for headers that disagree."""
    read = [read_file(file) for file in files]
    with where(f"while reading trace {path}"):
        require(files, "no *.safetensors in this folder; a trace is a file, or a folder of all ranks' files")
        ranks = sorted([_rank(file, *one) for file, one in zip(files, read, strict=True)], key=lambda r: r.number)
        sizes = _sizes(ranks)
        _complete(ranks, sizes)
        header = _united(ranks)
        marks = {tap: _marks(tap, dims, sizes) for tap, dims in header.dims.items()}
        dims = {tap: m.dims for tap, m in marks.items()}
        return dataclasses.replace(header, dims=dims), Shards(ranks, sizes, marks)


def _marks(tap: str, dims: str, sizes: Mapping[str, int]) -> Marks:
    with where(f"in the dims of {tap}"):
        found = marks_of(dims)
        unknown = [a for a in found.names if a not in sizes]
        axes = ", ".join(sizes) or "none"
        require(not unknown, f"dims {dims!r} name the axis {unknown[:1]}; the axes of ranks are: {axes}")
        return found


def alone(header: Header) -> str:
    """Which of several ranks a header is of, in words; "" if of the only one. SpecError for a rank that cannot be."""
    if not header.parallel:
        return ""
    with where("in the header key 'parallel'"):
        number, at, total = _placed(header.parallel)
        require(number < total, f"rank is {number}, and there are {total}, counted from 0")
    sizes = {axis: pair[1] for axis, pair in header.parallel.get("axes", {}).items()}
    place = ", ".join([f"{axis} {i} of {sizes[axis]}" for axis, i in at.items()])
    return f"rank {number} of {total}{f' ({place})' if place else ''}" if total > 1 else ""


def _rank(path: Path, header: Header, taps: Mapping[str, Array]) -> Rank:
    header, taps = as_ours(header, taps)
    if is_count(header.layouts.get("layers", "")):  # each rank may have its own
        header = dataclasses.replace(header, layouts={k: v for k, v in header.layouts.items() if k != "layers"})
    require(header.parallel, f"{path.name} lacks the header key 'parallel', which says of which rank it is")
    with where(f"in the header key 'parallel' of {path.name}"):
        number, at, _ = _placed(header.parallel)
    return Rank(path, number, at, header, taps)


def _placed(p: Mapping[str, Any]) -> tuple[int, dict[str, int], int]:
    """A rank's number, its coordinate by axis, and how many ranks there are."""
    unknown = sorted(set(p) - {"rank", "ranks", "axes"})
    require(not unknown, f"unknown keys: {', '.join(unknown)}")
    number, axes = p.get("rank"), p.get("axes", {})
    require(type(number) is int and number >= 0, f"rank is {number!r}, expected a number from 0")
    require(isinstance(axes, dict), f"axes is {axes!r}, expected name -> [coordinate, size]")
    for axis, pair in axes.items():
        pairs = isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair)
        require(pairs and 0 <= pair[0] < pair[1] <= 1 << 20, f"axis {axis} is {pair!r}, expected [coordinate, size]")
    total = p.get("ranks", math.prod([size for _, size in axes.values()]))
    require(type(total) is int and total >= 1, f"ranks is {total!r}, expected how many there are")
    assert isinstance(number, int) and isinstance(total, int)
    return number, {axis: pair[0] for axis, pair in axes.items()}, total


def _sizes(ranks: Sequence[Rank]) -> dict[str, int]:
    """Axis -> size, the same in all headers."""
    told = [{axis: size for axis, (_, size) in r.header.parallel.get("axes", {}).items()} for r in ranks]
    for r, its in zip(ranks, told, strict=True):
        require(its == told[0], f"{ranks[0].path.name} and {r.path.name} declare axes {told[0]} and {its}")
        both = [x.header.parallel.get("ranks") for x in (ranks[0], r)]
        require(both[0] == both[1], f"{ranks[0].path.name} and {r.path.name} declare {both[0]} and {both[1]} ranks")
    return told[0]


def _complete(ranks: Sequence[Rank], sizes: Mapping[str, int]) -> None:
    """Every rank once, every coordinate once."""
    most = math.prod(sizes.values())
    total = ranks[0].header.parallel.get("ranks", most)
    axes = f"{total} ranks, but axes {sizes} tell {most} apart"
    require(total <= most, f"{axes}; name the axis in which the others differ")
    _once(ranks, [f"rank {r.number}" for r in ranks])
    _once(ranks, [place_of(r.at) for r in ranks])
    numbers, files = {r.number for r in ranks}, ", ".join(r.path.name for r in ranks[:8])
    missing = list(itertools.islice((str(i) for i in range(total) if i not in numbers), 8))
    require(
        not missing,
        f"rank {', '.join(missing)} of {total} is missing; there is {files}, and the folder of all ranks' files is wanted",
    )
    last = ranks[-1]
    require(len(ranks) == total, f"{last.path.name} is of rank {last.number}; there are {total}, counted from 0")
    for axis, size in sizes.items():
        there = {r.at[axis] for r in ranks}
        lost = next((i for i in range(size) if i not in there), None)
        require(lost is None, f"no rank is at {axis} {lost}, of {size}; there is {files}")


def _once(ranks: Sequence[Rank], names: Iterable[str]) -> None:
    seen: dict[str, Rank] = {}
    for r, name in zip(ranks, names, strict=True):
        other = seen.setdefault(name, r)
        require(other is r, f"{other.path.name} and {r.path.name} are both of {name or 'the only rank'}")


def _united(ranks: Sequence[Rank]) -> Header:
    """The one header: the same in all files but for what each rank tells of itself, which is put together."""
    first = ranks[0]
    for r in ranks[1:]:
        for f in dataclasses.fields(Header):
            if f.name not in UNITED:
                same = getattr(r.header, f.name) == getattr(first.header, f.name)
                require(
                    same, f"{first.path.name} and {r.path.name} declare different {f.name}; each tells of the whole run"
                )
    checks: dict[str, Any] = {}
    for r in ranks:
        checks |= {n: v for n, v in r.header.self_check.items() if v != 0 or n not in checks}
    return dataclasses.replace(
        first.header,
        expected=sorted({t for r in ranks for t in r.header.expected}),
        notes="\n".join(dict.fromkeys([r.header.notes for r in ranks if r.header.notes])),
        weights=_union(ranks, "weights", "digests of"),
        dims=_union(ranks, "dims", "dims of"),
        self_check=checks,
        parallel={},
    )


def _union(ranks: Sequence[Rank], key: str, what: str) -> dict[str, str]:
    """What all ranks declare by name; SpecError where two contradict each other."""
    found: dict[str, tuple[str, Rank]] = {}
    for r in ranks:
        for name, text in getattr(r.header, key).items():
            told, by = found.setdefault(name, (text, r))
            names = f"{by.path.name} and {r.path.name}"
            require(told == text, f"{names} declare different {what} {name}: {told!r} and {text!r}")
    return {name: text for name, (text, _) in found.items()}
