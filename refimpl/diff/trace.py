"""A trace: what an implementation recorded of one run, as one safetensors file whose tensor names are tap names, or one a rank.

`__metadata__` holds one JSON text under "trace": schema, producer, config, weight digests, inputs, precision, layouts,
the taps that were meant to be recorded, and notes. Any language with a safetensors writer can make one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refimpl.autograd.errors import where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import safetensors
from refimpl.layers.config import Config

from .header import SCHEMA, Header, read_file
from .ranks import holds_parts, read_ranks


@dataclass(frozen=True)
class Trace:
    """Header and taps: name -> array, memory-mapped when read from a file."""

    header: Header
    taps: Mapping[str, Array]

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Open a trace, or a folder of the traces of all ranks as one (`ranks`); tap data stays on disk until used. SpecError for
        anything that is not a sound trace.
        """
        path = Path(path)
        if path.is_dir():
            return cls(*read_ranks(path, sorted(path.glob("*.safetensors"))))
        header, file = read_file(path)
        return cls(*read_ranks(path, [path])) if holds_parts(header) else cls(header, file)

    def write(self, path: str | Path) -> None:
        """Write atomically."""
        text = json.dumps(dataclasses.asdict(self.header), sort_keys=True)
        safetensors.write_file(path, dict(self.taps), metadata={"trace": text})

    @property
    def config(self) -> Config:
        """The model's config as the producer declared it."""
        with where("in the trace header's config"):
            return Config.from_dict(self.header.config)


def digest(array: Array) -> str:
    """sha256 of a weight's dtype-independent content: shape and float32 values, so that bf16 and its widening agree."""
    a, found = np.atleast_1d(array), hashlib.sha256(str(np.shape(array)).encode())
    step = max(1, (1 << 22) * len(a) // max(a.size, 1))
    for start in range(0, len(a), step):  # a few rows at a time: a weight may be larger than what is free
        found.update(np.ascontiguousarray(a[start : start + step], dtype=np.float32).data)
    return "sha256:" + found.hexdigest()


__all__ = ["SCHEMA", "Header", "Trace", "digest"]
