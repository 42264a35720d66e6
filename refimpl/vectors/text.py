"""The index as lines of words, for whoever has no parser of JSON: C's `fscanf` reads them.

vector ID STAGE KIND LIMIT LEAN FLOOR
set NAME VALUE...                             a setting
in NAME DTYPE FILE OFFSET DIMS SIZE...        an argument: where its numbers begin, how many axes, their sizes
none NAME                                     an argument that is absent
part STAGE BY...                              of a gradient: a stage that reads the quantity, and as which arguments
gradient DTYPE FILE OFFSET DIMS SIZE...       of that stage's output
out DTYPE FILE OFFSET DIMS SIZE...            what is expected; ends the vector
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def lines_of(index: Mapping[str, Any]) -> Iterator[str]:
    """The whole index."""
    of = index["specification"]
    yield f"{index['schema']} {of['name']} {of['version']} {of['revision']} {len(index['vectors'])}"
    for v in index["vectors"]:
        numbers = (v["limit"], v.get("lean", 0), v.get("floor", 0))
        yield f"vector {v['id']} {v['stage']} {v['kind']} {' '.join(f'{n!r}' for n in numbers)}"
        yield from _given(v)
        for part in v.get("parts", []):
            yield f"part {part['stage']} {' '.join(part['by'])}"
            yield from _given(part)
            dy = part["gradient"]
            yield f"gradient {_place(dy) if isinstance(dy, dict) else repr(dy)}"
        yield f"out {_place(v['expected'])}"


def _given(v: Mapping[str, Any]) -> Iterator[str]:
    for name, value in v.get("settings", {}).items():
        yield from _set(name, value)
    for name, ref in v.get("inputs", {}).items():
        yield from _input(name, ref)


def _set(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _set(f"{name}.{key}", inner)
    else:
        words = {None: "none", True: "1", False: "0"}
        text = words[value] if value is None or isinstance(value, bool) else str(value)
        yield f"set {name} {text}"


def _input(name: str, ref: Any) -> Iterator[str]:
    if isinstance(ref, list):
        for i, r in enumerate(ref):
            yield from _input(f"{name}[{i}]", r)
    else:
        yield f"none {name}" if ref is None else f"in {name} {_place(ref)}"


def _place(ref: Mapping[str, Any]) -> str:
    shape = " ".join(map(str, [len(ref["shape"]), *ref["shape"]]))
    return f"{ref['dtype']} {ref['file']} {ref['offset']} {shape}"
