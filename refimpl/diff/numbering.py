"""How a trace counts layers, by its header: as we do, from 1, or from anywhere, as ranks of a pipeline count their own from 0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array

from .header import Header

LAYERS = ("from 0", "from 1", "residuals from 1")
"""What a header's `layouts` may say of layers, beside `L0 is L3`: theirs, and what it is of ours."""
_TAP = re.compile(r"(\w+/L)(\d{1,6})(/.*)")
_LAYER = re.compile(r"[^/]*/L(\d{1,6})\d*(/.*)?")
_LOCAL = re.compile(r"L(\d{1,6}) is L(\d{1,6})")


def as_ours(header: Header, taps: Mapping[str, Array]) -> tuple[Header, Mapping[str, Array]]:
    """Header and taps with layers counted as ours are, where the header says that they are not. SpecError if it has a layer less
    than 0 then.
    """
    told, h = header.layouts.get("layers", LAYERS[0]), header
    moved = {t: one for t in (*taps, *h.expected) if (one := renamed(t, told))}
    odd = next((t for t, one in moved.items() if "/L-" in one), "")
    require(not odd, f"layouts say that layers are counted {told!r}, and yet there is {odd}")
    if not moved:
        return header, taps
    layers, by = h.slices.get("layers"), _moved_by(told)
    if told != LAYERS[2] and isinstance(layers, list) and all(type(n) is not int or n + by >= 0 for n in layers):
        h = replace(h, slices=h.slices | {"layers": [n + by if type(n) is int else n for n in layers]})
    expected, rest = [moved.get(t, t) for t in h.expected], {t: d for t, d in h.dims.items() if t not in moved}
    dims = {one if (one := renamed(t, told)) and "/L-" not in one else t: d for t, d in rest.items()}
    dims |= {moved[t]: d for t, d in h.dims.items() if t in moved}
    return replace(h, expected=expected, dims=dims), {moved.get(t, t): taps[t] for t in taps}


def is_count(told: str) -> bool:
    """Whether a text says how layers are counted."""
    return told in LAYERS or bool(_LOCAL.fullmatch(told))


def layer_of(tap: str) -> int | None:
    """The number of the main model's layer that a tap is of, 3 of `fwd/L3/resid`; None for other names, whatever they are."""
    found = _LAYER.fullmatch(tap)
    return int(found[1]) if found else None


def _moved_by(told: str) -> int:
    """How many layers later ours is."""
    local = _LOCAL.fullmatch(told)
    return int(local[2]) - int(local[1]) if local else -1 if told in LAYERS[1:] else 0


def renamed(tap: str, told: str) -> str:
    """The tap's name as we count layers, "" if it is none of those that are counted otherwise."""
    found, by = _TAP.fullmatch(tap), _moved_by(told)
    meant = found and by and (told != LAYERS[2] or found[3] == "/resid")
    return f"{found[1]}{int(found[2]) + by}{found[3]}" if found and meant else ""
