"""`refimpl explain`: one number of one tap, down to its terms."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, takes_index

_TEXT = """Take one number of a recorded tap apart: its equation, the inputs that entered by name, its terms by size, what
float64, the candidate and the twins give, what is allowed.

The number is that of TAP at INDEX, in the axes of docs/taps.md; without INDEX the one that is furthest off. The terms are input
times slope, from the stage's own gradient. Where the stage is linear in an argument they sum to the number, which is said and
checked; where it is not (a norm's input, a softmax's scores) they are first order. For chosen experts and groups: the scores in
falling order and by how much the choice was won.

example: refimpl explain refimpl/cases/tiny refimpl/cases/tiny/hf-bug.safetensors L1/moe.routed 0,7,17"""


def add(commands: Commands) -> None:
    """Add `explain`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "explain", help="one number of one tap, down to its terms", description=_TEXT, formatter_class=raw
    )
    p.add_argument("case", type=Path)
    p.add_argument("candidate", type=Path, help="a trace")
    p.add_argument("tap", help="its name, with or without the phase: fwd/L1/router.weights or L1/router.weights")
    p.add_argument("index", nargs="?", help="whole numbers with commas between, e.g. 0,12,3")
    p.add_argument("--terms", type=int, default=8, metavar="N", help="how many terms to list (default: 8)")
    takes_index(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case, Trace
    from refimpl.diff.examined import examine, index_of
    from refimpl.diff.explanation import explain_number

    x = examine(Case.read(args.case), Trace.read(args.candidate), args.tap)
    print("\n".join(explain_number(x, index_of(args.index, x.step.exact.shape), args.terms)))
    return 0
