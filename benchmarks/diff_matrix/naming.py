"""Which known mistake (refimpl/diff/corpus) says what each bug of the matrix does, by patterns of its id; "dtype" where a narrower
dtype says it. Bugs that are not here are in no catalogue: what the diff says of them is fitted (refimpl/diff/fits).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_EPS = "A12-* N01-*"
_SAME = (
    "R01",
    "R02",
    "R03",
    "R04",
    "R07",
    "R08",
    "R10",
    "R12",
    "R13",
    "R14",
    "R17",
    "R18",
    "R20",
    "A04",
    "A09",
)
NAMES = {
    **{id: id for id in (*_SAME, "A10", "A11", "A13", "A17")},
    **{
        "R04-global": "R04c",
        "R05": "R05 dtype",
        "R06": "dtype",
        "R06-scores": "dtype",
        "R09": "R09b",
        "R09-router": "R09",
    },
    **{
        "R15": "R15 R15b*",
        "R16": "R17 R16",
        "X02": "R18",
        "X03": "X04",
        "X05": "X05",
        "X07": "X01",
        "X09": "X32",
        "X10": "X41",
    },
    **{
        "X11": "R10",
        "A05": "A05b",
        "A06": "A06 A06c",
        "A01-q": "A01q",
        "A01-k": "A01k",
        "A01-both": "A01-both",
        "A02": "A02*",
        "A12": _EPS,
        "A13-late": "A13d A13e",
    },
    **{"A14": "A14b", "A14-positions": "A14", "A17-next": "A17*", "Y01": "X10", "Y02": "X27k", "Y03": "X15"},
    **{
        "Y04": "X12-both",
        "Y05": "X16-*",
        "Y06": "X20",
        "Y07": "A13c",
        "Y09": "X25",
        "Y10": "X19",
        "Y11": "X17",
        "Y12": "X26",
    },
    **{"N01": _EPS, "N02": "N02-*", "N03": "N05-*", "N04": "N04-*", "N05": "N06*", "F01": "X30-*", "F02": "X30-*-4"},
    **{"F03": "X31-*", "S01": "X42", "S02": "X43", "E01": "X39", "E02": "X40", "W07": "N03-*"},
}

FITTED = {"R16": "experts chosen by every token: *"}
"""What no known mistake says of a bug of the catalogue that is two mistakes."""


def uniquely(entry: str, causes: list[list[str]]) -> bool:
    """Whether the causes, (ids, title) each, are one, and the right one. One that may be several mistakes is not."""
    found = {title: ids or _fitted(title) for ids, title in causes}
    patterns = NAMES[entry].split() + [p for id, p in FITTED.items() if id == entry]
    return len(found) == 1 and any(fnmatchcase(ids, p) for ids in found.values() for p in patterns)


def _fitted(title: str) -> str:
    """What stands for an id where there is none."""
    return "dtype" if title.startswith("these taps conform") else title


def among_like(entry: str, causes: list[list[str]]) -> bool:
    """Whether the cause is one that may be several mistakes, which compute the same numbers on this case; and it is among them."""
    found = {title: ids.split() for ids, title in causes}
    right = [any(fnmatchcase(i, p) for p in NAMES[entry].split()) for ids in found.values() for i in ids]
    return len(found) == 1 and all("the same numbers on this case" in title for title in found) and any(right)
