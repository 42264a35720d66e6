"""`refimpl diff`: judge another implementation's trace."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from refimpl.autograd.errors import require

from .common import Commands, deliver, progress

if TYPE_CHECKING:
    from refimpl.diff import Case, Trace

_TEXT = """Judge a recorded run of another implementation, stage by stage.

CASE is a folder with config.json, weights.safetensors and tokens.json; CANDIDATE is a trace: a safetensors file whose
tensors are named by tap (`refimpl record hf` writes one; so can any language). Each recorded stage is re-run on the
candidate's own recorded inputs, so a wrong stage shows up alone, wherever it is. With a second trace, the two are refereed.

exit code: 0 conforms (also in another gauge, or in a contested dialect, which is named), 1 diverges, 2 inconclusive
(something needed was not recorded), 3 bad input"""


def add(commands: Commands) -> None:
    """Add `diff`."""
    raw = argparse.RawDescriptionHelpFormatter
    diff = commands.add_parser(
        "diff", help="judge another implementation's trace", description=_TEXT, formatter_class=raw
    )
    diff.add_argument("case", type=Path)
    diff.add_argument("candidate", type=Path)
    diff.add_argument("other", type=Path, nargs="?", help="a second trace: which of the two left the specification?")
    diff.add_argument("--all", action="store_true", help="list every tap in model order")
    diff.add_argument("--quiet", action="store_true", help="print the verdict only")
    diff.add_argument("--json", action="store_true", help="print JSON (schema refimpl-diff/1)")
    diff.add_argument("--junit", type=Path, metavar="FILE", help="also write JUnit XML, a test case a tap")
    diff.add_argument(
        "--html", type=Path, metavar="FILE", help="also write a page that needs nothing else: stages by layers"
    )
    diff.add_argument("--explain-tolerance", metavar="TAP", help="say how far this tap may be off, and why, instead")
    diff.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case, Trace, render, summary, to_json
    from refimpl.diff.html import to_html
    from refimpl.diff.judge import explain, judge
    from refimpl.diff.junit import to_junit
    from refimpl.diff.report import wrapped

    case, trace = Case.read(args.case), Trace.read(args.candidate)
    if args.explain_tolerance:
        print("\n".join(explain(case, trace, args.explain_tolerance)))
        return 0
    if args.other:
        return _referee(case, trace, args)
    judgement = judge(case, trace, track=progress("replaying"))
    for out, make in ((args.junit, to_junit), (args.html, to_html)):
        if out:
            deliver(make(judgement), out, quiet=True)
    text = (
        summary(judgement)
        if args.quiet
        else to_json(judgement)
        if args.json
        else render(judgement, everything=args.all)
    )
    if sys.stdout.isatty() and not (args.json or args.all):
        text = wrapped(text, shutil.get_terminal_size().columns)
    print(text)
    return judgement.exit_code


def _referee(case: Case, trace: Trace, args: argparse.Namespace) -> int:
    from refimpl.diff import Trace
    from refimpl.diff.referee import referee

    one_only = ("all", "quiet", "json", "junit", "html")
    given = [f"--{name}" for name in one_only if getattr(args, name)]
    require(not given, f"{', '.join(given)} with two traces; it is for one")
    lines, code = referee(case, trace, Trace.read(args.other), (str(args.candidate), str(args.other)))
    print("\n".join(lines))
    return code
