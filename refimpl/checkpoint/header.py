"""The header of a safetensors file: what it may say, checked before any of it is used."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from refimpl.autograd.errors import SpecError, require

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
}
"""Name in the file -> dtype, ordered by size; data is written in the reverse order, so each tensor
is aligned to its own.
"""
NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # the limit of the safetensors library
MAX_DIMS = 32  # NumPy 1's limit; NumPy 2 allows 64
METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What the header says of one tensor: dtype name, shape, and bytes begin:end of the data
    section.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return self.end - self.begin


def parse_header(text: bytes, data_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of a header text, given how many bytes of data follow it."""
    require(text[:1] == b"{", f"header begins with {text[:1]!r}; expected {{")
    raw = parse_json(text)
    metadata = raw.pop(METADATA, None)
    check_metadata(metadata := {} if metadata is None else metadata)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # each once: a model of 90 thousand tensors has a few dozen
    header = {name: _tensor_info(name, entry, shapes) for name, entry in raw.items()}
    _check_tiling(header, data_bytes)
    return header, metadata


def parse_json(text: bytes) -> Any:
    """JSON as RFC 8259 and no more: UTF-8, no NaN, no key twice. Raises SpecError."""
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer
        )
    except SpecError:
        raise
    except (
        ValueError,
        RecursionError,
    ) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise SpecError(f"not UTF-8 JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise SpecError(f"the key {twice!r} appears twice in one JSON object")
    return found


def _integer(token: str) -> int | float:
    """-0 is no integer: no natural number is written so, and the safetensors library refuses it as an offset."""
    return -0.0 if token == "-0" else int(token)


def _no_constant(token: str) -> None:
    raise SpecError(f"{token} is not JSON")


def _tensor_info(name: str, entry: Any, shapes: dict[tuple[int, ...], tuple[int, ...]]) -> TensorInfo:
    check_name(name)
    ok = isinstance(entry, dict) and entry.keys() >= {"dtype", "shape", "data_offsets"}
    require(ok, f"tensor {name!r}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    known = isinstance(dtype, str) and dtype in DTYPES
    require(known, f"tensor {name!r}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    require(
        _naturals(shape),
        f"tensor {name!r}: shape {shape!r:.200} must be a list of non-negative integers",
    )
    require(len(shape) <= MAX_DIMS, f"tensor {name!r}: {len(shape)} dimensions; at most {MAX_DIMS}")
    ok = _naturals(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]
    require(
        ok,
        f"tensor {name!r}: data_offsets {offsets!r:.200} must be [begin, end], 0 <= begin <= end",
    )
    itemsize = DTYPES[dtype].itemsize
    small = math.prod(max(n, 1) for n in shape) * itemsize < 2**63
    require(small, f"tensor {name!r}: shape {shape} overflows 64-bit sizes")
    nbytes, span = math.prod(shape) * itemsize, offsets[1] - offsets[0]
    require(
        nbytes == span,
        f"tensor {name!r}: {dtype} {shape} has {nbytes} bytes, data_offsets span {span}",
    )
    same = shapes.setdefault(tuple(shape), tuple(shape))
    return TensorInfo(sys.intern(dtype), same, offsets[0], offsets[1])


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_tiling(header: Mapping[str, TensorInfo], data_bytes: int) -> None:
    """The tensors' bytes follow each other from 0 to the end of the file."""
    end = 0
    for name, t in sorted(header.items(), key=lambda item: (item[1].begin, item[1].end)):
        flaw = "a hole" if t.begin > end else "an overlap"
        require(t.begin == end, f"tensor {name!r}: data begins at {t.begin}, expected {end}: {flaw}")
        end = t.end
        require(
            end <= data_bytes,
            f"tensor {name!r}: data ends at {end}, the file's data at {data_bytes}: truncated?",
        )
    require(end == data_bytes, f"{data_bytes - end} bytes follow the last tensor's data; expected none")


def check_name(name: str) -> None:
    """Raise SpecError for text that UTF-8 cannot hold (JSON can smuggle in half a surrogate)."""
    require(
        name.isascii() or not any(0xD800 <= ord(c) < 0xE000 for c in name),
        f"{name!r} is not valid Unicode",
    )


def check_metadata(metadata: Any) -> None:
    """Raise SpecError unless it maps strings to strings."""
    flat = isinstance(metadata, Mapping) and all(isinstance(x, str) for item in metadata.items() for x in item)
    require(flat, f"{METADATA} must map strings to strings")
    for text in (x for item in metadata.items() for x in item):
        check_name(text)
