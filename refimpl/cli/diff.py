"""`refimpl diff`: judge another implementation's trace."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, progress

_TEXT = """Judge a recorded run of another implementation, stage by stage.

CASE is a folder with config.json, weights.safetensors and tokens.json; CANDIDATE is a trace: a safetensors file whose
tensors are named by tap (`refimpl record hf` writes one; so can any language). Each recorded stage is re-run on the
candidate's own recorded inputs, so a wrong stage shows up alone, wherever it is.

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
    diff.add_argument("--all", action="store_true", help="list every tap in model order")
    diff.add_argument("--quiet", action="store_true", help="print the verdict only")
    diff.add_argument("--json", action="store_true", help="print JSON (schema refimpl-diff/1)")
    diff.add_argument("--explain-tolerance", metavar="TAP", help="say how far this tap may be off, and why, instead")
    diff.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case, Trace, render, summary, to_json
    from refimpl.diff.judge import explain, judge

    if args.explain_tolerance:
        print("\n".join(explain(Case.read(args.case), Trace.read(args.candidate), args.explain_tolerance)))
        return 0
    judgement = judge(Case.read(args.case), Trace.read(args.candidate), track=progress("replaying"))
    text = (
        to_json(judgement)
        if args.json
        else summary(judgement)
        if args.quiet
        else render(judgement, everything=args.all)
    )
    print(text)
    return judgement.exit_code
