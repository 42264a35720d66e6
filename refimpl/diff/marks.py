"""How the ranks' arrays of a tap make one: the marks in its dims string, `H@tp` for split and `+tp` for a sum.

"B S H@tp Dn+Dr"   heads are split over the axis tp, and the array is whole along all other axes of ranks
"N@dp@sp D"        tokens over dp, and each share of them over sp
"N (H@tp Dv)"      heads and channels are one axis of the array, heads the outer part of it
"B S D +tp"        every rank of tp has a part of a sum, as behind a product by rows before its all-reduce
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from refimpl.autograd.errors import require

_TOKEN = re.compile(r"\([^()]*\)|[^\s()]+")


@dataclass(frozen=True)
class Marks:
    """along: (axis of ranks, axis of the array, None for a sum), outermost first; dims without marks; axes: how many the arrays
    have.
    """

    along: tuple[tuple[str, int | None], ...]
    dims: str
    axes: int

    @property
    def names(self) -> tuple[str, ...]:
        """The axes of ranks over which the tap is not the same."""
        return tuple([name for name, _ in self.along])


NONE = Marks((), "", 0)
"""Of a tap that is whole on every rank."""


def is_marked(dims: str) -> bool:
    """Whether a dims string says that ranks hold parts."""
    return "@" in dims or any(token.startswith("+") for token in dims.split())


def marks_of(dims: str) -> Marks:
    """Read a dims string. SpecError for an axis of ranks that is named twice, and for brackets that cannot be put together."""
    tokens, along, letters = _TOKEN.findall(dims), list[tuple[str, int | None]](), list[str]()
    require("".join(dims.split()) == "".join("".join(tokens).split()), f"dims {dims!r}: a bracket is open")
    axes = [t.strip("()").split() for t in tokens if not t.startswith("+")]
    for place, merged in enumerate(axes):
        for i, letter in enumerate(merged):
            name, *over = letter.split("@")
            require(name, f"dims {dims!r}: {letter!r} names no axis of the array")
            inner = (
                "an inner part of a merged axis is split, so shares do not lie one after the other; record it unmerged"
            )
            require(not over or i == 0, f"dims {dims!r}: {inner}")
            along += [(axis, place) for axis in over]
            letters.append(name)
    along += [(t[1:], None) for t in tokens if t.startswith("+")]
    names = [axis for axis, _ in along]
    require(all(names) and len(set(names)) == len(names), f"dims {dims!r}: each @ and + names another axis of ranks")
    return Marks(tuple(along), " ".join(letters), len(axes))
