"""The safetensors file format with NumPy and mmap alone: the library's NumPy binding lacks FP8.

    8 bytes  n, the header's length, little endian
    n bytes  JSON {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...,
                   "__metadata__": {str: str}}
    rest     the tensors' bytes, C order, little endian; offsets count from here and tile it

A file is untrusted input: all that the header says is checked against the file's size before any
tensor is handed out, and nothing but the header is read until a tensor is used. The rules are those
of safetensors 0.8 (format page and Rust reader).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import SpecError, require, where

from .atomic import Transaction
from .header import DTYPES, MAX_DIMS, MAX_HEADER, METADATA, NAMES, TensorInfo, check_metadata, check_name, parse_header

Array = NDArray[Any]


class Sink(Protocol):
    """What a file is written to."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Append all of `data`."""


@dataclass(frozen=True)
class Pending:
    """A tensor to be made when it is its turn to be written: dtype name, shape, how to make it."""

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Array]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class SafetensorsFile(Mapping[str, Array]):
    """Name -> array: a read-only view of the mapped file, no copy. `.header` and `.metadata` touch
    no data.

    The mapping lives as long as an array does. As with any memory map, another process that
    truncates the file meanwhile makes later reads fail in the operating system; replacing it by
    rename (as `write_file` does) is safe.
    """

    def __init__(
        self,
        path: Path,
        header: Mapping[str, TensorInfo],
        metadata: Mapping[str, str],
        data: mmap.mmap,
        start: int,
    ) -> None:
        self.path = path
        self.header = header
        self.metadata = metadata
        self.file_bytes = len(data)
        self._data = data
        self._start = start

    def let_go(self) -> None:
        """Give the pages back that have been read; what is used again is read again. Arrays that were handed out stay valid."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._data.madvise(mmap.MADV_DONTNEED)

    def offset(self, name: str) -> int:
        """Where the tensor's bytes begin in the file."""
        return self._start + self.header[name].begin

    @property
    def head(self) -> bytes:
        """The file's bytes before the tensors' data."""
        return self._data[: self._start]

    def __getitem__(self, name: str) -> Array:
        t = self.header[name]
        return np.ndarray(t.shape, DTYPES[t.dtype], buffer=self._data, offset=self._start + t.begin)

    def __contains__(self, name: object) -> bool:
        return name in self.header

    def __iter__(self) -> Iterator[str]:
        return iter(self.header)

    def __len__(self) -> int:
        return len(self.header)


def open_file(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Map a safetensors file; reads its header only. Raises SpecError (what, which tensor, which
    file) for any flaw.
    """
    path = Path(path)
    with where(f"while opening {path}"):
        data, text = _read_header(path)
        start = 8 + len(text)
        header, metadata = parse_header(text, len(data) - start)
        return SafetensorsFile(path, header, metadata, data, start)


def write_file(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Array | Pending],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file: one tensor in memory at a time, the same bytes for the same
    content, atomically.

    A reader sees the old file or the whole new one. Raises SpecError for a dtype or a name the
    format cannot hold.
    """
    with Transaction() as files:
        write_into(files, Path(path), tensors, metadata)


def write_into(
    files: Transaction,
    path: Path,
    tensors: Mapping[str, Array | Pending],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """`write_file` as one of several files that appear together."""
    with where(f"while writing {path}"), files.new(path) as f:
        write_tensors(f, tensors, metadata)


def write_tensors(
    f: Sink, tensors: Mapping[str, Array | Pending], metadata: Mapping[str, str] | None = None
) -> list[str]:
    """The bytes of the file: one write for the header, one for each tensor, in the order of the names returned."""
    pending = {name: _pending(name, tensors[name]) for name in tensors}
    order = list(DTYPES)
    names = sorted(pending, key=lambda n: (-order.index(pending[n].dtype), n))
    header = _format_header({n: pending[n] for n in names}, metadata)
    f.write(struct.pack("<Q", len(header)) + header)
    for name in names:
        f.write(_bytes_of(name, pending[name]))
    return names


# ----------------------------------------------------------------------------------------- reading


def _read_header(path: Path) -> tuple[mmap.mmap, bytes]:
    """The mapped file and its header's text."""
    try:
        mode = path.stat().st_mode
        require(
            stat.S_ISREG(mode),
            f"is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; expected a file",
        )
        with path.open("rb") as f:
            size = os.fstat(f.fileno()).st_size
            require(size >= 8, f"has {size} bytes; expected the header's length in the first 8")
            data = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
    except (
        OSError,
        ValueError,
    ) as error:  # ValueError: a path with a NUL, or the file shrank meanwhile
        if isinstance(error, SpecError):
            raise
        raise SpecError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    (n,) = struct.unpack("<Q", data[:8])
    require(
        n <= MAX_HEADER,
        f"header length {n} exceeds the limit of {MAX_HEADER} bytes; not a safetensors file?",
    )
    require(n <= len(data) - 8, f"header length {n} exceeds the file's {len(data)} bytes; truncated?")
    return data, data[8 : 8 + n]


# ----------------------------------------------------------------------------------------- writing


def _pending(name: object, value: Array | Pending) -> Pending:
    require(isinstance(name, str) and name != METADATA, f"{name!r} cannot name a tensor")
    check_name(str(name))
    if isinstance(value, Pending):
        return value
    array = np.asarray(value)
    little = array.dtype.newbyteorder("<") if array.dtype.kind in "iuf" else array.dtype
    supported = f"tensor {name!r}: dtype {array.dtype}; the format holds {', '.join(map(str, NAMES))}"
    require(little in NAMES, supported)
    return Pending(NAMES[little], array.shape, lambda: array)


def _format_header(pending: Mapping[str, Pending], metadata: Mapping[str, str] | None) -> bytes:
    fields: dict[str, Any] = {}
    if metadata is not None:
        check_metadata(metadata)
        fields[METADATA] = dict(sorted(metadata.items()))
    end = 0
    for name, t in pending.items():
        require(
            len(t.shape) <= MAX_DIMS,
            f"tensor {name!r}: {len(t.shape)} dimensions; at most {MAX_DIMS}",
        )
        begin, end = end, end + t.nbytes
        fields[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    padded = text + b" " * (-len(text) % 8)  # data begins at a multiple of 8 bytes
    require(
        len(padded) <= MAX_HEADER,
        f"header of {len(padded)} bytes exceeds {MAX_HEADER}: split the file",
    )
    return padded


def _bytes_of(name: str, t: Pending) -> memoryview:
    array = t.make()
    if array.shape != t.shape or array.dtype.newbyteorder("=") != DTYPES[t.dtype].newbyteorder("="):
        raise SpecError(f"tensor {name!r}: made {array.dtype} {array.shape}, announced {t.dtype} {t.shape}")
    flat = np.ascontiguousarray(array, dtype=DTYPES[t.dtype]).reshape(-1)
    return flat.view(np.uint8).data
