"""`refimpl case`: write a small case with random weights."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from refimpl.autograd.errors import SpecError

from .common import Commands, model_config


def add(commands: Commands) -> None:
    """Add `case`."""
    case = commands.add_parser("case", help="write a small case with random weights to run on both sides")
    case.add_argument("out", type=Path)
    case.add_argument("--preset", default="tiny", help="tiny or mini")
    case.add_argument("--config", type=Path, help="a config.json instead of a preset")
    case.add_argument("--shrink", action="store_true", help="make a real model's config small, every mechanism kept")
    case.add_argument("--mtp", action="store_true", help="with the MTP layers that the config has")
    case.add_argument("--seed", type=int, default=0, help="a natural number; the same seed writes the same files")
    case.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; returns its exit code."""
    from refimpl.record import new_case
    from refimpl.record.shrink import changes, shrink

    config = real = model_config(args)
    if args.shrink:
        config = shrink(real)
        print("\n".join(changes(real, config)), file=sys.stderr)
    if args.seed < 0:
        raise SpecError(f"--seed is {args.seed}; it must not be negative")
    if config.hidden_size * config.n_routed_experts > 1 << 18:
        raise SpecError("this model is too large to draw at random; --shrink makes it small")
    new_case(args.out, config, seed=args.seed, mtp=args.mtp)
    print(args.out)
    return 0
