"""One vector: what a call is given and gives, how it is judged, and what a second computation says of it."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.conformance.stages import arguments
from refimpl.diff.compare import Units
from refimpl.diff.fp8_taps import stored
from refimpl.diff.lanes import Lane
from refimpl.diff.replay import Step, replay
from refimpl.layers.fp8 import Fp8
from refimpl.layers.fp8_parts import CODES
from refimpl.layers.precision import FLOAT64
from refimpl.layers.stage import Call

from .limits import limits
from .read_vectors import dot_of
from .runs import NUDGE, Ground
from .second import second

AGREE = 1e-9
"""How far the second computation may be from the first, of a row's norm: sums in another order, slopes."""
SLOPE = 1e-6
"""The same of a slope, of the sum of its terms' sizes."""


@dataclass
class Store:
    """Arrays by their content: each is written once, into the file of the run that has it first. `runs`: a digest of all that a
    run's vectors say but limits, wherever its arrays are written.
    """

    files: dict[str, dict[str, Array]] = field(default_factory=dict)
    known: dict[str, tuple[str, str]] = field(default_factory=dict)

    runs: dict[str, Any] = field(default_factory=dict)

    def put(self, a: Array, file: str, name: str) -> dict[str, Any]:
        """A reference to an array, which is in the file from now on if it is in none."""
        key = hashlib.sha256(f"{a.dtype} {a.shape}".encode() + np.ascontiguousarray(a).tobytes()).hexdigest()
        self.note(file, f"{name} {key}")
        if key not in self.known:
            self.known[key] = (file, name)
            self.files.setdefault(file, {})[name] = a
        file, name = self.known[key]
        return {"file": file, "name": name}

    def note(self, file: str, text: str) -> None:
        """Put words into the digest of a run."""
        self.runs.setdefault(file, hashlib.sha256()).update(text.encode())


def narrow(a: Any) -> Array:
    """An input in the narrowest dtype that holds every number of it: bfloat16, float32; integers in int32."""
    kept = stored_as(a)
    assert np.array_equal(kept.astype(np.float64), np.asarray(a).astype(np.float64)), "an input has to be exact"
    return kept


def stored_as(a: Any) -> Array:
    """In float32, or shorter where nothing is lost."""
    a = np.asarray(a)
    if a.dtype.kind in "iub":
        return a.astype(np.int32)
    if a.dtype == ml_dtypes.float8_e4m3fn:
        return a
    a = a.astype(np.float32)
    short = a.astype(ml_dtypes.bfloat16)
    return short if np.array_equal(short.astype(np.float32), a) else a


def vectors_of(run: str, file: str, g: Ground, names: Mapping[str, str], store: Store) -> Iterator[dict[str, Any]]:
    """The vectors of one run, the calls of these taps, by their names."""
    for step in replay(g.program, g.recorded):
        if (name := names.get(step.call.tap)) and step.call.of.compare != "given":
            yield _vector(run, name, step, g, _Writer(store, file, g))


@dataclass(frozen=True)
class _Writer:
    """Puts the arrays of a run's vectors into the store."""

    store: Store
    file: str
    g: Ground

    def put(self, a: Any, name: str) -> Any:
        """A reference; of a list one for each; None and numbers as they are."""
        if isinstance(a, list | tuple):
            return [self.put(x, f"{name}.{i}") for i, x in enumerate(a)]
        if a is None or isinstance(a, float):
            return a
        return self.store.put(narrow(a), self.file, name)

    def expected(self, a: Array, name: str) -> Any:
        """A reference to what is expected, rounded to float32."""
        return self.store.put(stored_as(a * NUDGE if a.dtype == np.float64 else a), self.file, name)

    def inputs(self, call: Call, prefix: str) -> dict[str, Any]:
        """Arguments and settings of a call."""
        given, settings = arguments(call, self.g.recorded, FLOAT64)
        if call.stage == CODES or call.own is not None:  # codes, as codes
            given |= {k: stored(CODES, v) for k, v in given.items() if k == "codes"}
        told = {k: plain(v) for k, v in settings.items() if k != "readers"}
        self.store.note(self.file, f"{call.stage} {sorted(told.items())}")
        return {"inputs": {k: self.put(v, f"{prefix}/{k}") for k, v in given.items()}, "settings": told}


def plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, Fp8):
        return {"activations": vars(value.inputs), "weights": vars(value.weights), "accumulation": value.mode}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _vector(run: str, name: str, step: Step, g: Ground, to: _Writer) -> dict[str, Any]:
    call, id = step.call, f"{run}/{name}"
    unit = g.precision.unit(call.tap)
    e, told = checked(id, step, g)
    entry: dict[str, Any] = {"id": id, "stage": call.stage, "equation": call.of.eq, "tap": call.tap}
    entry |= _gradient(call, name, to) if _is_gradient(call) else to.inputs(call, name)
    entry["expected"] = to.expected(stored(CODES, e) if call.stage == CODES else e, f"{name}/expected")
    return entry | limits(step, Units(unit, unit, (call.stage,))) | {"second": told}


def _is_gradient(call: Call) -> bool:
    return "readers" in call.static


def _gradient(call: Call, prefix: str, to: _Writer) -> dict[str, Any]:
    """Every stage that reads the quantity, and in which of its arguments."""
    parts, name, lane = [], call.static["name"], Lane(FLOAT64)
    for i, (reader, given) in enumerate(zip(call.static["readers"], call.args, strict=True)):
        at = f"{prefix}/{i}.{reader.stage}"
        dy = lane.value(given[len(reader.args)], call, to.g.recorded)
        told = {"stage": reader.stage, **to.inputs(reader, at), "by": list(_places(reader, name))}
        parts.append(told | {"gradient": to.put(dy, f"{at}/gradient")})
    return {"parts": parts}


def _places(reader: Call, name: str) -> Iterator[str]:
    """The arguments of a reader that the name stands in."""
    names = list(inspect.signature(reader.of.fn).parameters.values())
    starred = next((i for i, p in enumerate(names) if p.kind is p.VAR_POSITIONAL), len(names))
    for i, arg in enumerate(reader.args):
        own = names[min(i, starred)].name if i < starred else f"{names[starred].name}[{i - starred}]"
        if isinstance(arg, tuple):
            yield from (f"{own}[{k}]" for k, n in enumerate(arg) if n == name)
        elif arg == name:
            yield own


def checked(id: str, step: Step, g: Ground) -> tuple[Array, dict[str, Any]]:
    """What a call gives, by the computation whose sums have no order, and what is left of the other in the index. SpecError if the
    two contradict each other.
    """
    e = np.asarray(step.exact, np.float64)
    how, other = second(step.call, g.recorded)
    if isinstance(other, float):
        ours, terms = dot_of(e)
        require(abs(other - ours) <= SLOPE * max(terms, 1e-30), f"{id}: slope {other!r}, the gradient says {ours!r}")
        return _without_noise(e), _left(how, other, terms, SLOPE * terms)
    require(other.shape == e.shape, f"{id}: the second computation gives shape {other.shape}, the first {e.shape}")
    masked = np.isneginf(e) & np.isneginf(other)
    a, b = (np.atleast_1d(np.where(masked, 0, x)) for x in (e, other))
    size = np.sqrt((a * a).sum(axis=-1, keepdims=True))
    far = np.abs(a - b) > AGREE * (size + 1e-3 * size.max(initial=0))
    require(not far.any(), f"{id}: {int(far.sum())} of {e.size} numbers differ from the second computation")
    ours, terms = dot_of(e)
    return other, _left(how, ours, terms, 2 * AGREE * terms)


def _left(how: str, dot: float, terms: float, off: float) -> dict[str, Any]:
    bound = 2.0**-23 * terms + off + 1e-8 * abs(dot)
    return {"how": how, "dot": float(f"{dot:.8e}"), "bound": float(f"{bound:.1e}")}


def _without_noise(e: Array) -> Array:
    """With 0 for what is left of a sum that cancels."""
    rows = np.atleast_1d(e)
    return np.where(np.abs(rows) < 2.0**-46 * np.abs(rows).max(axis=-1, keepdims=True, initial=0), 0, rows).reshape(
        e.shape
    )
