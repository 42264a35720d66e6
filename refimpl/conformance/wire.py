"""Arrays between processes: raw little-endian files in row-major order, told of as {"dtype", "shape", "path"}.

Any language reads and writes them without a library. dtypes: float32, float64, int64, int32, uint8, bool, bfloat16
(float32's upper half, as uint16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import require, where
from refimpl.autograd.tensor import Array

DTYPES = {
    **{n: np.dtype(n) for n in ("float32", "float64", "int64", "int32", "uint8", "bool")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Name -> dtype of the elements."""


def put(value: Any, folder: Path, count: list[int]) -> Any:
    """A value with every array in it written to a new file of the folder; `count`, of one number, names them."""
    if isinstance(value, Mapping):
        return {str(k): put(v, folder, count) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [put(v, folder, count) for v in value]
    if isinstance(value, np.generic) or not hasattr(value, "dtype"):
        return value.item() if isinstance(value, np.generic) else value
    a = np.ascontiguousarray(value)
    require(a.dtype.name in DTYPES, f"dtype {a.dtype}; the protocol has {', '.join(DTYPES)}")
    count[0] += 1
    path = folder / f"{count[0]}.bin"
    path.write_bytes(a.tobytes())
    return {"dtype": a.dtype.name, "shape": list(np.shape(value)), "path": str(path)}


def take(value: Any, folder: Path) -> Any:
    """The value with every description replaced by its array. SpecError for one that does not hold what it says, or that names
    a file outside the folder.
    """
    if isinstance(value, list):
        return [take(v, folder) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"dtype", "shape", "path"}:
        return {k: take(v, folder) for k, v in value.items()}
    path, shape = Path(str(value["path"])), value["shape"]
    with where(f"in array {path}"):
        require(value["dtype"] in DTYPES, f"dtype {value['dtype']!r}; the protocol has {', '.join(DTYPES)}")
        sound = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        require(sound, f"shape {shape!r}; expected a list of sizes")
        inside = path.resolve().is_relative_to(folder.resolve()) and path.is_file()
        require(inside, f"no such file in {folder}")
        return _read(path, DTYPES[value["dtype"]], shape)


def _read(path: Path, dtype: np.dtype[Any], shape: list[int]) -> Array:
    size, expected = path.stat().st_size, math.prod(shape) * dtype.itemsize
    require(size == expected, f"{size} bytes; expected {expected}")
    return np.frombuffer(path.read_bytes(), dtype).reshape(shape)
