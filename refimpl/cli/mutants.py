"""`refimpl mutants`: measure the conformance suite by the known bugs that it kills."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Commands, deliver

if TYPE_CHECKING:
    from refimpl.conformance.kills import Kill

_TEXT = """Run the conformance suite on the specification with one known bug in it, for every bug of the corpus that is a
stage, and on innocent rewrites, which it must leave alone: which claims kill which bug, and whether at its own stage.

Rows are appended to --out as they come; the same command goes on where it stopped. About 8 s a bug.
Exit code 1 if a bug survives or a rewrite is called wrong.

example: refimpl mutants --ids R02,A12-q_a_norm-1e-05,online-softmax --out kills.jsonl
example: refimpl mutants --out kills.jsonl --jobs 4 --page docs/mutants.md"""


def add(commands: Commands) -> None:
    """Add `mutants`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "mutants", help="which bugs the conformance suite kills", description=_TEXT, formatter_class=raw
    )
    p.add_argument("--ids", default="", help="bugs and rewrites with commas between; all by default")
    p.add_argument("--list", action="store_true", help="list them, and what cannot be run, and stop")
    p.add_argument("--out", type=Path, default=Path("kills.jsonl"), help="rows (default: %(default)s)")
    p.add_argument("--cases", type=Path, help="a folder where the cases are kept, for another run")
    p.add_argument("--page", type=Path, help="write the matrix here (Markdown)")
    p.add_argument("--jobs", type=int, default=1)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.conformance import kills

    ids = kills.subjects(filter(None, args.ids.split(",")))
    if args.list:
        print("\n".join([*ids, *[f"not run: {i}: {why}" for i, why in kills.unusable().items()]]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        cases = args.cases or Path(folder)
        rows = kills.kills(ids, kills.suite_command, args.out, cases, jobs=args.jobs, say=_say)
    if args.page:
        deliver(kills.page(rows), args.page, quiet=True)
    wrong = [r for r in rows if not r.as_it_should]
    print(f"{len(rows) - len(wrong)} of {len(rows)} as they should be")
    for r in wrong:
        print(f"{r.id}: {'called wrong by ' + ', '.join(r.claims) if r.innocent else 'survives'}")
    return 1 if wrong else 0


def _say(row: Kill) -> None:
    print(
        f"{row.id}: {len(row.claims)} claims fail{', its own stage among them' if row.located else ''}", file=sys.stderr
    )
