"""Files that appear whole or not at all: written under temporary names, flushed to disk, renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from refimpl.autograd.errors import SpecError


class Transaction:
    """Several files of a folder that become visible together, the last one as the key to the others.

    with Transaction() as files:
        with files.new(folder / "a") as f: ...
        with files.new(folder / "index") as f: ...

    On leaving, the old files are set aside, the key first, and the new ones renamed into place, the key
    last: whenever the power fails, a reader finds the old files, the new ones, or no key. An exception, inside
    or while renaming, leaves the old files as they were and nothing else. A single file is replaced in one step.
    """

    def __init__(self) -> None:
        self._written: list[tuple[Path, Path]] = []  # (temporary, final)

    def __enter__(self) -> Transaction:
        return self

    @contextmanager
    def new(self, path: Path) -> Iterator[BinaryIO]:
        """A binary file to write `path`'s new content to. Raises SpecError where it cannot be written."""
        temporary = _beside(path)
        with _as_spec_error(path):
            f = temporary.open("xb")
        self._written.append((temporary, path))
        with f, _as_spec_error(path):
            yield f
            f.flush()
            os.fsync(f.fileno())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._written:
                with _as_spec_error(self._written[-1][1]):
                    self._commit()
        finally:
            for temporary, _ in self._written:
                with suppress(FileNotFoundError):
                    temporary.unlink()

    def _commit(self) -> None:
        key = self._written[-1][1]
        if len(self._written) == 1:
            os.replace(self._written[0][0], key)
            flush_folder(key.parent)
            return
        aside: list[tuple[Path, Path]] = []  # (where it was put, where it belongs)
        placed: list[Path] = []
        try:
            for path in [key, *(path for _, path in self._written[:-1])]:
                if path.exists():
                    aside.append((_beside(path), path))
                    os.replace(path, aside[-1][0])
                    flush_folder(key.parent)
            for temporary, path in self._written:
                os.replace(temporary, path)
                placed.append(path)
                flush_folder(key.parent)
        except BaseException:
            _put_back(aside, placed)
            raise
        for old, _ in aside:
            old.unlink()


def _put_back(aside: list[tuple[Path, Path]], placed: list[Path]) -> None:
    """Undo a commit: new files away, old ones back, the key last."""
    for path in reversed(placed):
        path.unlink()
    for old, path in reversed(aside):
        with suppress(FileNotFoundError):  # the one whose setting aside failed
            os.replace(old, path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _as_spec_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpecError(f"{path}: cannot be written: {error.strerror or error}") from error


def flush_folder(folder: Path) -> None:
    """Make renames durable and ordered; only POSIX can open a folder for it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
