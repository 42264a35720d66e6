"""Documents of any length into rows of one length (R 4.1: document packing, inspired by Ding et al. 2024, arXiv 2404.10830).

best_fit     a document longer than a row is cut into whole rows and a rest; then each piece, longest first, goes into the fullest
             row that has room for it. No document is cut that fits into a row; the ends of rows are padding
concatenate  one after the other, cut wherever a row ends; only the last row has padding
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array


class Piece(NamedTuple):
    """`length` tokens of a document from `start` on, which lie in row `row` from `at` on."""

    row: int
    at: int
    document: int
    start: int
    length: int


def best_fit(lengths: Sequence[int], row_length: int) -> list[Piece]:
    """Pieces by best-fit decreasing, in the order of rows. Among equal pieces the earlier document goes first, among rows with
    equal room the earlier row takes it.
    """
    whole = [(d, s, row_length) for d, n in enumerate(lengths) for s in range(0, n - row_length + 1, row_length)]
    rest = [(d, n - n % row_length, n % row_length) for d, n in enumerate(lengths) if n % row_length]
    found: list[Piece] = []
    rooms: list[int] = []  # the sizes of room that some row has, ascending
    rows: dict[int, list[int]] = {}  # size of room -> heap of the rows that have it
    n_rows = 0
    for document, start, length in sorted([*whole, *rest], key=lambda p: -p[2]):
        i = bisect_left(rooms, length)
        if i < len(rooms):
            room = rooms[i]
            row = heappop(rows[room])
            if not rows[room]:
                del rows[room], rooms[i]
        else:
            room, row, n_rows = row_length, n_rows, n_rows + 1
        found.append(Piece(row, row_length - room, document, start, length))
        if room > length:
            if room - length not in rows:
                insort(rooms, room - length)
            heappush(rows.setdefault(room - length, []), row)
    return sorted(found)


def concatenate(lengths: Sequence[int], row_length: int) -> list[Piece]:
    """Pieces of documents one after the other, cut at the ends of rows."""
    found, position = [], 0
    for document, n in enumerate(lengths):
        start = 0
        while start < n:
            at = position % row_length
            length = min(row_length - at, n - start)
            found.append(Piece(position // row_length, at, document, start, length))
            start, position = start + length, position + length
    return found


PACKINGS: Mapping[str, Callable[[Sequence[int], int], list[Piece]]] = {"best-fit": best_fit, "concatenate": concatenate}
"""The ways to pack, by name; the first is V3's."""


def lay_out(
    pieces: Sequence[Piece], documents: Sequence[Array], row_length: int, pad: int, dtype: str
) -> tuple[Array, Array]:
    """Pieces, documents (n,) each -> tokens (rows, S) with `pad` where no piece lies, spans (2, pieces): first and last + 1 of each
    piece, counted over all rows.
    """
    require(pieces, "no document has a token")
    tokens = np.full((pieces[-1].row + 1, row_length), pad, dtype)
    for p in pieces:
        tokens[p.row, p.at : p.at + p.length] = documents[p.document][p.start : p.start + p.length]
    first = np.array([p.row * row_length + p.at for p in pieces], np.int64)
    return tokens, np.stack([first, first + np.array([p.length for p in pieces], np.int64)])
