"""The JSON part of a trace: what was run, how, and what was recorded of it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import SpecError, require, where
from refimpl.checkpoint import safetensors

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
    parallel: dict[str, Any] = field(default_factory=dict)
    notes: str = ""

    @classmethod
    def from_json(cls, text: str) -> Header:
        """Parse and check; SpecError says which key is missing, unknown or of the wrong kind."""
        try:
            d = json.loads(text, object_pairs_hook=_once)
        except SpecError:
            raise
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
        require(all(isinstance(t, str) for t in d.get("phases", [])), "header key 'phases' lists phases by name")
        for key in ("producer", "weights", "precision", "layouts", "dims"):
            texts = all(isinstance(value, str) for value in d.get(key, {}).values())
            require(texts, f"header key {key!r} maps names to texts")
        return cls(**d)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. SpecError for a key that is there twice: other readers take the first of them, or the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        require(key not in found, f"the trace header has the key {key!r} twice in one object")
        found[key] = value
    return found


def read_file(path: Path) -> tuple[Header, safetensors.SafetensorsFile]:
    """The header of one file and its taps, on disk until used. SpecError for anything that is not a sound trace."""
    with where(f"while reading trace {path}"):
        file = safetensors.open_file(path)
        odd = next((name for name in file if not name.isprintable()), None)
        require(odd is None, f"the tap name {odd!r} holds characters that cannot be printed")
        require("trace" in file.metadata, 'no "trace" entry in the metadata: this safetensors file is not a trace')
        return Header.from_json(file.metadata["trace"]), file
