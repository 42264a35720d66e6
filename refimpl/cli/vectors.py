"""`refimpl vectors`: test vectors for engines in any language, and the judge of what an engine gave for them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refimpl.autograd.errors import SpecError

from .common import Commands

_TEXT = """Write test vectors: of every stage its inputs, what it gives, and how far an engine may be from that; for every regime,
dtype and phase (docs/vectors.md). The folder holds safetensors files, an index as JSON and as lines of words, and readers in Python
(NumPy alone) and C. The same bytes every time; some 20 MB in half a minute.

  refimpl vectors out                                write all of them
  refimpl vectors out --runs 'plain/float32/*'       some; --list shows all runs
  refimpl vectors out --check mine.safetensors       judge outputs, tensors that are named by the vectors' ids
  refimpl vectors out --verify                       each vector against what its second computation left in the index

Exit code 0 if all is right, 1 if something is wrong."""


def add(commands: Commands) -> None:
    """Add `vectors`."""
    raw = argparse.RawDescriptionHelpFormatter
    vectors = commands.add_parser(
        "vectors",
        help="write test vectors for engines in any language, or judge outputs",
        description=_TEXT,
        formatter_class=raw,
    )
    vectors.add_argument(
        "folder", type=Path, nargs="?", help="a new one to write into; with --check or --verify, one that was written"
    )
    vectors.add_argument("--runs", default="*", metavar="PATTERN", help="regime/dtype/phase, with * (default: all)")
    what = vectors.add_mutually_exclusive_group()
    what.add_argument("--check", type=Path, metavar="FILE", help="a safetensors file of outputs, named by vector")
    what.add_argument("--verify", action="store_true", help="the vectors themselves, against their second computations")
    what.add_argument("--list", action="store_true", help="the runs that vectors are taken from")
    vectors.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.vectors import all_runs, write_vectors

    if args.list:
        print("\n".join(all_runs()))
        return 0
    if args.folder is None:
        raise SpecError("name a folder; --help has examples")
    if args.check or args.verify:
        return _judge(args)
    done = iter(range(1, 1 << 20))
    index = write_vectors(
        args.folder, only=args.runs, track=lambda run, of: print(f"{next(done)} of {of}: {run}", file=sys.stderr)
    )
    print(f"{args.folder}: {len(index['vectors'])} vectors")
    return 0


def _judge(args: argparse.Namespace) -> int:
    """A line for everything that is wrong, then how many are right."""
    from refimpl.checkpoint import safetensors
    from refimpl.vectors import Vectors

    try:
        vectors = Vectors(args.folder)
        outputs = safetensors.open_file(args.check) if args.check else None
        found = {v.id: v.verify() for v in vectors} if outputs is None else vectors.check(outputs)
    except (OSError, ValueError, KeyError) as error:
        raise (
            error if isinstance(error, SpecError) else SpecError(f"{args.folder}: no sound set of vectors: {error}")
        ) from None
    wrong = {id: what for id, what in found.items() if what}
    for id, what in wrong.items():
        print(f"{id}: {what}")
    print(f"{len(found) - len(wrong)} of {len(found)} right")
    return 1 if wrong or not found else 0
