"""A trace: what an implementation recorded of one run, as one safetensors file whose tensor names are tap names.

`__metadata__` holds one JSON text under "trace": schema, producer, config, weight digests, inputs, precision, layouts,
the taps that were meant to be recorded, and notes. Any language with a safetensors writer can make one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.autograd.errors import SpecError, require, where
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import safetensors
from refimpl.layers.config import Config

SCHEMA = "refimpl-trace/1"


@dataclass(frozen=True)
class Header:
    """The JSON part. tokens and positions (B, S) as nested lists; weights: checkpoint name -> "sha256:..."."""

    config: dict[str, Any]
    tokens: list[list[int]]
    positions: list[list[int]] | None = None
    valid: list[list[int]] | None = None
    schema: str = SCHEMA
    producer: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    phases: list[str] = field(default_factory=lambda: ["fwd"])
    precision: dict[str, str] = field(default_factory=lambda: {"storage": "float32", "accumulate": "float32"})
    layouts: dict[str, str] = field(default_factory=dict)
    dims: dict[str, str] = field(default_factory=dict)
    slices: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    expected: list[str] = field(default_factory=list)
    self_check: dict[str, Any] = field(default_factory=dict)
    notes: str = ""

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Parse and check; SpecError says which key is missing, unknown or of the wrong kind."""
        try:
            d = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"the trace header is not JSON: {error}") from None
        require(isinstance(d, dict), "the trace header is not a JSON object")
        require(d.get("schema") == SCHEMA, f"schema {d.get('schema')!r}; this version reads {SCHEMA!r}")
        kinds = {f.name: str(f.type).partition("[")[0].partition(" ")[0] for f in dataclasses.fields(cls)}
        unknown = sorted(set(d) - set(kinds))
        require(not unknown, f"unknown header keys: {', '.join(unknown)}")
        for key in ("config", "tokens"):
            require(key in d, f"the header lacks {key!r}")
        for key, value in d.items():
            kind = {"dict": dict, "list": list, "str": str}[kinds[key]]
            optional = value is None and key in ("positions", "valid")
            require(optional or isinstance(value, kind), f"header key {key!r} is not a {kind.__name__}")
        require(all(isinstance(t, str) for t in d.get("expected", [])), "header key 'expected' lists taps by name")
        for key in ("producer", "weights", "precision", "layouts", "dims"):
            texts = all(isinstance(value, str) for value in d.get(key, {}).values())
            require(texts, f"header key {key!r} maps names to texts")
        return cls(**d)


@dataclass(frozen=True)
class Trace:
    """Header and taps: name -> array, memory-mapped when read from a file."""

    header: Header
    taps: Mapping[str, Array]

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """Open a trace; tap data stays on disk until used. SpecError for anything that is not a sound trace."""
        with where(f"while reading trace {path}"):
            file = safetensors.open_file(path)
            require("trace" in file.metadata, 'no "trace" entry in the metadata: this safetensors file is not a trace')
            return cls(Header.from_json(file.metadata["trace"]), file)

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
        found.update(np.ascontiguousarray(a[start : start + step], dtype=np.float32))
    return "sha256:" + found.hexdigest()
