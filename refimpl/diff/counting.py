"""Layers counted from 1: L1 to LN for our L0 to LN-1, in all taps or in the residual stream alone; declared, or told by value.

Names allow that count only if nothing is of layer 0. Then it is tried: a bug is as far off under either count, a right layer
under another's name is off in all that it holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from refimpl.autograd.errors import require

from .trace import Trace

LAYERS = ("from 0", "from 1", "residuals from 1")
"""What a header's `layouts` may say of layers."""
LEFT = 0.5
"""Of what is off, another reading must leave no more than this."""
_TAP = re.compile(r"(\w+/L)(\d{1,6})(/.*)")


def from_zero(trace: Trace) -> Trace:
    """The trace with layers counted as ours are, where its header says that they are not. SpecError if it has a layer 0."""
    told, h = trace.header.layouts.get("layers", LAYERS[0]), trace.header
    moved = {t: one for t in (*trace.taps, *h.expected) if (one := _earlier(t, told))}
    odd = next((t for t, one in moved.items() if "/L-" in one), "")
    require(not odd, f"layouts say that layers are counted {told!r}, and yet there is {odd}")
    if not moved:
        return trace
    layers = h.slices.get("layers")
    if told == "from 1" and isinstance(layers, list) and 0 not in layers:
        h = replace(h, slices=h.slices | {"layers": [n - 1 if type(n) is int else n for n in layers]})
    expected, dims = [moved.get(t, t) for t in h.expected], {moved.get(t, t): d for t, d in h.dims.items()}
    return Trace(replace(h, expected=expected, dims=dims), {moved.get(t, t): trace.taps[t] for t in trace.taps})


def _earlier(tap: str, told: str) -> str:
    """The tap's name one layer earlier, "" if it is none of those that are counted so."""
    found = _TAP.fullmatch(tap)
    meant = found and (told == LAYERS[1] or (told == LAYERS[2] and found[3] == "/resid"))
    return f"{found[1]}{int(found[2]) - 1}{found[3]}" if found and meant else ""


def other_counts(trace: Trace) -> Iterator[tuple[Trace, dict[str, list[str]]]]:
    """The trace under every other count that its names allow; what to declare -> the taps. One layer alone tells of no count: it
    may be that one was left out.
    """
    if "layers" in trace.header.layouts:
        return
    for told in LAYERS[1:]:
        moved = [one for t in trace.taps if (one := _earlier(t, told))]
        layers = {one.split("/")[1] for one in moved}
        if len(layers) > 1 and "L-1" not in layers:
            what = f"{'layers' if told == LAYERS[1] else 'residuals'} are counted from 1, L1 is our L0"
            other = from_zero(Trace(replace(trace.header, layouts={"layers": told}), trace.taps))
            yield (
                Trace(replace(other.header, layouts=trace.header.layouts), other.taps),
                {f'{what}: declare layouts {{"layers": "{told}"}}': moved},
            )
