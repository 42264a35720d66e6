"""`refimpl mutants`: measure the conformance suite by the known bugs that it kills."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.autograd.errors import require

from .common import Commands, deliver

if TYPE_CHECKING:
    from refimpl.conformance.kills import Kill

_TEXT = """Run the conformance suite on the specification with one known bug in it, for every bug of the corpus that is a
stage, and on innocent rewrites, which it must leave alone: which claims kill which bug, and whether at its own stage.

Rows are appended to --out as they come; the same command goes on where it stopped. About 8 s a bug.
Exit code 1 if a rewrite is called wrong, if a bug survives that is not on the list of those that nothing can kill here
(docs/mutants.md gives the reasons), or if one that is on it is killed.

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
    p.add_argument(
        "--gate",
        action="store_true",
        help="ask the claims of a bug's own stage first, and all only if these do not kill it: a third of the time, no matrix",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.conformance import kills

    require(not (args.gate and args.page), "--gate does not ask every claim, so that --page would show a part")
    ids = kills.subjects(filter(None, args.ids.split(",")))
    if args.list:
        print("\n".join([*ids, *[f"not run: {i}: {why}" for i, why in kills.unusable().items()]]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        cases = args.cases or Path(folder)
        rows = kills.kills(ids, kills.suite_command, args.out, cases, jobs=args.jobs, gate=args.gate, say=_say)
    if args.page:
        deliver(kills.page(rows), args.page, quiet=True)
    wrong = [r for r in rows if not r.as_it_should]
    print(f"{len(rows) - len(wrong)} of {len(rows)} as they should be")
    for r in wrong:
        print(f"{r.id}: {_fault(r)}")
    return 1 if wrong else 0


def _fault(row: Kill) -> str:
    if row.innocent:
        return f"called wrong by {', '.join(row.claims)}"
    return "survives" if not row.claims else f"is listed as one that survives, and is killed by {', '.join(row.claims)}"


def _say(row: Kill) -> None:
    print(
        f"{row.id}: {len(row.claims)} claims fail{', its own stage among them' if row.located else ''}", file=sys.stderr
    )
