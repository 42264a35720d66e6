"""Start a rank program on the simulator or under mpiexec, compare the two bit for bit, and never hang.

`python -m refimpl.parallel_emulation run -n 4 my_module:program` runs `program(comm)` in both engines. A program that
is stuck under MPI ends after `--timeout` seconds with what every rank was doing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np

from refimpl.autograd import SpecError, require

from . import mpi
from .log import Log
from .report import frames_of_threads, source_line
from .simulator import spmd
from .wire import digest

_COMMAND = "refimpl.parallel_emulation"  # the command line that `run` starts once per rank
_MARK, _WIDTH = "refimpl-rank ", 160
_LATE = "time is up: rank "
_START, _GRACE = 30.0, 2.0  # seconds for n Pythons to start; for the last words of all ranks


def load(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` names."""
    module, colon, function = name.partition(":")
    require(colon and module and function, f"a program is named module:function, not {name!r}")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"no program {name!r}: {error}") from error
    require(callable(found), f"{name!r} is not a function")
    program: Callable[..., Any] = found
    return program


def summary(result: Any, log: Log, rank: int) -> str:
    """One rank's line: a fingerprint of its result and of its calls, and their volume; equal iff the run was equal."""
    calls = log.select(rank=rank)
    told = digest([[r.op, r.label, list(r.group), [list(s) for s in r.sent]] for r in calls])
    return f"result {digest(result)}  log {told}  {len(calls)} calls  {sum([r.bytes for r in calls])} bytes sent"


def simulate(n: int, names: Sequence[str], *args: Any, seed: int | None = None) -> dict[str, list[str]]:
    """Run programs on the simulator; returns each one's summaries in rank order."""
    found = {}
    for name in names:
        log = Log()
        results = spmd(n, load(name), *args, seed=seed, log=log)
        found[name] = [summary(result, log, rank) for rank, result in enumerate(results)]
    return found


def launch(
    n: int, names: Sequence[str], args: Sequence[str] = (), *, timeout: float = 60.0, mpiexec: str | None = None
) -> dict[str, list[str]]:
    """Run programs one after the other in one MPI job of n processes; returns each one's summaries in rank order.

    SpecError with everything the job printed if it fails, or if it has not ended after `timeout` seconds (half a
    minute more where it does not even start).
    """
    for name in names:
        load(name)  # a misspelt name is an error here, not n tracebacks
    program = [sys.executable, "-m", "mpi4py", "-m", _COMMAND, "rank", f"--timeout={timeout}"]
    command = [*mpiexec_command(n, mpiexec), *program, ",".join(names), *args]
    code, out, err = _run(command, timeout)
    lines = [line.removeprefix(_MARK) for line in out.splitlines() if line.startswith(_MARK)]
    if code is None or code:
        ended = f"has not ended after {timeout:g} s" if code is None or _LATE in err else f"ended with code {code}"
        raise SpecError(f"the MPI job {ended}\n{err.strip()}\n  while running {' '.join(command)}")
    sys.stdout.write("".join([f"{line}\n" for line in out.splitlines() if not line.startswith(_MARK)]))
    require(len(lines) == n * len(names), f"the MPI job reported {len(lines)} results of {n * len(names)}\n{err}")
    return {name: lines[i * n : (i + 1) * n] for i, name in enumerate(names)}


def mpiexec_command(n: int, mpiexec: str | None = None) -> list[str]:
    """`mpiexec -n n` with the flags this MPI needs; the one beside this Python if there is one, else from PATH."""
    beside = Path(sys.executable).parent / "mpiexec"
    path = mpiexec or (str(beside) if beside.exists() else shutil.which("mpiexec"))
    if path is None or shutil.which(path) is None:
        raise SpecError(f"no {path or 'mpiexec'}: pip install 'deepseek-v3-refimpl[mpi]', or load the site's MPI")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    flags = []
    if "Open MPI" in version or "OpenRTE" in version:
        flags = ["--oversubscribe"]  # more ranks than cores
        flags += ["--allow-run-as-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    return [path, *flags, "-n", str(n)]


def environment() -> dict[str, str]:
    """Of a job's processes: they find what this process finds."""
    paths = [str(Path(p).resolve()) for p in sys.path if Path(p or ".").is_dir()]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _run(command: list[str], timeout: float) -> tuple[int | None, str, str]:
    """(exit code or None, stdout, stderr); the whole process group is gone afterwards.

    The ranks themselves say when their time is up and leave; some launchers then wait on, so this ends them too.
    """
    pipe = subprocess.PIPE
    deadline = time.monotonic() + _START + timeout
    with subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, env=environment(), start_new_session=True
    ) as job:
        assert job.stdout is not None and job.stderr is not None
        out, err = _Reader(job.stdout), _Reader(job.stderr)
        try:
            while job.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
                if not err.late and _LATE in err.text:
                    err.late, deadline = True, time.monotonic() + 2 * _GRACE
            code = job.poll()
            _end(job, signal.SIGTERM)
            out.join(_GRACE)
            err.join(_GRACE)
        finally:
            _end(job, signal.SIGKILL)
    return code, out.text, err.text


class _Reader(threading.Thread):
    """Collects what a process writes while it runs."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self.text, self.late, self._stream = "", False, stream
        self.start()

    def run(self) -> None:
        """Line by line, until the stream ends."""
        with contextlib.suppress(ValueError):  # closed by the other side
            for line in self._stream:
                self.text += line


def _end(job: subprocess.Popen[str], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, how)


def run_as_rank(names: Sequence[str], args: Sequence[Any], timeout: float) -> None:
    """One process of the job: run each program, rank 0 prints all summaries; says what it is doing when time is up."""
    doing, main = mpi.Doing(), threading.main_thread().ident
    me = mpi.world(doing=doing).rank

    def tell() -> None:
        frame = frames_of_threads().get(main or 0)
        sys.stderr.write(f"{_LATE}{me}: {doing.text}{source_line(frame)}\n")
        sys.stderr.flush()
        threading.Timer(_GRACE, os._exit, [1]).start()  # the others have said it by then

    watch = threading.Timer(timeout, tell)
    watch.daemon = True
    watch.start()
    for name in names:
        log = Log()
        comm = mpi.world(log, doing)
        line = summary(load(name)(comm, *args), log, comm.rank)
        lines = comm.allgather(np.frombuffer(line.ljust(_WIDTH).encode(), np.uint8), "program returned")
        if comm.rank == 0:
            sys.stdout.write("".join([f"{_MARK}{row.tobytes().decode().rstrip()}\n" for row in lines]))
            sys.stdout.flush()
    watch.cancel()
