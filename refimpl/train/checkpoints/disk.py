"""Every file-system call that changes something, in one place: a test can cut the power before, in and after each of them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol

from refimpl.checkpoint.atomic import flush_folder

BEHIND = 16  # writes whose sums may be outstanding: what they were given lives that long
CHUNK = 4 << 20  # bytes of a write: long enough for the disk, short enough for the sums beside it to keep up
EARLY = 16 << 20  # bytes after which a file is sent to the disk while what follows is written


class File(Protocol):
    """An open file as a writer sees it."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Append the beginning of `data` -> how many bytes of it, at least one."""


class Disk:
    """The calls a checkpoint is made of. What is synced survives a power failure; what is renamed is seen at once."""

    def make_folder(self, path: Path) -> None:
        """A new, empty folder."""
        path.mkdir(parents=True)

    @contextmanager
    def create(self, path: Path) -> Iterator[File]:
        """A new file to write to, on the disk when the block is left."""
        with path.open("xb", buffering=0) as f, helpers() as thread:
            early = Early(f, thread)
            yield self.writer(early, path)
            early.finish()
            self.sync(f, path)

    def writer(self, f: File, path: Path) -> File:
        """What writes to a file that has been created."""
        return f

    def sync(self, f: IO[bytes], path: Path) -> None:
        """Make what was written to a file durable."""
        os.fsync(f.fileno())

    def sync_folder(self, path: Path) -> None:
        """Make the names in a folder durable."""
        flush_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        """One name for another, at once; `new` does not exist."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """A file, or an empty folder."""
        path.rmdir() if path.is_dir() else path.unlink()

    def remove_folder(self, path: Path) -> None:
        """A folder with its files."""
        for file in sorted(path.iterdir()):
            self.remove(file)
        self.remove(path)


class Early:
    """A file of which every EARLY bytes go to the disk in another thread: the last sync then waits for the rest only.

    The system tells of a write that failed later once: whichever sync hears of it, the file is not whole.
    """

    def __init__(self, f: IO[bytes], thread: Executor) -> None:
        self._f, self._thread = f, thread
        self._sync: Future[None] | None = None
        self._waiting = 0

    def write(self, data: bytes | memoryview) -> int:
        """As the file's. OSError also for what was written before."""
        n = self._f.write(data)
        self._waiting += n
        if self._waiting >= EARLY and (self._sync is None or self._sync.done()):
            self.finish()
            self._sync, self._waiting = self._thread.submit(_data_sync, self._f.fileno()), 0
        return n

    def finish(self) -> None:
        """Wait for the sync that is under way. OSError if it failed."""
        if self._sync is not None:
            self._sync.result()


def _data_sync(descriptor: int) -> None:
    """As os.fsync, where the system can without the times of the file."""
    getattr(os, "fdatasync", os.fsync)(descriptor)


def write_all(f: File, data: bytes | memoryview) -> int:
    """All of `data`, in chunks -> how many bytes that were."""
    view, at = memoryview(data).cast("B"), 0
    while at < len(view):
        at += f.write(view[at : at + CHUNK])
    return at


class Summed:
    """A file that keeps a CRC-32 of everything one `write` is given, summed in other threads while the disk works."""

    def __init__(self, file: File, helpers: Executor) -> None:
        self._file, self._helpers = file, helpers
        self._sums: list[Future[int]] = []
        self.nbytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append all of `data`, in chunks."""
        if len(self._sums) > BEHIND:
            self._sums[-BEHIND].result()
        self._sums.append(self._helpers.submit(zlib.crc32, data))
        n = write_all(self._file, data)
        self.nbytes += n
        return n

    @property
    def sums(self) -> list[int]:
        """The checksum of every write, in order."""
        return [s.result() for s in self._sums]


def helpers() -> ThreadPoolExecutor:
    """A thread beside the one that writes; crc32 and NumPy leave Python's lock to others."""
    return ThreadPoolExecutor(1, "checkpoint")
