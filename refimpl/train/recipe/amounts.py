"""Amounts as people write them: "14.8T" tokens, exactly."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from refimpl.autograd.errors import SpecError, require

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}

LARGEST = 10**30
_LONG = re.compile(r"[eE][+-]?0*\d{3,}$")
"""Exponents whose number alone would fill the memory."""


def amount(value: Any) -> Fraction:
    """14_800, 2.5e9 or "14.8T" -> the exact number (a decimal fraction is taken as written, not as binary).

    >>> amount("14.8T") == amount("10T") + amount("4.3T") + amount("333B") + amount("167B")
    True

    SpecError for anything else, negative and not finite numbers and those above LARGEST included.
    """
    text = value.strip() if isinstance(value, str) else value
    if isinstance(text, str):
        unit = text[-1:].upper() if text[-1:].isalpha() else ""
        number: Any = text[: len(text) - len(unit)].replace("_", "")
    else:
        unit, number = "", None if isinstance(text, bool) else text
    try:
        found = Fraction(-1) if _LONG.search(str(number)) else Fraction(str(number)) * _UNITS[unit]
    except (ValueError, KeyError, ZeroDivisionError):
        found = Fraction(-1)
    if found < 0:
        raise SpecError(
            f'{value!r} is no amount; expected a number of at least 0, or text such as "14.8T", "333B", "4K"'
        )
    require(found <= LARGEST, f"{value!r} is too large for an amount; at most {LARGEST:.0e}")
    return found


def shown(value: float) -> str:
    """469_000_000_000 -> "469B"; what is not short in a unit gets four digits.

    >>> [shown(n) for n in (0, 960, 14_800_000_000_000, 62_914_560)]
    ['0', '960', '14.8T', '62.91M']
    """
    unit = max((u for u in _UNITS if value >= _UNITS[u]), key=lambda u: _UNITS[u], default="")
    return f"{value / _UNITS[unit]:.4g}{unit}"
