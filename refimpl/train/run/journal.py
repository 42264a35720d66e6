"""The metrics of a run: one JSON object a step in RUN/metrics.jsonl, in order, whatever happened in between."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from refimpl.autograd.errors import SpecError, require, where
from refimpl.checkpoint import Transaction

FILE = "metrics.jsonl"
Record = Mapping[str, Any]


class Journal:
    """Appends records. `keep`: the step the run goes on from; records after it, which a run wrote that ended before its next
    checkpoint, are cut off first, and so is a torn last line. SpecError where nothing can be written.
    """

    def __init__(self, folder: Path, keep: int, name: str = FILE) -> None:
        self.path = folder / name
        if self.path.exists():
            lines = [json.dumps(r) for r in records(folder, name) if r["step"] <= keep]
            with Transaction() as files, files.new(self.path) as f:
                f.write("".join([f"{line}\n" for line in lines]).encode())
        try:
            self._f: BinaryIO = self.path.open("ab", buffering=0)
        except OSError as error:
            raise SpecError(f"{self.path}: {error.strerror}") from error

    def add(self, record: Record) -> None:
        """One line, written at once. SpecError if the disk is full."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        try:
            written = self._f.write(line)
        except OSError as error:
            raise SpecError(f"{self.path}: {error.strerror}, at step {record['step']}") from error
        require(written == len(line), f"{self.path}: no room for the line of step {record['step']}")

    def sync(self) -> None:
        """Onto the disk: a checkpoint that survives a power cut has the records before it."""
        os.fsync(self._f.fileno())

    def close(self) -> None:
        """The last sync."""
        self.sync()
        self._f.close()


def records(folder: Path | str, name: str = FILE) -> Iterator[dict[str, Any]]:
    """Every record of a run, in order; a torn last line is left out. SpecError for a file that is no journal."""
    path = Path(folder) / name
    require(path.is_file(), f"{folder} holds no {name}; it is no run of `refimpl train`")
    lines = path.read_bytes().split(b"\n")
    with where(f"while reading {path}"):
        for number, line in enumerate(lines[:-1], 1):  # behind the last line end: nothing, or what a kill left
            try:
                found = json.loads(line)
            except ValueError as error:
                raise SpecError(f"line {number} is no JSON: {error}") from error
            require(isinstance(found, dict) and isinstance(found.get("step"), int), f"line {number} has no step")
            yield found
