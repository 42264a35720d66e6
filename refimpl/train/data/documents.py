"""Documents out of text and JSONL files, one at a time, each with the place where the next one begins."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from refimpl.autograd.errors import SpecError, require

SPLITS = ("file", "line", "paragraph")


class Place(NamedTuple):
    """Byte `offset` of file number `file` (of its uncompressed bytes)."""

    file: int
    offset: int


START = Place(0, 0)


def documents(
    files: Sequence[Path], start: Place = START, *, split: str = "file", key: str = "text"
) -> Iterator[tuple[str, Place]]:
    """(text, where the next document begins) for every document from `start` on that is not blank. In .jsonl files a line is a
    document, an object whose `key` is its text; in others the file, each line, or each paragraph (blank lines between them).
    Names that end in .gz are uncompressed. SpecError for what is no UTF-8, no JSON, or has no such key, with file and byte.
    """
    require(split in SPLITS, f"split {split!r}; known: {', '.join(SPLITS)}")
    for number, path in enumerate(files[start.file :], start.file):
        with _opened(path) as f:
            f.seek(start.offset if number == start.file else 0)
            is_json = path.name.removesuffix(".gz").endswith(".jsonl")
            for at, raw in _pieces(f, "line" if is_json else split):
                place = f"{path}, byte {at}"
                text = _of_json(raw, key, place) if is_json else _decoded(raw, place)
                if text.strip():
                    yield text, Place(number, at + len(raw))


def _pieces(f: BinaryIO, split: str) -> Iterator[tuple[int, bytes]]:
    """(where it begins, bytes) of each piece; together they are the file."""
    at = f.tell()
    if split == "file":
        yield at, f.read()
        return
    held = b""
    for line in f:
        held += line
        if split == "line" or not line.strip():
            yield at, held
            at, held = at + len(held), b""
    if held:
        yield at, held


def _of_json(raw: bytes, key: str, place: str) -> str:
    if not raw.strip():
        return ""
    try:
        d = json.loads(_decoded(raw, place))
    except json.JSONDecodeError as error:
        raise SpecError(f"{place}: not JSON: {error}") from error
    text = d.get(key) if isinstance(d, dict) else None
    if not isinstance(text, str):
        raise SpecError(f"{place}: no text under the key {key!r}")
    return text


def _decoded(raw: bytes, place: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{place}: not UTF-8: byte {error.start} of the document") from error


def is_gzip(path: Path) -> bool:
    """Whether a file is uncompressed when it is read."""
    return path.name.endswith(".gz")


def _opened(path: Path) -> BinaryIO:
    try:
        return cast(BinaryIO, gzip.open(path, "rb")) if is_gzip(path) else path.open("rb")
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
