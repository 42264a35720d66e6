"""`refimpl plot`: the metrics of training runs as a figure."""

from __future__ import annotations

import argparse
from pathlib import Path

from refimpl.autograd.errors import require

from .common import Commands

_TEXT = """Draw the metrics of training runs (extra: plot).

  refimpl plot run -o run.svg                          loss by part, norm, rate, expert load, bias, speed
  refimpl plot run-a run-b -o both.png                 two runs in one figure
  refimpl plot run -o load.svg --metric 'load/L3/*' --metric 'loss/*' --over step

Metrics are the names in RUN/metrics.jsonl; a panel for every --metric, by name or pattern.

exit code: 0; 3 bad input"""


def add(commands: Commands) -> None:
    """Add `plot`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("plot", help="draw the metrics of training runs", description=_TEXT, formatter_class=raw)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `refimpl train` wrote")
    p.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="FILE.svg or FILE.png")
    p.add_argument("--metric", action="append", metavar="NAME", help="draw these only (repeatable; * matches anything)")
    p.add_argument("--over", choices=["tokens", "step"], default="tokens", help="the horizontal axis (default tokens)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.checkpoint import Transaction
    from refimpl.plotting import FORMATS
    from refimpl.train.run.plot import PANELS, picture

    form = args.out.suffix.removeprefix(".").lower()
    require(form in FORMATS, f"{args.out}: expected a name that ends in .{' or .'.join(FORMATS)}")
    panels = {name: (name,) for name in args.metric} if args.metric else PANELS
    made = picture(args.runs, panels, over=args.over, form=form)
    with Transaction() as files, files.new(args.out) as f:
        f.write(made)
    print(args.out)
    return 0
