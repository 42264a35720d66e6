"""`refimpl train`: a training run from a recipe file."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refimpl.autograd.errors import SpecError, require

from .common import Commands

if TYPE_CHECKING:
    from refimpl.train.run import End, Job

_TEXT = """Train a model by a recipe file, on token shards.

  refimpl data build books/*.txt -o shards --length 64
  refimpl recipe --tokens 2M --sequence 64 --batch 40 --multiple 4 --lr 3e-3 --toml > mine.toml
  cat >> mine.toml <<END
  [model]
  preset = "tiny"
  vocab_size = 262
  [data]
  shards = { pre-training = "shards" }
  END
  refimpl train mine.toml -o run
  refimpl train mine.toml -o run --resume      after Ctrl-C, a crash, a full disk: the same bits as without
  refimpl train sft.toml -o tuned --from run   with the weights of another run, or of released safetensors
  refimpl train mine.toml -o run4 --ranks 4    on the simulator; mesh = "pp=2,ep=2" in [train], else data parallel
  refimpl train mine.toml -o run4 --mpi 4      the same bits, in processes of mpiexec, with a Ctrl-C that saves
  mpiexec -n 4 python -m mpi4py -m refimpl train mine.toml -o run4     the same by hand (docs/mpi.md)
  refimpl train --stop run4                    ask a run to save and end, wherever it runs
  refimpl plot run -o run.svg

A recipe file is what `refimpl recipe` prints and tables beside it: [model], [data], [train], [checkpoints], [evaluation],
[samples], [log] (docs/training.md). A step is a line on standard output, a table where a person watches; everything about
it is in RUN/metrics.jsonl. Ctrl-C ends after the step that is being taken, saves, and says how to resume.
With --mpi too. Under an mpiexec of your own a Ctrl-C kills the processes at once; `refimpl train --stop RUN`, from any terminal or
machine that sees RUN, ends such a run (and any other) as Ctrl-C ends one alone. So does SIGUSR1, which mpiexec and batch systems
pass on.

exit code: 0; 3 bad input, a loss that is no number, a full disk; 130 interrupted"""

LAUNCHED = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
"""Set by mpiexec for the processes that it starts; the first two to their number."""

STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1")
"""Signals that ask for the end of a run. The last one, unlike the others, mpiexec passes on without killing (not on Windows)."""


def add(commands: Commands) -> None:
    """Add `train`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("train", help="train a model by a recipe file", description=_TEXT, formatter_class=raw)
    p.add_argument("recipe", type=Path, nargs="?", help="a recipe file with [model] and [data]")
    p.add_argument("-o", "--out", type=Path, metavar="RUN", help="the folder of the run")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of RUN, on any ranks")
    p.add_argument("--steps", type=int, metavar="N", help="end after step N (the recipe's schedules stay as they are)")
    p.add_argument(
        "--from",
        dest="init",
        type=Path,
        metavar="CKPT",
        help="begin with the weights of a checkpoint or of another run",
    )
    p.add_argument("--ranks", type=int, metavar="N", help="train on N ranks of the simulator")
    p.add_argument("--mpi", type=int, metavar="N", help="train on N processes of mpiexec; Ctrl-C saves")
    p.add_argument(
        "--stop", type=Path, metavar="RUN", help="ask the run that trains in RUN to save and end; nothing else"
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from dataclasses import replace

    from refimpl.train.run import load_job, stopping

    if args.stop is not None:
        require(args.recipe is None and args.out is None, "--stop RUN stands alone")
        print(
            f"refimpl: asked {stopping.ask(args.stop)} to stop; it saves after the step that it is taking",
            file=sys.stderr,
        )
        return 0
    require(args.recipe and args.out, "expected a recipe file and -o RUN; `refimpl train --help` shows one")
    job = load_job(args.recipe)
    job = job if args.steps is None else replace(job, steps=args.steps)
    job = job if args.init is None else replace(job, init=args.init)
    require(args.ranks is None or args.ranks >= 1, f"--ranks {args.ranks}; at least 1")
    require(args.ranks is None or args.mpi is None, "--ranks N or --mpi N: the simulator or processes")
    if args.mpi is not None and not _launched():
        return _in_processes(job, args)
    try:
        first, end = _train(job, args)
    except SpecError as error:
        if not (args.out / "checkpoints").is_dir() or "holds a run" in str(error):
            raise
        raise type(error)(f"{error}\n  when that is mended, go on with: {resume_command(args)}") from error
    if first:
        print("".join([f"refimpl: {said}\n" for said in _notes(job, args.out, end)]), end="", file=sys.stderr)
    if end.complete or not first:  # of the ranks one says it: another code than 0 is MPI_Abort for all of them
        return 0
    print(f"refimpl: stopped after step {end.step}, saved; go on with: {resume_command(args)}", file=sys.stderr)
    return 130 if args.mpi is None else 0  # who started the processes sees it by the records


def _in_processes(job: Job, args: argparse.Namespace) -> int:
    """The same command once more, in the processes of mpiexec, where `_launched` is true."""
    from refimpl.train.run import records

    from .mpiexec import ranks_of

    job.check()  # what is wrong with it is said once, and not by MPI_Abort
    code = ranks_of(args.mpi, [*_given(args), *["--resume"] * args.resume])
    return code or (0 if max([r["step"] for r in records(args.out)], default=0) >= len(job) else 130)


def _notes(job: Job, folder: Path, end: End) -> Iterator[str]:
    """What was asked for and is not so: more steps than there are, or fewer than are done."""
    whole = len(job.run)
    if job.steps is not None and job.steps > whole:
        yield f"asked for {job.steps} steps, the recipe has {whole}"
    if end.complete and end.step == end.began:
        yield f"{folder} has {end.step} of the recipe's {whole} steps already, asked for {len(job)}: nothing to do"


def _train(job: Job, args: argparse.Namespace) -> tuple[bool, End]:
    """Alone, on the simulator, or as one process of an MPI job -> whether this is the process that speaks; the end."""
    from refimpl.train.run import simulated, train

    from .live import told

    how: dict[str, Any] = {"resume": args.resume}
    launched = _launched()
    with (
        _asked(speak=not launched or args.mpi is None) as asked,
        told(job.log.every, len(job), alone=not launched) as tell,
    ):
        how |= {"stop": asked, "tell": tell}
        if launched:
            from refimpl.parallel_emulation.comm import mpi

            require(args.ranks is None, "--ranks is for the simulator; under mpiexec the processes are the ranks")
            comm = mpi.world()
            require(args.mpi in (None, comm.size), f"--mpi {args.mpi} in a job of {comm.size} processes")
            if comm.rank == 0:
                print(f"refimpl: to save and end, from anywhere: refimpl train --stop {args.out}", file=sys.stderr)
            return comm.rank == 0, train(job, args.out, comm=comm, cores=comm.size, **how)
        if args.ranks is not None:
            return True, simulated(job, args.out, args.ranks, **how)[0]
        return True, train(job, args.out, **how)


def resume_command(args: argparse.Namespace) -> str:
    """What goes on with this run."""
    size = next((os.environ[name] if name.endswith("SIZE") else "N" for name in LAUNCHED if name in os.environ), "")
    start = f"mpiexec -n {size} python -m mpi4py -m " if size and args.mpi is None else ""
    return f"{start}refimpl {shlex.join(_given(args))} --resume"


def _given(args: argparse.Namespace) -> list[str]:
    """The command without --resume."""
    given = {"steps": args.steps, "from": args.init, "ranks": args.ranks, "mpi": args.mpi}
    more = [str(x) for name, value in given.items() if value is not None for x in (f"--{name}", value)]
    return ["train", str(args.recipe), "-o", str(args.out), *more]


def _launched() -> bool:
    return any(name in os.environ for name in LAUNCHED)


@contextmanager
def _asked(speak: bool) -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C, SIGTERM or SIGUSR1 came; the second Ctrl-C interrupts at once."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        if speak:
            print("refimpl: ending after this step; Ctrl-C again ends at once", file=sys.stderr)

    numbers = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
