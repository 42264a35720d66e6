"""`refimpl impact`: how much of what the logits are off by each finding owns."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .common import Commands, progress

_TEXT = """Say how much each finding of `refimpl diff` moves the logits, so that you know which of several matters.

Alone: the specification's run with this stage as the candidate computes it, everything else ours. Corrected: the
candidate's run with this stage as the specification computes it. Both from the files alone; a named mistake is put in
as such, any other stage as the difference that it makes on the candidate's own inputs.

example: refimpl impact refimpl/cases/tiny refimpl/cases/tiny/hf-bug.safetensors
example: refimpl impact CASE TRACE --by-layer --graft 'L*/router.weights,L*/moe.shared'"""


def add(commands: Commands) -> None:
    """Add `impact`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser(
        "impact", help="how much each finding of a diff moves the logits", description=_TEXT, formatter_class=raw
    )
    p.add_argument("case", type=Path)
    p.add_argument("candidate", type=Path, help="a trace")
    p.add_argument("--by-layer", action="store_true", help="each tap by itself, instead of a stage in all its layers")
    p.add_argument(
        "--graft", metavar="TAPS", help="these recorded taps instead of what is blamed: patterns with commas between"
    )
    p.add_argument("--json", action="store_true", help="print JSON (schema refimpl-impact/1)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case, Trace
    from refimpl.diff.impact import impacts, impacts_to_json, render_impacts
    from refimpl.diff.judge import judge
    from refimpl.model.phases import in_part

    judgement = judge(Case.read(args.case), Trace.read(args.candidate), track=progress("replaying"))
    patterns = args.graft.split(",") if args.graft else []
    found = impacts(judgement, patterns, by_layer=args.by_layer, track=progress("grafting"))
    print(impacts_to_json(found) if args.json else render_impacts(found))
    if backwards := [f.tap for f in judgement.culprits if not in_part(f.tap)]:
        left = f"{len(backwards)} blamed gradients and updates are left out: they move no logit of their run ({backwards[0]} ...)"
        print(left, file=sys.stderr)
    return 0
