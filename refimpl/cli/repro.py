"""`refimpl repro`: a finding as a script that runs without this package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .common import Commands, takes_index

_TEXT = """Write a folder that shows one finding to somebody who has nothing of ours: repro.py, which needs NumPy alone, and
inputs.npz.

The inputs are the candidate's own, cut to the least that still shows it: one sequence, one token, one head, one number where the
stage allows. The script holds the stage's equation (its own source, without our machinery), prints what is expected, what the
candidate has, the difference and what is allowed, and exits 1 while the two differ. Put your own function in the place of
`candidate` there, and it exits 0 once that is right.

example: refimpl repro refimpl/cases/tiny refimpl/cases/tiny/hf-bug.safetensors L1/router.weights -o repro
         python repro/repro.py"""


def add(commands: Commands) -> None:
    """Add `repro`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "repro",
        help="write a finding as a script that runs without this package",
        description=_TEXT,
        formatter_class=raw,
    )
    p.add_argument("case", type=Path)
    p.add_argument("candidate", type=Path, help="a trace")
    p.add_argument("tap", help="its name, with or without the phase: fwd/L1/router.weights or L1/router.weights")
    p.add_argument(
        "index", nargs="?", help="a number of the row to show, e.g. 0,12,3 (default: the one that is furthest off)"
    )
    p.add_argument("-o", "--out", type=Path, required=True, metavar="DIR")
    takes_index(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case, Trace
    from refimpl.diff.examined import examine, index_of
    from refimpl.diff.repro import repro

    x = examine(Case.read(args.case), Trace.read(args.candidate), args.tap)
    made = repro(x, index_of(args.index, x.step.exact.shape))
    made.write(args.out)
    print(f"{args.out / 'repro.py'}: {made.shown}")
    if not made.differs:
        print("this tap is within what it is allowed: the script exits 0", file=sys.stderr)
    return 0
