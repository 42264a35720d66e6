"""`refimpl taps`: every tap there is, or those of a case with their sizes."""

from __future__ import annotations

import argparse
from pathlib import Path

from refimpl.autograd.errors import SpecError, require

from .common import Commands, deliver

_TEXT = """List the taps: what a trace can hold, under which names, with which axes, computed from what.

With CASE, the taps of that case's forward run with their sizes. Without, one line for every tap of the specification.
docs/taps.md is the same as a page, with each tap's name in other implementations and how to write a trace by hand."""


def add(commands: Commands) -> None:
    """Add `taps`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("taps", help="list the taps that a trace can hold", description=_TEXT, formatter_class=raw)
    p.add_argument("case", type=Path, nargs="?", help="a case folder")
    p.add_argument("--pattern", help="only these, e.g. 'L1/router.*'; several with commas between")
    p.add_argument(
        "--attend", default="expanded", choices=["expanded", "absorbed"], help="with CASE: form of attention"
    )
    p.add_argument("--json", action="store_true", help="print JSON (schema refimpl-taps/1)")
    p.add_argument("--markdown", type=Path, metavar="FILE", help="make the tables between the marks of FILE anew")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.diff import Case
    from refimpl.layers.stage import tap_matches
    from refimpl.record import catalogue, catalogue_text

    if args.markdown:
        return _rewrite(args.markdown)
    entries = catalogue.of_case(Case.read(args.case), attend=args.attend) if args.case else catalogue.everything()
    if args.pattern:
        patterns = args.pattern.split(",")
        entries = [e for e in entries if any(tap_matches(e.tap, p) for p in patterns)]
        require(entries, f"--pattern: no tap matches {args.pattern!r}; `refimpl taps` lists them all")
    print(catalogue_text.to_json(entries) if args.json else catalogue_text.render(entries))
    return 0


def _rewrite(page: Path) -> int:
    from refimpl.record.catalogue_text import rewritten

    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{page}: cannot be read: {error}") from error
    deliver(rewritten(text), page)
    return 0
