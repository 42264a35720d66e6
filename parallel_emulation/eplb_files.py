"""Files of expert loads and of expert maps, as EPLB, SGLang, vLLM and vLLM-Ascend write them.

Loads (L, E) or (steps, L, E), summed then: .npy, .csv (a line a layer), .json (the array, or under `loads`, `weight`, or
SGLang's `logical_count`). Maps: .json or .npz with any of

| name | also called | shape |
|---|---|---|
| phy2log | physical_to_logical_map | (L, R): expert in each slot |
| log2phy | logical_to_physical_map, logical_to_all_physical_map | (L, E, X): slots of each expert, -1 beyond |
| logcnt | logical_replica_count | (L, E): replicas of each expert |
| expert_maps | expert_map | (L, W, E): for each rank, where an expert is among its own slots, -1: not there |

or vLLM-Ascend's `layer_list` of `device_list` of `device_expert` (the experts of each device: a phy2log). Without its
layer axis a map is one layer's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import SpecError, require, where

from .eplb import Ints

LOADS = ("loads", "weight", "logical_count")
NAMES = {
    "phy2log": ("phy2log", "physical_to_logical_map"),
    "log2phy": ("log2phy", "logical_to_physical_map", "logical_to_all_physical_map"),
    "logcnt": ("logcnt", "logical_replica_count"),
    "expert_maps": ("expert_maps", "expert_map"),
}
"""Field of Maps -> what files call it."""
_AXES = {"phy2log": 2, "log2phy": 3, "logcnt": 2, "expert_maps": 3}


@dataclass(frozen=True)
class Maps:
    """What somebody says of where the experts are; shapes above. Nothing is checked but that these are whole numbers."""

    phy2log: Ints | None = None
    log2phy: Ints | None = None
    logcnt: Ints | None = None
    expert_maps: Ints | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Maps:
        """From arrays or lists under any of the names. SpecError for none of them, and for what is no array of whole numbers."""
        if "layer_list" in given:
            return cls(phy2log=_ascend(given))
        found = {f: given[name] for f, names in NAMES.items() for name in names if name in given}
        places = [n for f in ("phy2log", "log2phy", "expert_maps") for n in NAMES[f]]
        require(bool(found.keys() - {"logcnt"}), f"no expert map; expected one of {', '.join(places)}, layer_list")
        return cls(**{f: _whole(f, value) for f, value in found.items()})


def read_loads(path: Path) -> NDArray[Any]:
    """(L, E) numbers from a .npy, .csv or .json file.  SpecError for anything else; what loads may be `rebalance_experts` says."""
    with where(f"in {path}"):
        if path.suffix == ".json":
            value = _json(path)
            if isinstance(value, dict):
                names = [n for n in LOADS if n in value]
                require(bool(names), f"an object without {' or '.join(LOADS)}")
                value = value[names[0]]
            loads = _array("loads", value)
        elif path.suffix == ".csv":
            loads = _csv(path)
        else:
            require(path.suffix == ".npy", "loads are read from .json, .csv and .npy files")
            loads = _load(path)
        require(loads.dtype.kind in "iuf", f"loads are {loads.dtype}; expected numbers")
        require(loads.ndim in (2, 3), f"loads have shape {loads.shape}; expected (layers, experts), or steps of them")
        return loads if loads.ndim == 2 else np.asarray(loads.sum(axis=0))


def read_maps(path: Path) -> Maps:
    """The maps in a .json or .npz file.  SpecError for anything else."""
    with where(f"in {path}"):
        if path.suffix == ".npz":
            return Maps.of(_load(path))
        require(path.suffix == ".json", "maps are read from .json and .npz files")
        value = _json(path)
        if not isinstance(value, dict):
            raise SpecError(f"a {type(value).__name__}; expected an object of maps")
        return Maps.of(value)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(f"cannot be read as JSON: {error}") from error


def _load(path: Path) -> Any:
    try:
        found: Any = np.load(path, allow_pickle=False)
        return found if path.suffix == ".npy" else {name: found[name] for name in found.files}
    except Exception as error:  # NumPy raises whatever its zip and header parsers do
        raise SpecError(f"cannot be read as {path.suffix}: {error}") from error


def _csv(path: Path) -> NDArray[Any]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise SpecError(f"cannot be read: {error}") from error
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                rows.append([float(part) for part in line.split(",")])
            except ValueError as error:
                raise SpecError(f"line {number}: {error}; expected numbers with commas between") from None
            require(
                len(rows[-1]) == len(rows[0]), f"line {number} has {len(rows[-1])} numbers, the first {len(rows[0])}"
            )
    return np.array(rows)


def _array(name: str, value: Any) -> NDArray[Any]:
    try:
        return np.asarray(value)
    except (ValueError, OverflowError):
        raise SpecError(f"{name} is not a rectangular array of numbers") from None


def _whole(name: str, value: Any) -> Ints:
    """An array of whole numbers with a layer axis; lists of replicas may be of different lengths."""
    a = _array(name, _padded(value) if name == "log2phy" else value)
    require(a.dtype.kind in "iu" and a.size > 0, f"{name} is {a.dtype}{list(a.shape)}; expected whole numbers")
    a = a[None] if a.ndim == _AXES[name] - 1 else a
    require(a.ndim == _AXES[name], f"{name} has shape {a.shape}; expected {_AXES[name]} axes, the layers first")
    return a.astype(np.int64)


def _padded(value: Any) -> Any:
    """log2phy as nested lists, the innermost filled up with -1 to the same length; arrays as they are."""
    if not isinstance(value, list) or not value or not all(isinstance(v, list) for v in value):
        return value
    if all(isinstance(v, list) for row in value for v in row):
        longest = max((len(v) for row in value for v in row), default=0)
        return [[v + [-1] * (longest - len(v)) for v in row] for row in value]
    longest = max(len(v) for v in value)
    return [v + [-1] * (longest - len(v)) for v in value]


def _ascend(given: Mapping[str, Any]) -> Ints:
    """layer_list -> (L, R): the experts of each device, device after device; -1 in what a device has less than the fullest."""
    try:
        layers = [[list(device["device_expert"]) for device in layer["device_list"]] for layer in given["layer_list"]]
    except (KeyError, TypeError) as error:
        raise SpecError(f"layer_list without device_list and device_expert: {error}") from None
    most = max((len(device) for layer in layers for device in layer), default=0)
    return _whole("phy2log", [[e for d in layer for e in [*d, *[-1] * (most - len(d))]] for layer in layers])
