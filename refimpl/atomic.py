"""Files that appear whole or not at all: written under temporary names, flushed to disk, then
renamed.
"""

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
    """Several files that become visible together, the last one as the key to the others.

    with Transaction() as files:
        with files.new(folder / "a") as f: ...
        with files.new(folder / "index") as f: ...

    On leaving, the old version of the last file is removed, the others are renamed into place, then
    the last one. A crash in between leaves no key file, so a reader never meets a mixture of old
    and new. An exception inside leaves the old files as they were and no temporary ones. A single
    file is replaced in one step.
    """

    def __init__(self) -> None:
        self._written: list[tuple[Path, Path]] = []  # (temporary, final)

    def __enter__(self) -> Transaction:
        return self

    @contextmanager
    def new(self, path: Path) -> Iterator[BinaryIO]:
        """A binary file to write `path`'s new content to. Raises SpecError where the folder cannot
        be written.
        """
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with _as_spec_error(path):
            f = temporary.open("xb")
        self._written.append((temporary, path))
        with f, _as_spec_error(path):
            yield f
            f.flush()
            os.fsync(f.fileno())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None and self._written:
                self._commit()
        finally:
            for temporary, _ in self._written:
                with suppress(FileNotFoundError):
                    temporary.unlink()

    def _commit(self) -> None:
        key = self._written[-1][1]
        with _as_spec_error(key):
            if len(self._written) > 1:
                key.unlink(missing_ok=True)
                _flush_folder(key.parent)
            for temporary, path in self._written:
                if path == key:  # the others must be on disk before the file that announces them
                    _flush_folder(key.parent)
                os.replace(temporary, path)
            _flush_folder(key.parent)


@contextmanager
def _as_spec_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SpecError(f"{path}: cannot be written: {error.strerror or error}") from error


def _flush_folder(folder: Path) -> None:
    """Make renames durable; only POSIX can open a folder for it."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
