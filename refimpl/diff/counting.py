"""Layers counted from 1: L1 to LN for our L0 to LN-1, in all taps or in the residual stream alone; declared, or told by value.
Or from anywhere, as ranks of a pipeline count their own from 0: `L0 is L3`.

Names allow that count only if nothing is of layer 0. Then it is tried: a bug is as far off under either count, a right layer
under another's name is off in all that it holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .numbering import LAYERS, as_ours, layer_of, renamed
from .trace import Trace

LEFT = 0.5
"""Of what is off, another reading must leave no more than this."""


def from_zero(trace: Trace) -> Trace:
    """The trace with layers counted as ours are, where its header says that they are not. SpecError if it has a layer 0."""
    header, taps = as_ours(trace.header, trace.taps)
    return trace if taps is trace.taps else Trace(header, taps)


def other_counts(trace: Trace) -> Iterator[tuple[Trace, dict[str, list[str]]]]:
    """The trace under every other count that its names allow; what to declare -> the taps. One layer alone need not tell
    (`_tells`).
    """
    if "layers" in trace.header.layouts:
        return
    for told in LAYERS[1:]:
        layers = {one.split("/")[1] for t in trace.taps if (one := renamed(t, told))}
        if layers and "L-1" not in layers and (len(layers) > 1 or _tells(trace, told)):
            yield counted(
                trace, told, f"{'layers' if told == LAYERS[1] else 'residuals'} are counted from 1, L1 is our L0"
            )


def _tells(trace: Trace, told: str) -> bool:
    """Whether one layer alone tells of its count: something of its inside was recorded, or something behind it. What a layer gives
    and nothing more may also be what the layer before gives, where one was left out.
    """
    moved = [t for t in trace.taps if renamed(t, told)]
    last = max([layer_of(t) or 0 for t in moved])
    others = [t for t in trace.taps if t not in moved]
    behind = any(t.partition("/")[2] in ("final_norm", "logits") or (layer_of(t) or 0) > last for t in others)
    return behind or not all(t.endswith("/resid") for t in moved)


def counted(trace: Trace, told: str, what: str) -> tuple[Trace, dict[str, list[str]]]:
    """The trace under a count that it does not declare; what to declare -> the taps."""
    other = from_zero(Trace(replace(trace.header, layouts={"layers": told}), trace.taps))
    moved = [one for t in trace.taps if (one := renamed(t, told))]
    found = Trace(replace(other.header, layouts=trace.header.layouts), other.taps)
    return found, {f'{what}: declare layouts {{"layers": "{told}"}}': moved}
