"""Values of a recipe file, each checked, with what was probably meant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from refimpl.autograd.errors import SpecError, require

from .amounts import amount


def known_keys(d: Mapping[str, Any], keys: Sequence[str] | set[str], what: str) -> None:
    """SpecError for a key that is none of `keys`, with the one that was probably meant."""
    for key in d:
        if key not in keys:
            near = get_close_matches(key, list(keys), n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(sorted(keys))}"
            raise SpecError(f"unknown key {key!r} in {what}; {hint}")


def tables(value: Any) -> bool:
    """Whether it is a list of tables."""
    return isinstance(value, list) and all(isinstance(v, Mapping) for v in value)


def number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def whole(d: Mapping[str, Any], key: str, default: int) -> int:
    """The whole number under a key, at least 1. SpecError for what is none."""
    n = amount(d.get(key, default))
    require(n.denominator == 1 and n >= 1, f"{key} is {d.get(key)!r}; expected a whole number of at least 1")
    return int(n)


def text(d: Mapping[str, Any], key: str) -> str:
    """The text under a key. SpecError for what is none, or empty."""
    value = d.get(key)
    if not isinstance(value, str) or not value:
        raise SpecError(f"{key} is {value!r}; expected a text")
    return value
