"""What all ranks of a run must know alike: texts from everyone to everyone, and one rank's work with its outcome."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refimpl.autograd import SpecError, require
from refimpl.parallel_emulation.comm import Comm


def everyone(comm: Comm | None, text: str, label: str) -> list[str]:
    """What each rank says, in rank order; a process by itself (None) hears itself."""
    if comm is None:
        return [text]
    mine = np.frombuffer(text.encode(), np.uint8)
    rows, counts = comm.alltoallv(np.tile(mine, comm.size), np.full(comm.size, len(mine)), label)
    return [part.tobytes().decode() for part in np.split(rows, np.cumsum(counts)[:-1])]


def by_rank_0(comm: Comm | None, work: Callable[[], str], label: str) -> str:
    """`work` done by rank 0 alone; its result on every rank, or its OSError or SpecError as a SpecError on every rank."""
    said = ""
    if comm is None or comm.rank == 0:
        try:
            said = "+" + work()
        except (OSError, SpecError) as error:
            said = "-" + complaint(error)
    first = everyone(comm, said, f"checkpoint.{label}")[0]
    require(first.startswith("+"), first[1:])
    return first[1:]


def complaint(error: Exception) -> str:
    """An error in words: of an OSError the file and the system's reason."""
    if isinstance(error, OSError):
        return f"{error.filename or 'the checkpoint'}: {error.strerror or error}"
    return str(error)
