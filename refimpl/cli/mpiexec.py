"""`refimpl train --mpi N`: mpiexec started for a command, and a Ctrl-C that the ranks hear instead of dying of it.

At a Ctrl-C Open MPI's mpiexec sends its processes SIGTERM after a quarter of a second and SIGKILL after another, whatever
`odls_base_sigkill_timeout` is. So mpiexec gets a session of its own, which the terminal's Ctrl-C does not reach. It reaches this
process, which hands it on as SIGUSR1; that mpiexec, Open MPI's and MPICH's, passes to the ranks as it is.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from refimpl.autograd.errors import require
from refimpl.parallel_emulation.comm.launcher import environment, mpiexec_command

HANDED_ON = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
"""What ends a command, or its terminal; the ranks get SIGUSR1 for each."""


def ranks_of(n: int, command: Sequence[str]) -> int:
    """`refimpl COMMAND` in n processes of mpiexec -> its exit code. A second Ctrl-C ends them at once: KeyboardInterrupt."""
    require(n >= 1, f"--mpi {n}; at least 1")
    require(hasattr(signal, "SIGUSR1"), "--mpi hands Ctrl-C on by SIGUSR1, which this system lacks; use mpiexec itself")
    start = [*mpiexec_command(n), sys.executable, "-m", "mpi4py", "-m", "refimpl", *command]
    came: list[int] = []
    jobs: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: Any) -> None:
        again = bool(came) and number == signal.SIGINT
        came.append(number)
        print(
            f"refimpl: ending {'at once' if again else 'after this step; Ctrl-C again ends at once'}", file=sys.stderr
        )
        for job in jobs:
            job.send_signal(signal.SIGINT if again else signal.SIGUSR1)

    with _handled_by(hand_on):
        jobs.append(subprocess.Popen(start, stdin=subprocess.DEVNULL, env=environment(), start_new_session=True))
        if came:  # before there was a job
            jobs[0].send_signal(signal.SIGUSR1)
        code = jobs[0].wait()
    if code and came:
        raise KeyboardInterrupt
    return code


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """A handler for what is handed on; what nohup ignores stays ignored."""
    numbers = [n for n in [getattr(signal, name) for name in HANDED_ON] if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
