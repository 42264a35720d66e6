"""One run at a time in a folder: RUN/lock is held while its process lives, and names it.

The lock is the system's (flock): it ends with the process, whatever ended that, so what a killed run left in the file keeps
nobody out, and a process of another machine that sees the folder counts too. Not noticed where the system has no such locks
(Windows, some network file systems): there a second run is one's own to avoid.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refimpl.autograd.errors import SpecError
from refimpl.parallel_emulation.comm import Comm
from refimpl.train.checkpoints.agree import by_rank_0

FILE = "lock"


@contextmanager
def alone(folder: Path, comm: Comm | None) -> Iterator[None]:
    """The folder for this run only, made if it is not there; held by rank 0. SpecError, on every rank, if another run has it."""
    held: list[int] = []

    def take() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        held.append(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644))
        _lock(held[0], folder)
        return ""

    try:
        by_rank_0(comm, take, "alone")
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def owner(folder: Path) -> str:
    """Which process trains in a folder, in words; "" if none does, as far as the system has locks."""
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return _owner(descriptor) if _held(descriptor) else ""
    finally:
        os.close(descriptor)


def _owner(descriptor: int) -> str:
    return os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"


def _held(descriptor: int) -> bool:
    """Whether another process has the lock; where there are no locks it may."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return True
    return False


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        said = f"{folder} holds a run that {_owner(descriptor)} is training"
        raise SpecError(f"{said}; wait for it, or choose another folder") from error
    except OSError:  # no locks on this file system
        return
    with suppress(OSError):  # a full disk: held all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
