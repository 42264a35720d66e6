"""Processes that work on one judgement: of this machine, or of an MPI job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.autograd.errors import SpecError, require

if TYPE_CHECKING:
    from refimpl.diff import Case, Trace
    from refimpl.diff.spread import Pool

_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


@dataclass(frozen=True)
class Files:
    """What a judgement is about; a worker opens it by calling this."""

    case: Path
    candidate: Path
    weights: Path | None

    def __call__(self) -> tuple[Case, Trace]:
        """The case and the trace."""
        from refimpl.diff import Case, Trace

        case, trace = Case.read(self.case), Trace.read(self.candidate)
        if self.weights is None:
            return case, trace
        from refimpl.weights.under import under

        return under(case, trace, self.weights)[:2]


@contextmanager
def pool(jobs: str, files: Files) -> Iterator[Pool | None]:
    """Workers as `--jobs` says: a number of processes, or "mpi"; None for one. SpecError for anything else."""
    from refimpl.diff.spread import Pool

    if jobs == "mpi":
        try:
            from mpi4py.futures import MPIPoolExecutor  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise SpecError('--jobs mpi needs mpi4py: pip install "deepseek-v3-refimpl[mpi]"') from error
        with MPIPoolExecutor() as workers:
            yield Pool(workers, workers.num_workers, files)
        return
    require(jobs.isdecimal() and int(jobs) > 0, f"--jobs {jobs}; expected a number of processes, or mpi")
    if int(jobs) == 1:
        yield None
        return
    with _one_thread(), ProcessPoolExecutor(int(jobs), mp_context=get_context("spawn")) as processes:
        yield Pool(processes, int(jobs), files)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that start here multiply matrices with one thread each, unless the environment says otherwise."""
    added = [name for name in _THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(added, "1"))
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
