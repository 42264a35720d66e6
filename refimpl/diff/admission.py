"""Which recorded taps a stage can be replayed on, in our axes and layout; and for each of the others what is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from refimpl.autograd.errors import SpecError
from refimpl.autograd.tensor import Array
from refimpl.layers.config import Config
from refimpl.layers.stage import STAGES, Call

from .compare import unusable
from .dims import shape_of
from .gauges import ROPE_TAPS, swap_pairs
from .program import integers
from .reading import read
from .tolerance import MASKED
from .trace import Trace

KNOWN = {"rope": ("interleaved", "half"), "mla": ("expanded", "absorbed", "auto")}


@dataclass
class Admitted:
    """taps in our axes; `rows` of those that hold a part of the sequence; flawed: tap -> why; notes: what was done -> taps."""

    taps: dict[str, Array] = field(default_factory=dict)
    rows: dict[str, slice] = field(default_factory=dict)
    flawed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def admit(program: list[Call], trace: Trace, c: Config, run: tuple[int, ...]) -> Admitted:
    """Read every tap of the program that the trace holds. run: (B, S)."""
    found, limits = Admitted(), {"router.ids": c.n_routed_experts, "router.groups": c.n_group}
    for call in program:
        if call.tap not in trace.taps:
            continue
        x, stage = np.asarray(trace.taps[call.tap]), STAGES[call.stage]
        shape = shape_of(call, c, batch=run[0], length=run[1])
        note = unusable(x, integers(stage), limits.get(call.stage))
        reading = None if note else read(x, shape, stage.shape.split(), trace.header.dims.get(call.tap))
        if reading is None:
            found.flawed[call.tap] = note or f"shape {x.shape}, expected {shape}"
            continue
        if reading.note:
            found.notes.setdefault(reading.note, []).append(call.tap)
        if reading.rows is not None:
            found.rows[call.tap] = reading.rows
        x = reading.array.astype(np.int64) if integers(stage) else reading.array
        found.taps[call.tap] = _canonical(call, x, trace.header.layouts, c)
    return found


def check_layouts(layouts: Mapping[str, str]) -> None:
    """SpecError for a declared layout that does not exist."""
    for key, value in layouts.items():
        if value not in KNOWN.get(key, (value,)):
            raise SpecError(f"layout {key}={value!r}; known: {', '.join(KNOWN[key])}")


def _canonical(call: Call, x: Array, layouts: Mapping[str, str], c: Config) -> Array:
    """The tap in our layout: rotated channels in the order of the config's pairs, a finite mask as -inf.

    transformers reads interleaved pairs and writes the two halves one after the other; the same permutation of q and
    k leaves every score as it is, so this is a layout, not a bug (DeepSeek-V3 #938, transformers #39687).
    """
    if call.stage == "mask":
        return np.where(x.astype(np.float32) < MASKED, np.asarray(-np.inf, x.dtype), x)
    ours = "interleaved" if c.rope_interleave else "half"
    theirs = layouts.get("rope", ours)
    if theirs == ours or call.tap.rpartition("/")[2] not in ROPE_TAPS:
        return x
    return swap_pairs(x, to_interleaved=ours == "interleaved")
