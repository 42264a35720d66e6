"""`refimpl record`: record another implementation's run of a case."""

from __future__ import annotations

import argparse
from pathlib import Path

from refimpl.autograd.errors import SpecError

from .common import Commands


def add(commands: Commands) -> None:
    """Add `record`."""
    record = commands.add_parser("record", help="record another implementation's run of a case")
    record.add_argument("framework", choices=["hf"], help="hf: Hugging Face transformers (needs the extra 'interop')")
    record.add_argument("case", type=Path, nargs="?")
    record.add_argument("-o", "--out", type=Path)
    record.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    record.add_argument("--bug", help="inject a known bug of the corpus, e.g. R01; 'list' prints them")
    record.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.record import hf
    from refimpl.record.hf_bugs import BUGS

    if args.bug == "list":
        print("\n".join(f"{name}  {bug.description}" for name, bug in BUGS.items()))
        return 0
    if args.case is None or args.out is None:
        raise SpecError("record needs CASE and -o OUT")
    path = hf.record(args.case, args.out, dtype=args.dtype, patch=args.bug)
    print(path)
    return 0
