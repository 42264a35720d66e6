"""Rows of tensors read into memory of their own, every byte counted: for files larger than memory.

A mapped file is read when and as the operating system likes, its pages count as memory, and a file that has been cut off
meanwhile kills the process. A read says how much it read, and a short one is an error like any other.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from io import FileIO

import numpy as np

from refimpl.autograd.errors import SpecError, require, where

from .buffers import Buffers
from .header import DTYPES
from .mapping import Checkpoint
from .safetensors import Array
from .sources import Piece, Source


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a tensor as stored, from row `start` on: codes (R, ...), and the scales of their blocks if they are FP8."""

    start: int
    codes: Array
    scales: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes, scales included."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)


class Reader:
    """Reads rows of a checkpoint's tensors; `bytes_read` counts. May be asked by several threads: one reads at a time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.bytes_read = checkpoint, 0
        self._lock, self._buffers = threading.Lock(), Buffers()

    def rows(self, name: str, start: int, stop: int) -> Rows:
        """Rows [start, stop) as stored; of FP8 codes from the beginning of their first block on.

        SpecError, naming tensor and file, where a file cannot be read or is not what it was.
        """
        source, scale = self.checkpoint.source(name), self.checkpoint.scale(name)
        with where(f"while reading rows {start}:{stop} of {name}"):
            if scale is None:
                return Rows(start, self._rows(source, start, stop), None)
            high = self.checkpoint.block[0]
            first, last = start // high, -(-stop // high)
            codes = self._rows(source, first * high, stop)
            return Rows(first * high, codes, self._rows(scale, first, last))

    def _rows(self, source: Source, start: int, stop: int) -> Array:
        pieces = source.pieces if source.axis is not None else source.pieces[:1]  # else: copies
        height = source.shape[0] // len(pieces) if source.axis == 0 else source.shape[0]
        found = []
        for i, piece in enumerate(pieces):
            before = i * height if source.axis == 0 else 0
            a, b = max(start - before, 0), min(stop - before, height)
            if a < b:
                found.append(self._piece(piece, source.dtype, a, b))
        return found[0] if len(found) == 1 else np.concatenate(found, axis=source.axis or 0)

    def _piece(self, piece: Piece, dtype: str, start: int, stop: int) -> Array:
        begin, shape = piece.extent(start, stop)
        out = self._buffers.new(shape, DTYPES[dtype])
        with where(f"in {piece.file.path}"), self._lock:
            try:
                with piece.file.path.open("rb", buffering=0) as f:
                    self._fill(f, piece.file.file_bytes, begin, out)
            except OSError as error:
                raise SpecError(f"cannot be read: {error.strerror or error}") from error
        return out

    def _fill(self, f: FileIO, expected: int, begin: int, out: Array) -> None:
        found = os.fstat(f.fileno()).st_size
        require(
            found == expected, f"the file has {found} bytes, but had {expected} when it was opened: was it cut off?"
        )
        rest = out.reshape(-1).view(np.uint8).data
        f.seek(begin)
        while rest:
            n = f.readinto(rest) or 0
            require(n, f"the file ended {len(rest)} bytes early")
            self.bytes_read += n
            rest = rest[n:]
