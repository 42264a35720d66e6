"""`python -m refimpl.parallel_emulation`: run a rank program on the simulator and under MPI."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from refimpl.autograd import SpecError
from refimpl.parallel_emulation.comm.launcher import launch, run_as_rank, simulate

BAD_INPUT = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit code 0, 1 if the engines disagree, 3 for bad input and for a job that failed or hung."""
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except SpecError as error:
        sys.stderr.write(f"refimpl.parallel_emulation: {error}\n")  # in one piece: several ranks may say it at once
        return BAD_INPUT
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m refimpl.parallel_emulation", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run PROGRAM(comm, *ARGS) on n ranks and print a fingerprint of every result")
    run.add_argument("-n", "--ranks", type=int, required=True)
    run.add_argument("--engine", choices=["simulator", "mpi", "both"], default="both")
    run.add_argument("--timeout", type=float, default=60.0, help="seconds until an MPI job is ended (default: 60)")
    run.add_argument("--mpiexec", help="default: the one beside this Python, else from PATH")
    run.add_argument("--seed", type=int, help="the simulator runs its ranks in a random order")
    run.set_defaults(run=_run)
    rank = commands.add_parser("rank", help="one process of an MPI job (`run` starts these)")
    rank.add_argument("--timeout", type=float, default=60.0)
    rank.set_defaults(run=_rank)
    for command in (run, rank):
        command.add_argument("program", metavar="PROGRAM", help="module:function; several with commas between")
        command.add_argument("args", metavar="ARG", nargs="*", help="JSON, or else a string")
    return parser


def _run(args: argparse.Namespace) -> int:
    names = args.program.split(",")
    found = {}
    if args.engine != "mpi":
        found["simulator"] = simulate(args.ranks, names, *[_value(a) for a in args.args], seed=args.seed)
    if args.engine != "simulator":
        found["mpi"] = launch(args.ranks, names, args.args, timeout=args.timeout, mpiexec=args.mpiexec)
    for engine, summaries in found.items():
        for name, lines in summaries.items():
            print(f"{name} on {engine}")
            print("".join([f"  rank {rank}  {line}\n" for rank, line in enumerate(lines)]), end="")
    if len(found) < 2:
        return 0
    same = found["simulator"] == found["mpi"]
    print("the same, bit for bit" if same else "the engines DISAGREE")
    return 0 if same else 1


def _rank(args: argparse.Namespace) -> int:
    run_as_rank(args.program.split(","), [_value(a) for a in args.args], args.timeout)
    return 0


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


if __name__ == "__main__":
    sys.exit(main())
