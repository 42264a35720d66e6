"""Memory for large arrays that come and go, of which one at a time is kept for the next of its size."""

from __future__ import annotations

import math
import mmap
import weakref
from typing import Any

import numpy as np

from .safetensors import Array

LARGE = 1 << 20


class Buffers:
    """`new(shape, dtype)`: an array in memory of its own, that of the last one that was dropped if it was as large. Other memory
    goes back to the system; a heap would keep several of them, and holes between them.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []  # at most one

    def new(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """What is in it is not defined. May be called by several threads."""
        size = math.prod(shape) * dtype.itemsize
        if size < LARGE:
            return np.empty(shape, dtype)
        try:
            memory: mmap.mmap | None = self._free.pop()
        except IndexError:
            memory = None
        if memory is None or len(memory) != size:
            memory = mmap.mmap(-1, size)
        array = np.frombuffer(memory, dtype)
        weakref.finalize(array, self._drop, memory).atexit = False  # views keep it, not its memory alone
        return array.reshape(shape)

    def _drop(self, memory: mmap.mmap) -> None:
        self._free[:] = [memory]
