"""`refimpl trace`: record the specification's own run of a case."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands


def add(commands: Commands) -> None:
    """Add `trace`."""
    trace = commands.add_parser("trace", help="record the specification's own run of a case")
    trace.add_argument("case", type=Path)
    trace.add_argument("-o", "--out", type=Path, required=True)
    trace.add_argument("--precision", default="float32", help="float64, float32, bf16 or fp8 (default: float32)")
    trace.add_argument("--attend", default="expanded", choices=["expanded", "absorbed"])
    trace.add_argument("--taps", default="*", help="patterns, comma-separated (default: all), e.g. 'fwd/L*/router.*'")
    trace.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case
    from refimpl.record import trace_case

    options = {"precision": args.precision, "attend": args.attend, "taps": args.taps.split(",")}
    trace = trace_case(Case.read(args.case), **options)
    trace.write(args.out)
    print(f"{args.out}: {len(trace.taps)} taps")
    return 0
