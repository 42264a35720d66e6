"""The vectors as files: arrays in safetensors, each array once; what they are in index.json, and again as lines in index.txt."""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from importlib import import_module, resources
from pathlib import Path
from typing import Any

from refimpl.autograd.errors import require
from refimpl.autograd.tensor import Array
from refimpl.checkpoint import Transaction, safetensors
from refimpl.record.candidate import written
from refimpl.version import __version__

from .entries import Store, vectors_of
from .read_vectors import SCHEMA
from .runs import all_runs, case_in, ground, one_a_stage
from .text import lines_of

READERS = ("read_vectors.py", "read_vectors.c")


def write_vectors(
    out: str | Path, *, only: str = "*", track: Callable[[str, int], None] = lambda run, of: None
) -> dict[str, Any]:
    """Write the vectors of the runs that fit a pattern into a new folder; -> the index. `track` is told every run, and of how many.

    SpecError if the folder exists, if no run fits, or if a second computation contradicts a vector.
    """
    out, store = Path(out), Store()
    require(not out.exists(), f"{out} exists; name a folder that does not")
    chosen = {run: told for run, told in all_runs().items() if fnmatchcase(run, only)}
    require(chosen, f"no run fits {only!r}; there are: {', '.join(all_runs())}")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cases:
        for run, (regime, dtype, phase) in chosen.items():
            track(run, len(chosen))
            g = ground(case_in(Path(cases), regime), dtype, phase)
            found += vectors_of(run, _file(run), g, one_a_stage(g.program, phase, dtype), store)
    specification = {"name": "refimpl", "version": __version__, "revision": revision()}
    digests = {run: store.runs[_file(run)].hexdigest() for run in chosen}
    equations = {v["stage"]: v.pop("equation") for v in found}
    head = {"schema": SCHEMA, "specification": specification, "equations": equations, "runs": digests}
    index = head | {"vectors": found}
    _write(out, index, store)
    return index


def _file(run: str) -> str:
    return run.replace("/", "-") + ".safetensors"


def revision() -> str:
    """sha256 of the sources that define stages and primitives: which specification wrote a set."""
    found = hashlib.sha256()
    for package in ("refimpl.autograd", "refimpl.layers"):
        folder = Path(str(import_module(package).__file__)).parent
        for path in sorted(folder.rglob("*.py"), key=lambda p: p.relative_to(folder).as_posix()):
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return found.hexdigest()[:16]


def _write(out: Path, index: dict[str, Any], store: Store) -> None:
    """All files, or none."""
    meta = {"schema": SCHEMA, "specification": json.dumps(index["specification"], sort_keys=True)}
    content = {name: _bytes(tensors, meta) for name, tensors in store.files.items()}
    places = {key: place for name, data in content.items() for key, place in _places_in(name, data).items()}
    _locate(index["vectors"], places)
    index["files"] = {name: "sha256:" + hashlib.sha256(data).hexdigest() for name, data in content.items()}
    content["index.json"] = _json(index).encode()
    content["index.txt"] = ("\n".join(lines_of(index)) + "\n").encode()
    for reader in READERS:
        content[reader] = resources.files("refimpl.vectors").joinpath(reader).read_bytes()
    with written(out):
        out.mkdir(parents=True)
    with Transaction() as files:
        for name, data in content.items():
            with files.new(out / name) as f:
                f.write(data)


def _json(index: Mapping[str, Any]) -> str:
    """A vector a line, so that what changed between two sets can be seen."""
    compact = partial(json.dumps, separators=(",", ":"))
    head = [f"{json.dumps(k)}: {compact(index[k])}" for k in ("schema", "specification", "equations", "runs", "files")]
    vectors = ",\n".join(compact(v) for v in index["vectors"])
    return "{" + ",\n".join([*head, f'"vectors": [\n{vectors}\n]']) + "}\n"


def _bytes(tensors: Mapping[str, Array], meta: Mapping[str, str]) -> bytes:
    sink = io.BytesIO()
    safetensors.write_tensors(sink, tensors, meta)
    return sink.getvalue()


def _places_in(file: str, data: bytes) -> dict[tuple[str, str], dict[str, Any]]:
    """Where in a file every tensor lies."""
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    return {
        (file, name): {
            "dtype": t["dtype"],
            "shape": t["shape"],
            "offset": 8 + n + t["data_offsets"][0],
        }
        for name, t in header.items()
    }


def _locate(found: Any, places: Mapping[tuple[str, str], dict[str, Any]]) -> None:
    """Complete every reference."""
    if isinstance(found, list):
        for x in found:
            _locate(x, places)
    elif isinstance(found, dict):
        if found.keys() >= {"file", "name"}:
            found |= places[found["file"], found["name"]]
        else:
            for x in found.values():
                _locate(x, places)


__all__ = ["write_vectors"]
