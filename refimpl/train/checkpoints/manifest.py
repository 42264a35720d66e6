"""The manifest: what a checkpoint holds, in which files, with the checksum of every part; written last, it is the key.

    {"checksum": CRC-32 of the content, "content": {"format", "step", "facts", "shards": {file: {"bytes", "head",
     "pieces": {"adam.m/model.norm.weight": [CRC-32, dtype, place]}}}}}

The content is summed as canonical JSON (sorted keys, no spaces), so that a flipped bit in the manifest shows as well.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refimpl.autograd import require
from refimpl.checkpoint import json_object

from .pieces import Place

FORMAT = "refimpl training checkpoint 1"
MANIFEST = "manifest.json"


class Entry(NamedTuple):
    """A piece in a shard: its bytes' checksum, the dtype it has when read, where it lies."""

    checksum: int
    dtype: str
    place: Place


@dataclass(frozen=True)
class Shard:
    """One rank's file: its size, the checksum of its header, its pieces by "kind/name"."""

    nbytes: int
    head: int
    pieces: Mapping[str, Entry]

    def to_json(self) -> dict[str, Any]:
        """As the manifest says it."""
        pieces = {name: [e.checksum, e.dtype, e.place.to_json()] for name, e in self.pieces.items()}
        return {"bytes": self.nbytes, "head": self.head, "pieces": pieces}

    @classmethod
    def from_json(cls, found: Any) -> Shard:
        """The inverse of to_json."""
        ok = isinstance(found, dict) and isinstance(found.get("pieces"), dict)
        ok = ok and all(type(found.get(key)) is int for key in ("bytes", "head"))
        require(ok, "a shard needs bytes, head and pieces")
        pieces = {}
        for name, entry in found["pieces"].items():
            good = isinstance(entry, list) and len(entry) == 3 and type(entry[0]) is int and isinstance(entry[1], str)
            require(good and "/" in name, f"piece {name!r} needs checksum, dtype and place")
            pieces[name] = Entry(entry[0], entry[1], Place.from_json(entry[2]))
        return cls(found["bytes"], found["head"], pieces)


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    facts: Mapping[str, Any]
    shards: Mapping[str, Shard]

    def text(self) -> bytes:
        """The file's content. SpecError for facts that JSON cannot hold."""
        shards = {file: shard.to_json() for file, shard in self.shards.items()}
        content = {"format": FORMAT, "step": self.step, "facts": dict(self.facts), "shards": shards}
        whole = {"checksum": zlib.crc32(canonical(content)), "content": content}
        return (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()


def canonical(value: Any) -> bytes:
    """The one JSON text of a value. SpecError where JSON cannot say it and give it back."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        same = json.loads(text) == value
    except (TypeError, ValueError) as error:
        require(False, f"facts of a checkpoint are JSON (finite numbers, texts, lists, objects): {error}")
        raise
    require(same, f"facts of a checkpoint come back from JSON as they were; {value!r:.120} does not (tuples, keys?)")
    return text.encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder. SpecError where it is missing, damaged, or of another format."""
    require((folder / MANIFEST).is_file(), f"{folder} holds no {MANIFEST}; it is no checkpoint of a training run")
    whole = json_object(folder / MANIFEST)
    content = whole.get("content")
    require(isinstance(content, dict), f"{folder / MANIFEST} has no content")
    assert isinstance(content, dict)
    checksum = zlib.crc32(canonical(content))
    require(checksum == whole.get("checksum"), f"{folder / MANIFEST} is damaged: its checksum is {checksum}")
    require(content.get("format") == FORMAT, f"format {content.get('format')!r}; this version reads {FORMAT!r}")
    shards = content.get("shards")
    ok = type(content.get("step")) is int and isinstance(content.get("facts"), dict) and isinstance(shards, dict)
    require(ok, f"{folder / MANIFEST} needs step, facts and shards")
    assert isinstance(shards, dict)
    return Manifest(content["step"], content["facts"], {file: Shard.from_json(s) for file, s in shards.items()})
