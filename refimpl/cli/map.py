"""`refimpl map`: the tap maps that are shipped, and entries for a new one."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, deliver

_TEXT = """A tap map says where an implementation shows which tap; `refimpl record torch --map` and `record import --map` read it.

  refimpl map list                                     the maps that are shipped, and what they were tested with
  refimpl map show torchtitan > my.toml                one of them, to start from
  refimpl map suggest CASE --build pkg.mod:fn          entries by value, for a model that is known to compute the case right

docs/recording.md has the grammar. Proposed entries are what to look at first: two modules may hold the same numbers."""


def add(commands: Commands) -> None:
    """Add `map`."""
    raw = argparse.RawDescriptionHelpFormatter
    p = commands.add_parser("map", help="list, show and propose tap maps", description=_TEXT, formatter_class=raw)
    actions = p.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="list the maps that are shipped")
    listing.set_defaults(run=run, action=_list)
    show = actions.add_parser("show", help="print a map that is shipped")
    show.add_argument("name", help="as `refimpl map list` prints it")
    show.set_defaults(run=run, action=_show)
    suggest = actions.add_parser("suggest", help="propose entries for a torch model that computes a case right")
    suggest.add_argument("case", type=Path, help="a case folder")
    suggest.add_argument(
        "--build", required=True, metavar="PKG.MOD:FN", help="function of the case that returns the model"
    )
    suggest.add_argument("-o", "--out", type=Path, metavar="FILE", help="write the map there")
    suggest.set_defaults(run=run, action=_suggest)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    code: int = args.action(args)
    return code


def _list(args: argparse.Namespace) -> int:
    from refimpl.diff.names import frameworks

    for f in frameworks():
        print(f"{f.key:14}{len(f.taps):3} taps  {'tested' if f.tested else 'untested'}  {f.version}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from refimpl.record.tapmap import shipped_text

    deliver(shipped_text(args.name), None)
    return 0


def _suggest(args: argparse.Namespace) -> int:
    from refimpl.diff import Case
    from refimpl.record import suggest, torch_map

    case = Case.read(args.case)
    with torch_map.built(case, args.build) as made:
        entries = suggest.suggest(made, case)
    deliver(suggest.as_toml(entries, args.build.partition(":")[0]), args.out)
    return 0
