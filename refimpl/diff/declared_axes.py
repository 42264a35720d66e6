"""The axes that a header's `dims` give a tap, held against its array: letters that mean something there, in the array's order.

A declaration is true if the array has its sizes, axes merged or cut as everywhere; it contradicts the array if it has not and the
array is read without it. Where nothing can be made of the array, that is the candidate's fault, and left to the judgement.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from refimpl.autograd.errors import require
from refimpl.layers.stage import Call

from .dims import size_of
from .marks import is_marked, marks_of
from .reading import Reading, coarser, read, unflattened

_TERM = re.compile(r"(?:\d{1,6})?(?:[A-Z][a-z]?)(?:[+*-]\w{1,6})?(?:/[1-9]\d{0,5})?|\d{1,6}")
_LETTER = re.compile(r"[A-Z][a-z]?")
_COUNTED = {"B", "S", "T", "N", "H", "K", "E", "M"}
"""Letters of what there may be any number of, in an array of any tap: `B S H Dr` of keys that were repeated for every head."""
_CUT = {"B", "S", "S-k", "T", "N", "H", "K", "E", "M", "V"}
"""Axes that may have other lengths than declared, and be meant: padding, parts of a run, rows of no token, a padded vocabulary."""


def terms_of(dims: str) -> list[str]:
    """The terms of a dims string, without marks and brackets. SpecError for brackets, and an axis that is there twice."""
    require(not is_marked(dims), f"dims {dims!r} say that ranks hold parts; the folder of all ranks' files is wanted")
    terms = marks_of(dims).dims.split()
    twice = next((t for i, t in enumerate(terms) if t in terms[:i] and not t.isdigit()), "")
    require(not twice, f"dims {dims!r}: {twice} is there twice; each axis has a letter of its own")
    return terms


def check_number(dims: str, terms: Sequence[str], shape: Sequence[int], *, known: bool) -> None:
    """SpecError for brackets that are not the array's axes; for fewer axes than it has, where nothing else is known of it."""
    axes, told = marks_of(dims).axes, f"dims {dims!r} are of %d axes, and the array is {_by(shape)}"
    require("(" not in dims or axes == len(shape), told % axes)
    long = [n for n in shape if n != 1]
    require(known or len(terms) >= len(long), told % len(terms))


def check_letters(dims: str, terms: Sequence[str], axes: Sequence[str]) -> None:
    """SpecError for letters that mean nothing at a tap of these axes."""
    require(terms or not axes, f"dims {dims!r} name no axes; expected an order of {' '.join(axes)}")
    own = {letter for axis in axes for letter in _LETTER.findall(axis)}
    expected = f"its axes are {' '.join(axes) or 'none'}, in any order, N for B S flattened"
    for term in terms:
        letters = _LETTER.findall(term)
        known = term in axes or (_TERM.fullmatch(term) and set(letters) <= own | _COUNTED)
        require(known, f"dims {dims!r}: {term!r} is no axis of this tap; {expected}")
    both = {"N"} <= set(terms) and {"B", "S", "T"} & set(terms) and "N" not in axes
    require(not both, f"dims {dims!r}: N stands for B S flattened, and one of these is there too")


def check_sizes(
    dims: str,
    terms: list[str],
    shape: tuple[int, ...],
    call: Call,
    numbers: Mapping[str, int],
    part: Mapping[str, list[int]],
) -> None:
    """SpecError where an array has not the sizes that its dims have here and can be read without them."""
    axes = call.of.shape.split()
    opened = unflattened(terms, axes)
    if not all(t in axes or set(re.findall(r"[A-Za-z]+", t)) <= set(numbers) for t in opened):
        return
    sizes = [size_of(t, numbers) for t in opened]
    if any(coarser(shape, some) for some in _sizes(opened, sizes, part)):
        return
    found = as_read(shape, call, numbers, part)
    if found is None:
        return
    whole = not found.pick and found.array.size == math.prod(shape)
    stretched = len(shape) == len(opened) and all(
        a == b or t in _CUT for a, b, t in zip(shape, sizes, opened, strict=True)
    )
    ours = not whole and opened == axes  # padded, or a part: in our order, as declared
    fits = found.note or f"that is {' '.join(axes)}"
    told = f"dims {dims!r} are {_by(sizes)} here, and the array is {_by(shape)}"
    require(ours or (stretched and not whole), f"{told}; {fits}")


def as_read(
    shape: tuple[int, ...],
    call: Call,
    numbers: Mapping[str, int],
    part: Mapping[str, list[int]],
    dims: str | None = None,
) -> Reading | None:
    """How an array of that shape is read at a tap; None if it is not."""
    axes = call.of.shape.split()
    full = tuple([size_of(axis, numbers) for axis in axes])
    return read(np.broadcast_to(np.zeros((), bool), shape), full, axes, dims, part)


def _sizes(
    terms: Sequence[str], sizes: Sequence[int], part: Mapping[str, list[int]]
) -> itertools.product[tuple[int, ...]]:
    """The sizes of the whole and of every part that was declared."""
    return itertools.product(*[{n, len(part[t])} if t in part else {n} for t, n in zip(terms, sizes, strict=True)])


def _by(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "one number"
