"""Test vectors of the DeepSeek-V3 specification: read them, and judge what an engine gave.  Needs NumPy alone; may be copied.

python read_vectors.py DIR                        what there is
python read_vectors.py DIR --check OUT.safetensors   judge tensors that are named by the vectors' ids
python read_vectors.py DIR --text ID              a vector as plain text
python read_vectors.py DIR --verify               every vector against its own second computation

for v in Vectors("DIR"):  v.inputs, v.settings, v.expected, v.judge(x) -> "" or what is wrong
"""

from __future__ import annotations

import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "refimpl-vectors/1"
MASKED = -9e3
"""What is below this stands for -inf where -inf is expected: engines mask with large numbers."""
_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_SIZE = {k: int(np.dtype(v).itemsize) for k, v in _PLAIN.items()} | {"BF16": 2, "F8_E4M3": 1}


def e4m3(codes: Any) -> Any:
    """The numbers of E4M3 codes (uint8): 4 bits of exponent, bias 7, 3 of mantissa; 127 and 255 are NaN."""
    e, m = (codes >> 3) & 15, (codes & 7) / 8.0
    size = np.where(e == 0, m * 2.0**-6, (1 + m) * 2.0 ** (e.astype(np.int32) - 7))
    return np.where(codes & 127 == 127, np.nan, np.where(codes & 128, -size, size)).astype(np.float32)


def numbers(raw: Any, dtype: str, shape: Any) -> Any:
    """Bytes of a tensor as NumPy holds it; bfloat16 and E4M3 as float32."""
    if dtype == "BF16":
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    if dtype == "F8_E4M3":
        return e4m3(np.frombuffer(raw, np.uint8)).reshape(shape)
    return np.frombuffer(raw, _PLAIN[dtype]).reshape(shape)


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """name -> array."""
    data = Path(path).read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    ends = {k: [8 + n + at for at in t["data_offsets"]] for k, t in header.items()}
    return {k: numbers(data[a:b], header[k]["dtype"], header[k]["shape"]) for k, (a, b) in ends.items()}


def place_weights(size: int) -> Any:
    """c_i = (2654435761 i mod 2^32) / 2^32 - 1/2, i from 0.  -> (size,)"""
    return (np.arange(size, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(1 << 32)) / 2.0**32 - 0.5


def dot_of(x: Any) -> tuple[float, float]:
    """Sum of c_i x_i over the finite numbers, and of |c_i x_i|."""
    flat = np.asarray(x, np.float64).reshape(-1)
    terms = (place_weights(flat.size) * np.where(np.isfinite(flat), flat, 0)).tolist()
    return math.fsum(terms), math.fsum(map(abs, terms))


@dataclass(frozen=True)
class Vector:
    """One entry of the index, and the folder it is in."""

    entry: Mapping[str, Any]
    folder: Path

    @property
    def id(self) -> str:
        """regime/dtype/phase/stage."""
        return str(self.entry["id"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """The numbers and words that the stage is told."""
        found: Mapping[str, Any] = self.entry.get("settings", {})
        return found

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Argument -> array, a list of them, or None."""
        return {k: self._held(ref) for k, ref in self.entry.get("inputs", {}).items()}

    @cached_property
    def parts(self) -> list[dict[str, Any]]:
        """Of a gradient: every stage that reads the quantity, with its inputs and the gradient of its output."""
        keys = ("inputs", "gradient")
        return [
            part | {"inputs": {k: self._held(r) for k, r in part["inputs"].items()}, keys[1]: self._held(part[keys[1]])}
            for part in self.entry.get("parts", [])
        ]

    @cached_property
    def expected(self) -> Any:
        """What the stage gives."""
        return self._held(self.entry["expected"])

    def _held(self, ref: Any) -> Any:
        if isinstance(ref, list):
            return [self._held(r) for r in ref]
        if not isinstance(ref, dict):
            return ref
        with (self.folder / ref["file"]).open("rb") as f:
            f.seek(ref["offset"])
            return numbers(f.read(_SIZE[ref["dtype"]] * math.prod(ref["shape"])), ref["dtype"], ref["shape"])

    def judge(self, x: Any) -> str:
        """What is wrong with an engine's output x, or ""."""
        e, x = self.expected, np.asarray(x)
        if x.shape != e.shape:
            return f"shape {x.shape}, expected {e.shape}"
        return _JUDGES[self.entry["kind"]](x.astype(np.float64), e.astype(np.float64), self.entry)

    def verify(self) -> str:
        """How the expected numbers contradict the second computation, or ""."""
        found, told = dot_of(self.expected)[0], self.entry["second"]
        return "" if abs(found - told["dot"]) <= told["bound"] else f"dot {found!r}, expected {told['dot']!r}"


def _values(x: Any, e: Any, entry: Mapping[str, Any]) -> str:
    """Rows along the last axis by their norms, a row counting as at least a share of the largest; then whether all lean one way."""
    masked = np.isneginf(e)
    if not (np.isneginf(x[masked]) | (x[masked] < MASKED)).all():
        return "a masked entry is not"
    x, e = np.atleast_1d(np.where(masked, 0, x)), np.atleast_1d(np.where(masked, 0, e))
    if not np.isfinite(x).all():
        return f"{int((~np.isfinite(x)).sum())} numbers are NaN or infinite"
    d = x - e
    far, size, along = (d * d).sum(-1), (e * e).sum(-1), (d * e).sum(-1)
    least = max(entry["floor"] ** 2 * size.max(initial=0), np.finfo(np.float64).tiny)
    worst = float(np.sqrt(far / np.maximum(size, least)).max(initial=0))
    if worst > entry["limit"]:
        return f"a row is off by {worst:.1e} of its norm, allowed {entry['limit']:.1e}"
    lean = abs(float(along.sum())) / max(float(size.sum()), np.finfo(np.float64).tiny)
    if e.size >= 16 and lean > entry["lean"]:
        return f"all of it leans one way by {lean:.1e}, allowed {entry['lean']:.1e}"
    return ""


def _sets(x: Any, e: Any, entry: Mapping[str, Any]) -> str:
    wrong = int((np.sort(x, axis=-1) != np.sort(e, axis=-1)).any(axis=-1).sum())
    return f"{wrong} rows hold other numbers" if wrong else ""


def _same(x: Any, e: Any, entry: Mapping[str, Any]) -> str:
    wrong = int((np.where(x < MASKED, -np.inf, x) != e).sum())
    return f"{wrong} of {e.size} numbers differ, allowed {entry['limit']:g}" if wrong > entry["limit"] else ""


def _each(x: Any, e: Any, entry: Mapping[str, Any]) -> str:
    wrong = int((~(np.abs(x - e) <= entry["limit"] * np.abs(e))).sum())
    return f"{wrong} of {e.size} numbers are off by more than {entry['limit']:.1e} of themselves" if wrong else ""


_JUDGES = {"value": _values, "set": _sets, "same": _same, "each": _each}


class Vectors:
    """The vectors of a folder, in the order of the index."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = json.loads((self.folder / "index.json").read_text())
        if self.index.get("schema") != SCHEMA:
            raise ValueError(f"{self.folder}: schema {self.index.get('schema')!r}, expected {SCHEMA!r}")

    def __iter__(self) -> Iterator[Vector]:
        return (Vector(entry, self.folder) for entry in self.index["vectors"])

    def __getitem__(self, id: str) -> Vector:
        return next(v for v in self if v.id == id)

    def check(self, outputs: Mapping[str, Any]) -> dict[str, str]:
        """id -> what is wrong, "" where nothing is, of every output; an id that there is not is wrong."""
        known = {v.id: v for v in self}
        return {id: known[id].judge(x) if id in known else "no such vector" for id, x in outputs.items()}


def text_of(vector: Vector) -> Iterator[str]:
    """A vector's lines: a name, a dtype, a shape, then the numbers of a row on a line, each as few digits as give it back."""
    yield f"vector {vector.id}"
    for key, value in vector.settings.items():
        yield f"set {key} {json.dumps(value)}"
    for part in vector.parts:
        yield f"part {part['stage']} by {' '.join(part['by'])}"
        yield from _arrays({**part["inputs"], "gradient": part["gradient"]})
    yield from _arrays({**vector.inputs, "expected": vector.expected})


def _arrays(named: Mapping[str, Any]) -> Iterator[str]:
    for name, a in named.items():
        if isinstance(a, list):
            yield from _arrays({f"{name}[{i}]": x for i, x in enumerate(a)})
        elif isinstance(a, np.ndarray):
            yield f"array {name} {a.dtype} {' '.join(map(str, a.shape))}".rstrip()
            for row in a.reshape(-1, a.shape[-1] if a.ndim else 1):
                yield " ".join(str(v) for v in row)
        else:
            yield f"set {name} {json.dumps(a)}"


def main(argv: list[str]) -> int:
    """The commands at the top; 0, or 1 if something is wrong."""
    if not argv or "--help" in argv:
        print(__doc__)
        return 3
    vectors, rest = Vectors(argv[0]), argv[1:]
    if rest[:1] == ["--text"]:
        print("\n".join(text_of(vectors[rest[1]])))
        return 0
    if rest[:1] == ["--check"]:
        found = vectors.check(read_safetensors(rest[1]))
    elif rest[:1] == ["--verify"]:
        found = {v.id: v.verify() for v in vectors}
    else:
        print("\n".join(f"{v.id:<50}{vectors.index['equations'][v.entry['stage']]}" for v in vectors))
        return 0
    wrong = {id: what for id, what in found.items() if what}
    print(
        "\n".join(
            [*[f"{id}: {what}" for id, what in wrong.items()], f"{len(found) - len(wrong)} of {len(found)} right"]
        )
    )
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
