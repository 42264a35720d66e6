"""In which dtype a candidate keeps each tap: what its header declares, what its arrays are, what their values betray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array
from refimpl.layers.precision import FLOAT32, Plan, plan
from refimpl.layers.stage import STAGES, Call, tap_matches

from .lse import LSE
from .reading import narrow_formats
from .tolerance import UNIT
from .trace import Header
from .training import optimizer_storage

MOST = 0.8
"""Share of the taps that tell (`_tells`) which must hold a narrower dtype's values for a float32 trace to be one of that dtype."""
_PLANS = {"bfloat16": "bf16"}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
GENERAL = ("storage", "accumulate")
"""Keys of `precision` that are no patterns of taps."""
_BF16 = plan("bf16")
_KNOWN = {stage.tap for stage in STAGES.values()}


@dataclass(frozen=True)
class Precision:
    """`storage` of the run as a whole, `parts` (pattern -> storage) where it is declared apart, `seen` the dtype by tap of what
    was recorded; `note` says if the storage was found rather than declared.
    """

    storage: str
    parts: Mapping[str, str]
    seen: Mapping[str, str]
    note: str = ""

    @cached_property
    def plan(self) -> Plan:
        """The precision plan of the twins: storage "float32", "bfloat16", "float64" or a plan's name; float16 runs as float32
        whose values are moved as float16's would be.
        """
        with where("in the trace header's precision"):
            return FLOAT32 if self.storage == "float16" else plan(_PLANS.get(self.storage, self.storage))

    def declared(self, tap: str) -> str:
        """The storage of a tap that was not recorded."""
        return self._part(tap) or {"bf16": "bfloat16", "fp8": "bfloat16"}.get(
            self.plan.name.partition("_")[0], self.storage
        )

    def unit(self, tap: str) -> float:
        """The roundoff of what a tap is kept in: as recorded, but not coarser than the run is declared to be, unless the tap
        itself is declared apart.
        """
        own, part = UNIT.get(self.seen.get(tap, ""), 0.0), self._part(tap)
        declared = UNIT.get(self.declared(tap), UNIT["float32"])
        summed = tap.startswith("grad/")  # accumulated in float32 (R 3.3.3) from backward values that were not kept so
        return declared if part or not own or summed else min(own, declared)

    def _part(self, tap: str) -> str | None:
        return next((s for pattern, s in self.parts.items() if meant_by(tap, pattern)), None)

    def format(self, call: Call) -> str:
        """The format that a twin's output is rounded to."""
        if call.tap in self.seen or self._part(call.tap):
            return "bf16" if self.unit(call.tap) == UNIT["bfloat16"] else "fp32"
        return self.plan.format(call.stage)


def declared_storage(key: str, told: str) -> str:
    """The dtype's name, which may be told as a plan's; one of eight bits is coarser than what is held to its own codes."""
    name = _SHORT.get(told, told)
    known = name in UNIT or name.startswith("float8")
    require(known, f"in the trace header: precision {key}={told!r}; known: {', '.join([*UNIT, *_SHORT])}")
    return name


def _tells(tap: str) -> bool:
    """Whether a tap tells in which dtype a run is kept: no table, score, weight of the router or gradient of a weight, which every
    run keeps in float32, and not the embedding, which holds values of the weights.
    """
    name = tap.rpartition("/")[2]
    return name != "embed" and not tap.startswith("grad/") and not (name in _KNOWN and _BF16.format(name) == "fp32")


def meant_by(tap: str, pattern: str) -> bool:
    """Whether a tap fits a pattern, which may leave out the phase, or be of the last part of a name alone (`moe.*`)."""
    return tap_matches(tap, pattern) or ("/" not in pattern and tap_matches(tap.rpartition("/")[2], pattern))


def declared_precision(told: Mapping[str, str]) -> Precision:
    """What a header's `precision` says by itself, of a run of which nothing was recorded."""
    return precision_of(Header({}, [], precision=dict(told)), {})


def precision_of(header: Header, taps: Mapping[str, Array]) -> Precision:
    """What the header declares, corrected where arrays or values say otherwise: bfloat16 or float16, also in float32 arrays.
    SpecError for a dtype that is none.
    """
    parts = {k: declared_storage(k, v) for k, v in header.precision.items() if k not in GENERAL} | optimizer_storage(
        header
    )
    declared_storage("accumulate", header.precision.get("accumulate", "float32"))
    told, note = header.precision.get("storage", "float32"), ""
    storage = _SHORT.get(told, told)
    floats = {t: np.asarray(a) for t, a in taps.items() if a.dtype == np.float32}
    fit, narrow = {t: narrow_formats(a) for t, a in floats.items()}, ("bfloat16", "float16")
    held = {name: {t for t, formats in fit.items() if name in formats} for name in narrow}
    telling = [t for t, a in taps.items() if a.dtype.name in ("float32", *narrow) and _tells(t)]
    for name in narrow if storage in ("float32", *narrow) else ():
        kept = [t for t in telling if taps[t].dtype.name == name]
        if name != storage and kept and len(kept) >= MOST * len(telling):
            storage, note = name, f"{len(kept)} taps are {name} arrays: declare storage {name}"
            break
    if storage == "float32":
        for name, of_it in held.items():
            found = of_it & set(telling)
            if found and len(found) >= MOST * len(floats.keys() & set(telling)):
                storage, note = name, f"every value of {len(found)} taps is a {name}: declare storage {name}"
                break
    seen = {t: storage if t in held.get(storage, ()) else np.asarray(a).dtype.name for t, a in taps.items()}
    seen = {
        t: s for t, s in seen.items() if not t.endswith(f"/{LSE}")
    }  # as coarse as the scores behind it, not as its array
    return Precision(storage, parts, seen, note)
