"""Weights in any container as one mapping: checkpoint name -> the float32 values that the stored numbers stand for.

A container's reader gives a Part a name; nothing is read before it is asked for, and nothing is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refimpl.autograd.errors import require, where

Array = NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """How numbers are stored: the format's name; for codes with scales along the last axis, how many steps (the widest, where they
    differ) cover a group's range, and how many numbers share it; `block` of FP8 codes.
    """

    name: str
    steps: int = 0
    group: int = 0
    block: tuple[int, int] = (128, 128)


def whole(x: Array) -> tuple[Array, ...]:
    """One piece, as it is."""
    return (x,)


@dataclass(frozen=True)
class Part:
    """One tensor of a container under its checkpoint name. `split` turns a tensor of the checkpoint into the pieces that the
    container stores, in the axes in which it stores (and rounds) them, each as `stored` says.
    """

    shape: tuple[int, ...]
    stored: tuple[Stored, ...]
    read: Callable[[], Array]
    split: Callable[[Array], tuple[Array, ...]] = whole


class Held(Mapping[str, Array]):
    """Checkpoint name -> float32 array, read when asked for. `part(name)` says how it is stored."""

    def __init__(self, container: str, path: str | os.PathLike[str], parts: Mapping[str, Part]) -> None:
        self.container, self.path = container, os.fspath(path)
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Array:
        part = self._parts[name]
        with where(f"while loading {name} from {self.path}"):
            x = np.asarray(part.read(), np.float32)
            require(x.shape == part.shape, f"{x.shape} came out; expected {part.shape}")
            return x

    def part(self, name: str) -> Part:
        """How a tensor is stored; KeyError if there is none."""
        return self._parts[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it."""
        return self._parts[name].shape

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows [start, stop) of a tensor."""
        return self[name][start:stop]

    def let_go(self) -> None:
        """As a Checkpoint's: what was read is not kept."""

    def only(self, names: Mapping[str, Any]) -> Held:
        """Without what is not among the names."""
        return Held(self.container, self.path, {n: p for n, p in self._parts.items() if n in names})

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)
